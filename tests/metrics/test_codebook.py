import math

import pytest
import torch

from forked import run_forked
from golden_cases import golden
from tessera.errors import ConfigError, DataError
from tessera.metrics.codebook import CodebookUsage, codebook_figures, entropy, perplexity, usage


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_codebook"])
def test_figures_of_summed_counts(case):
    file = golden(case)
    codes, out = file.config["codes"], file.output
    merged, rank_usage, batch_perplexity = CodebookUsage(codes), [], []
    for rank, batches in enumerate(file.config["batches"]):
        metric = CodebookUsage(codes)
        for number, images in enumerate(batches):
            tokens = file.input[f"rank{rank}_batch{number}"]
            assert tokens.shape == (images, file.config["tokens"])
            metric.update(tokens[:, None])
            single = CodebookUsage(codes)
            single.update(tokens[:, None])
            batch_perplexity.append(float(perplexity(single.compute())))
        assert torch.equal(metric.counts[0, 0].double(), out[f"rank{rank}/counts"])
        rank_usage.append(float(usage(metric.counts)))
        assert rank_usage[-1] == pytest.approx(float(out[f"rank{rank}/usage"]), abs=1e-12)
        assert float(entropy(metric.counts, base=2)) == pytest.approx(float(out[f"rank{rank}/entropy_bits"]), abs=1e-5)
        merged.counts = merged.counts + metric.counts
    assert len(file.config["batches"]) == file.config["ranks"]
    # LlamaGen looks at the last tokens of all batches, in a window that starts filled with code 0
    window, used = torch.zeros(65536, dtype=torch.int64), []
    for rank, batches in enumerate(file.config["batches"]):
        for number in range(len(batches)):
            tokens = file.input[f"rank{rank}_batch{number}"].flatten()
            window = torch.cat([window, tokens])[-len(window) :]
            used.append(float(usage(window.bincount(minlength=codes)[None, None])))
    recorded = out["llamagen/window_usage_after_each_batch"]
    torch.testing.assert_close(torch.tensor(used, dtype=torch.float64), recorded)
    counts = merged.counts
    assert torch.equal(counts[0, 0].double(), out["merged/counts"])
    figures = codebook_figures(counts)
    assert figures["usage_branch0"] == pytest.approx(float(out["merged/usage"]), abs=1e-12)
    # the published entropy adds 1e-8 inside the logarithm, taming's 1e-10
    assert figures["entropy_bits_branch0"] == pytest.approx(float(out["merged/entropy_bits"]), abs=1e-5)
    assert figures["entropy_nats_branch0"] == pytest.approx(float(out["merged/entropy_nats_exact"]), abs=1e-9)
    assert figures["perplexity_branch0"] == pytest.approx(float(out["merged/perplexity_exact"]), abs=1e-8)
    assert figures["perplexity_branch0"] == pytest.approx(float(out["merged/perplexity_taming_formula"]), abs=1e-4)
    per_batch = torch.tensor(batch_perplexity, dtype=torch.float64)
    torch.testing.assert_close(per_batch, out["taming/per_batch_perplexity"], atol=1e-4, rtol=1e-4)
    assert per_batch.mean() == pytest.approx(float(out["wrong/mean_of_batch_perplexity"]), abs=1e-4)
    assert sum(rank_usage) / len(rank_usage) == pytest.approx(float(out["wrong/mean_of_rank_usage"]), abs=1e-9)


def test_branches_and_scales_are_counted_apart():
    grids = [(1, 1), (1, 2)]
    metric = CodebookUsage(4, num_branches=2, grids=grids)
    metric.update(torch.tensor([[[0, 1, 1], [3, 3, 2]], [[0, 1, 2], [3, 2, 2]]]))
    counts = metric.compute()
    assert counts.tolist() == [[[2, 0, 0, 0], [0, 3, 1, 0]], [[0, 0, 0, 2], [0, 0, 3, 1]]]
    figures = codebook_figures(counts)
    assert figures["usage_branch0"] == 0.75
    assert figures["usage_branch0_scale0"] == 0.25
    assert figures["dead_codes_branch1"] == 2
    assert figures["perplexity_branch1"] == pytest.approx(2)
    assert figures["entropy_bits_branch1"] == pytest.approx(1)
    p = torch.tensor([0.75, 0.25]).double()
    assert figures["entropy_nats_branch0_scale1"] == pytest.approx(float(-(p * p.log()).sum()))
    assert "usage_branch0_scale0" not in codebook_figures(CodebookUsage(4, 2).counts)


def test_codes_of_separate_codebooks_are_not_added_up():
    counts = torch.tensor([[[2, 0, 0, 0], [0, 3, 1, 0]]])
    figures = codebook_figures(counts, shared=False)
    assert figures["usage_branch0_scale1"] == 0.5
    assert not any(name.endswith("_branch0") for name in figures)
    # one scale is one codebook
    assert codebook_figures(counts[:, :1], shared=False)["usage_branch0"] == 0.25


def test_extremes():
    assert float(entropy(torch.zeros(5, dtype=torch.int64))) == 0
    assert float(perplexity(torch.full((16,), 7))) == pytest.approx(16)
    assert float(entropy(torch.full((16,), 7))) == pytest.approx(math.log(16))
    one = CodebookUsage(1)
    one.update(torch.zeros(3, 1, 4, dtype=torch.int64))
    assert codebook_figures(one.compute())["usage_branch0"] == 1


def test_masked_rows_are_left_out():
    metric = CodebookUsage(8)
    metric.update(torch.tensor([[[1, 2]], [[3, 4]]]), mask=torch.tensor([True, False]))
    metric.update(torch.tensor([[[5, 6]]]), mask=torch.tensor([False]))
    assert metric.counts[0, 0].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]


def test_bad_input():
    metric = CodebookUsage(8, grids=[(2, 2)])
    with pytest.raises(DataError, match="another tokenizer"):
        metric.update(torch.full((1, 1, 4), 8))
    with pytest.raises(DataError, match="another tokenizer"):
        metric.update(torch.full((1, 1, 4), -1))
    with pytest.raises(DataError, match="grids sum to 4"):
        metric.update(torch.zeros(1, 1, 5, dtype=torch.int64))
    with pytest.raises(DataError, match=r"\(B, 1, L\)"):
        metric.update(torch.zeros(1, 2, 4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="codebook_size=0"):
        CodebookUsage(0)


def _two_processes(rank, world, tokens):
    metric = CodebookUsage(16, num_branches=2)
    metric.update(tokens[:3] if rank == 0 else tokens[3:])
    return metric.compute().tolist()


def test_two_processes_equal_one():
    tokens = torch.randint(0, 16, (8, 2, 5))
    single = CodebookUsage(16, num_branches=2)
    single.update(tokens)
    for answer in run_forked(_two_processes, tokens):
        assert answer == single.compute().tolist()
