import math

import pytest
import torch

from forked import run_forked
from golden_cases import golden
from tessera.errors import ConfigError, DataError
from tessera.metrics.inception_score import InceptionScore, split_scores


def logits_of(n: int = 33, classes: int = 6, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def score(logits: torch.Tensor, batch: int = 7, **options) -> float:
    metric = InceptionScore(logits.shape[1], **options)
    for index in torch.arange(len(logits)).split(batch):
        metric.update(logits[index], index=index)
    return float(metric.compute())


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_inception_score"])
def test_published_conventions(case):
    file = golden(case)
    config, out, compared = file.config["isc"], file.output, set()

    def close(actual: float, key: str, tolerance: float) -> None:
        if math.isnan(out[key]):  # float32 softmax underflowed there
            assert math.isfinite(actual), key
        else:
            assert actual == pytest.approx(float(out[key]), rel=tolerance), key
        compared.add(key)

    for n in config["n"]:
        logits = file.input[f"logits_{n}"]
        assert logits.shape == (n, config["classes"])
        for size in config["split_sizes"]:
            for suffix, order in (("", torch.arange(n)), ("_sorted", file.input[f"sort_order_{n}"])):
                key = f"adm_{n}_split{size}{suffix}"
                close(score(logits[order], num_samples=n, split_size=size, shuffle_seed=None), key, 1e-5)
        close(score(logits), f"single_split_float64_{n}", 1e-9)
        key = f"torch_fidelity_{n}"
        chunks, shuffled = out[f"{key}_chunk_sizes"].tolist(), out[f"{key}_permutation_seed2020"]
        assert chunks == [(i + 1) * n // len(chunks) - i * n // len(chunks) for i in range(len(chunks))]
        for splits in ([n], chunks):
            for shuffle, order in ((0, torch.arange(n)), (1, shuffled)):
                values = split_scores(logits[order], splits)
                stem = f"{key}_splits{len(splits)}_shuffle{shuffle}"
                close(float(values.mean()), f"{stem}/mean", 1e-9)
                assert float(values.std(correction=0)) == pytest.approx(float(out[f"{stem}/std"]), abs=1e-9)
                compared.add(f"{stem}/std")
        key = f"torchmetrics_{n}"
        chunks = out[f"{key}_chunk_sizes"].tolist()
        assert chunks == [len(part) for part in torch.arange(n).chunk(10)]
        values = split_scores(logits[out[f"{key}_permutation"]], chunks)
        close(float(values.mean()), f"{key}_splits10/mean", 1e-9)
        close(float(values.std()), f"{key}_splits10/std", 1e-9)
        for library in ("torch_fidelity", "torchmetrics"):
            compared |= {k for k in out if k.startswith(f"{library}_{n}_") and k.endswith(("sizes", "n", "seed2020"))}
    assert compared == set(out)


def test_order_and_batches_do_not_matter_but_seed_does():
    logits, order = logits_of(), torch.randperm(33, generator=torch.Generator().manual_seed(1))
    expected = score(logits, num_samples=33, split_size=10)
    metric = InceptionScore(6, num_samples=33, split_size=10)
    for index in order.split(4):
        metric.update(logits[index], index=index)
    assert float(metric.compute()) == pytest.approx(expected, rel=1e-12)
    assert score(logits, num_samples=33, split_size=10, shuffle_seed=1) != pytest.approx(expected, rel=1e-6)
    # the global generator is neither read nor advanced
    before = torch.get_rng_state()
    assert score(logits, num_samples=33, split_size=10) == expected
    assert torch.equal(before, torch.get_rng_state())


def test_certain_predictions_and_huge_gaps():
    # one class per sample, evenly: the score is the number of classes, also where softmax underflows
    logits = torch.eye(4).repeat(3, 1) * 1000
    assert score(logits) == pytest.approx(4)
    assert score(torch.zeros(5, 3)) == pytest.approx(1)
    assert math.isfinite(score(logits_of() * 1e4))


def test_installed_libraries_agree():
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torchmetrics.image.inception import InceptionScore as Theirs

    logits = logits_of(60)
    theirs = isc_features_to_metric(logits, splits=6, shuffle=False)
    assert score(logits, num_samples=60, split_size=10, shuffle_seed=None) == pytest.approx(
        theirs["inception_score_mean"], rel=1e-9
    )
    identity = torch.nn.Identity()
    other = Theirs(feature=identity, splits=1).set_dtype(torch.float64)
    other.update(logits.double())
    assert score(logits) == pytest.approx(float(other.compute()[0]), rel=1e-9)


def test_flavours_are_named():
    assert InceptionScore(3).flavour == "splits=1"
    assert InceptionScore(3, 50_000).flavour == ""
    assert InceptionScore(3, 50_000, split_size=100).flavour == "split_size=100"


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_bad_input():
    metric = InceptionScore(6, num_samples=5)
    with pytest.raises(DataError, match="numbers of the samples"):
        metric.update(logits_of(5))
    with pytest.raises(DataError, match=r"from 3 to 7.*5 samples"):
        metric.update(logits_of(5), index=torch.arange(3, 8))
    bad = logits_of(5)
    bad[2, 0] = float("nan")
    with pytest.raises(DataError, match="logits of sample 12 are NaN"):
        metric.update(bad, index=torch.arange(10, 15))
    metric.update(logits_of(4), index=torch.arange(4))
    with pytest.raises(DataError, match="seen 4 samples of 5"):
        metric.compute()
    with pytest.raises(DataError, match="0 samples of any number"):
        InceptionScore(6).compute()
    with pytest.raises(ConfigError, match="split_size=0"):
        InceptionScore(6, 5, split_size=0)
    with pytest.raises(DataError, match="splits of 3 samples"):
        split_scores(logits_of(5), [1, 2])


def _two_processes(rank, world, logits):
    metric = InceptionScore(logits.shape[1], num_samples=len(logits), split_size=10)
    part = torch.arange(len(logits))[:9] if rank == 0 else torch.arange(9, len(logits))
    for index in part.split(4):
        metric.update(logits[index], index=index)
    return float(metric.compute())


def test_two_processes_equal_one():
    logits = logits_of()
    expected = score(logits, num_samples=33, split_size=10)
    assert run_forked(_two_processes, logits) == pytest.approx([expected] * 2, rel=1e-12)
