"""Collapse is found, told from few tokens, named with a remedy, and not repeated at every check."""

import logging
from functools import partial

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from figure_setup import TinyData, TinyFeatures, TinyStage, validate
from forked import run_forked
from tessera.callbacks import CodebookCollapse, CodebookReport, PerturbedFID
from tessera.callbacks.codebook_collapse import MAX_COUNTERS, CollapseWatch, reachable_codes, remedies
from tessera.errors import ConfigError
from tessera.quantizers import IBQCodebook, LFQCodebook, ProductQuantizer, SingleGridQuantizer, VQCodebook

LOGGER = "tessera.callbacks.codebook_collapse"


def quantizer(branches: int = 1) -> ProductQuantizer:
    codebook = partial(VQCodebook, codebook_size=64)
    made = ProductQuantizer(partial(SingleGridQuantizer, codebook=codebook), branches, 4 * branches)
    made.bind_grid((2, 2))
    return made


def lookup_free(bits: int) -> ProductQuantizer:
    made = ProductQuantizer(partial(SingleGridQuantizer, codebook=partial(LFQCodebook, bits=bits)), 1, None)
    made.bind_grid((4, 4))
    return made


def test_reachable_codes():
    assert reachable_codes(1, 5) == 1.0
    assert reachable_codes(1000, 0) == 0.0
    assert reachable_codes(1 << 40, 500) == pytest.approx(500, rel=1e-6)
    drawn = torch.stack([torch.randint(50, (70,)).unique().numel() * torch.ones(()) for _ in range(400)]).mean()
    assert reachable_codes(50, 70) == pytest.approx(float(drawn), rel=0.03)


@pytest.mark.parametrize(
    ("counts", "collapsed"),
    [
        (torch.full((1024,), 10), False),
        (torch.tensor([100] * 40 + [0] * 984), True),  # 4 % of the codes
        (torch.tensor([100] * 60 + [0] * 964), False),
        (torch.tensor([1_000_000] + [1] * 1023), True),  # all codes, but one has nearly every token
        (torch.tensor([1] * 9 + [0] * 16375), False),  # nine tokens can't use more
        (torch.tensor([500, 0]), True),
        (torch.tensor([500, 400]), False),
        (torch.tensor([500]), False),  # a codebook of one code has nothing to lose
        (torch.zeros(16, dtype=torch.int64), False),  # no tokens, no verdict
    ],
)
def test_verdict(counts, collapsed):
    assert (CollapseWatch().judge(counts) is not None) == collapsed


def test_warns_rarely_and_names_branch_remedy_and_recovery(caplog):
    watch, made = CollapseWatch(repeat_every=3), quantizer(branches=2)
    dead, alive = torch.zeros(64, dtype=torch.int64), torch.full((64,), 9)
    dead[7] = 576
    with caplog.at_level(logging.INFO, logger=LOGGER):
        for _ in range(5):
            assert watch.check(torch.stack([alive, dead])[:, None], made, "validation") == ["branch 1"]
        assert watch.check(torch.stack([alive, alive])[:, None], made, "validation") == []
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2  # findings 1 and 4
    assert "branch 1 (validation): 1 of 64 codes in use, perplexity 1, where 576 tokens" in warnings[0]
    assert "quantizer.branch.codebook.codebook_size" in warnings[0]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.INFO] == [
        "the codebook of branch 1 is in use again (validation)"
    ]


def test_scales_are_judged_for_themselves():
    made = quantizer()
    good, bad = torch.full((64,), 9), torch.zeros(64, dtype=torch.int64)
    bad[0] = 500
    assert CollapseWatch().check(torch.stack([good, bad])[None], made, "test") == ["branch 0, scale 1"]
    # with a codebook per scale, their sum means nothing
    made.branches[0].codebooks.append(VQCodebook(4, 64))
    assert CollapseWatch().check(torch.stack([bad, bad])[None], made, "test") == [
        "branch 0, scale 0",
        "branch 0, scale 1",
    ]


def test_remedies_fit_the_codebook():
    advice = " ".join(remedies(IBQCodebook(16, 8)))
    assert "max_latent_rms=0.75" in advice and "loss_weights.entropy_batch" in advice
    advice = " ".join(remedies(IBQCodebook(16, 8, use_entropy=False, max_latent_rms=0.5)))
    assert "use_entropy=true" in advice and "max_latent_rms" not in advice and "entropy_batch" not in advice
    plain, unit = (" ".join(remedies(VQCodebook(4, 8, l2_normalize=value))) for value in (False, True))
    assert "l2_normalize=true" in plain and "l2_normalize" not in unit


@pytest.mark.parametrize("change", [{"min_usage": 1.5}, {"min_perplexity": -0.1}, {"repeat_every": 0}])
def test_refuses_impossible_thresholds(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        CodebookReport(**change)
    with pytest.raises(ConfigError, match="every_steps=0"):
        CodebookCollapse(every_steps=0)


def test_report_leaves_out_codebooks_too_large_to_count(caplog):
    stage, report = TinyStage(), CodebookReport()
    stage.tokenizer.quantizer = lookup_free(bits=40)
    stage.tokenizer.quant_conv = nn.Conv2d(8, 40, 1)
    stage.tokenizer.post_quant_conv = nn.Conv2d(40, 8, 1)
    with caplog.at_level(logging.INFO, logger="tessera.callbacks.codebook_report"):
        validate([report, PerturbedFID(TinyFeatures(), alphas=[0.5])], stage)
    assert report.figures == [] and "1099511627776 codes are too large" in caplog.text


def collapsed_stage(branches: int = 2) -> TinyStage:
    """Its second branch gives one token, whatever the image."""
    stage = TinyStage(branches=branches)
    with torch.no_grad():
        stage.tokenizer.quant_conv.weight[4:] = 0
    return stage


def test_validation_warns(caplog):
    callback = CodebookReport()
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        validate([callback], collapsed_stage())
    assert callback.collapsed == ["branch 1"]
    assert "branch 1 (validation): 1 of 16 codes" in caplog.text
    healthy = CodebookReport()
    validate([healthy], TinyStage())
    assert healthy.collapsed == []


class TinyTraining(TinyStage):
    """Runs the tokenizer on training batches and learns nothing."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.still = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_index):
        return self.tokenizer(batch["image"]).z_q.mean() * 0 + self.still

    def configure_optimizers(self):
        return torch.optim.SGD([self.still], lr=0.0)


class Recorded(CodebookCollapse):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.checks, check = [], self.watch.check

        def recorded(counts, made, during):
            self.checks.append((counts.clone(), during))
            return check(counts, made, during)

        self.watch.check = recorded


def train(callback, stage, steps=5):
    data = TinyData()
    settings = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(
        max_steps=steps, callbacks=[callback], enable_model_summary=False, num_sanity_val_steps=0, **settings
    )
    stage.train()
    trainer.fit(stage, DataLoader(data.train, 8), DataLoader(data.val, 8))
    return data


def test_training_warns_in_windows_that_hold_all_their_tokens(caplog):
    stage, callback = TinyTraining(branches=2), Recorded(every_steps=2)
    with torch.no_grad():
        stage.tokenizer.quant_conv.weight[4:] = 0
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        data = train(callback, stage)
    assert [during for _, during in callback.checks] == ["training, steps 1 to 2", "training, steps 3 to 4"]
    tokens = stage.tokenizer.eval().tokenize(data.train.images)
    for (counts, _), start in zip(callback.checks, (0, 16), strict=True):
        for branch in range(2):
            own = tokens[start : start + 16, branch].flatten()
            assert torch.equal(counts[branch, 0], torch.bincount(own, minlength=16))
    assert callback.collapsed == ["branch 1"]
    assert "branch 1 (training, steps 1 to 2)" in caplog.text
    assert not stage.tokenizer.quantizer._forward_hooks


def test_training_leaves_giant_codebooks_alone():
    stage, callback = TinyTraining(), Recorded(every_steps=1)
    codebook = stage.tokenizer.quantizer.branches[0].codebooks[0]
    codebook.codebook_size = MAX_COUNTERS + 1
    train(callback, stage, steps=2)
    assert callback.checks == []


def test_training_without_a_tokenizer_is_refused():
    class Bare(lightning.LightningModule):
        pass

    with pytest.raises(ConfigError, match="codebook_collapse"):
        CodebookCollapse().on_train_start(None, Bare())


def test_diagnostics_of_ibq_are_logged():
    stage = TinyStage(branches=2)
    for branch in stage.tokenizer.quantizer.branches:
        branch.codebooks[0] = IBQCodebook(4, 16)
    callback, data = CodebookReport(), TinyData(batch_size=8)
    trainer = validate([callback], stage, data)
    z = stage.tokenizer.encode(data.val.images[:8])
    for branch in range(2):
        rows = z[:, 4 * branch : 4 * branch + 4].permute(0, 2, 3, 1).reshape(-1, 4)
        expected = stage.tokenizer.quantizer.branches[branch].codebooks[0].diagnostics(rows)
        for name, value in expected.items():
            assert trainer.callback_metrics[f"val/codebook/{name}_branch{branch}"] == pytest.approx(value.item())
    assert not stage.tokenizer.quantizer.branches[0].codebooks[0]._forward_hooks


def _diagnose(rank, world):
    stage = TinyStage()
    stage.tokenizer.quantizer.branches[0].codebooks[0] = IBQCodebook(4, 16)
    callback = CodebookReport()
    validate([callback], stage, TinyData(batch_size=4))
    return {figure.name: figure.value for figure in callback.figures}


def test_two_processes_agree_on_diagnostics():
    torch.manual_seed(0)
    first, second = run_forked(_diagnose)
    assert first == second and "gradient_path_branch0" in first
