"""Plumbing of the trainings: checks of losses, weights and batches, schedules, log keys."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from stage_setup import STAGES, data, generator_stage, post_training_stage, tokenizer_stage, trainer
from tessera.callbacks import LastCheckpoint
from tessera.errors import CheckpointError, ConfigError, DataError
from tessera.stages.finite import DivergedError, LossCheck

PIXELS = {"reconstruction"}
GAN = {"adversarial", "discriminator", "lecam"}
CODES = {"codebook", "commitment"}


def losses(split, names):
    return {f"{split}/loss/{name}" for name in names}


GAN_KEYS = {"train/adaptive_weight", "train/logits_real", "train/logits_fake", "train/lr/discriminator"}
KEYS = {
    "tokenizer": losses("train", PIXELS | GAN | CODES)
    | losses("val", PIXELS | CODES)
    | GAN_KEYS
    | {"train/lr/tokenizer"}
    | {f"train/perturbation/{name}" for name in ("alpha", "beta", "delta", "images", "displacement")}
    | {f"train/perturbation/tokens_{name}" for name in ("redrawn", "changed")},
    "generator": {
        f"{split}/{name}{part}"
        for split in ("train", "val")
        for name, whole in (("loss", "/total"), ("accuracy", ""))
        for part in (whole, *(f"/quarter{number}" for number in range(4)))
    }
    | {"train/lr/generator"},
    "post_training": losses("train", PIXELS | GAN) | losses("val", PIXELS | CODES) | GAN_KEYS | {"train/lr/decoder"},
}


@pytest.mark.parametrize("name", STAGES)
def test_log_keys(tmp_path, name):
    build, serve = STAGES[name]
    intervals = {"log_every_n_steps": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    fit = trainer(tmp_path, 2, limit_val_batches=1, **intervals)
    stage = build(**({"discriminator_start": 0.0} if name == "tokenizer" else {}))
    fit.fit(stage, data(serve, tmp_path, batch_size=16))
    assert set(fit.callback_metrics) == KEYS[name]


def test_the_perceptual_term_is_logged_and_stays_out_of_the_checkpoint(tmp_path):
    class Distance(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x, y):
            return self.scale * (x - y).abs().mean((1, 2, 3))

    distance = Distance()
    stage = tokenizer_stage(discriminator=None, perceptual=distance)
    fit = trainer(tmp_path, 2)
    fit.fit(stage, data("images", None, batch_size=16))
    assert "train/loss/perceptual" in fit.callback_metrics
    assert not distance.scale.requires_grad and not distance.training
    assert not any("scale" in key for key in stage.state_dict())
    assert all(p is not distance.scale for p in stage.parameters())


def test_schedules_move_once_per_optimizer_step(tmp_path):
    def halving(optimizer, total):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    stage = tokenizer_stage(scheduler=halving, discriminator_start=0.5, accumulate_grad_batches=2)
    seen = []

    def record(*_):
        metrics = stage.trainer.callback_metrics
        seen.append([float(metrics[f"train/lr/{name}"]) * 1e3 for name in ("tokenizer", "discriminator")])

    stage.on_train_batch_end = record
    trainer(tmp_path, 4).fit(stage, data("images", None, batch_size=16))
    expected = [(1, 1), (1, 1), (0.5, 1), (0.5, 1), (0.25, 1), (0.25, 1), (0.125, 0.5), (0.125, 0.5)]
    assert seen == [pytest.approx(rates, rel=1e-5) for rates in expected]


def test_the_end_of_training_must_be_known(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.max_steps"):
        trainer(tmp_path, -1).fit(generator_stage(), data("tokens", tmp_path))


@pytest.mark.parametrize(("windows", "warmup", "expected"), [(1, 0, 44), (4, 0, 11), (4, 3, 8)])
def test_steps_of_whole_epochs(tmp_path, windows, warmup, expected):
    # an epoch has 22 batches
    stage = post_training_stage(accumulate_grad_batches=windows, discriminator_warmup_steps=warmup)
    fit = trainer(tmp_path, -1, max_epochs=2)
    found = []
    stage.on_train_start = lambda: (found.append(stage.total_steps), setattr(fit, "should_stop", True))
    stage.training_step = lambda batch, number: None
    fit.fit(stage, data("pairs", tmp_path))
    assert found == [expected]


def test_loss_check_names_the_term():
    check = LossCheck()
    trainer = SimpleNamespace(global_step=7, checkpoint_callbacks=[], ckpt_path=None)
    check.add(["a", "b"], [torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)])
    check(trainer)
    check.add(["a"], [torch.tensor(1.0)])
    check.add(["train/loss/b", "c"], [torch.tensor(math.inf), torch.tensor(math.nan)])
    with pytest.raises(
        DivergedError, match=r"train/loss/b is not finite at step 7 \(inf\); start anew .*optimizer\.lr"
    ):
        check(trainer)
    check = LossCheck(limit=100)
    check.add(["a", "b"], [torch.tensor(100.0), torch.tensor(-101.0)])
    with pytest.raises(DivergedError, match=r"^b exploded at step 7 \(-101\.0\)"):
        check(trainer)
    with pytest.raises(ConfigError, match=r"stage\.loss_limit=0\.0"):
        LossCheck(0.0)


@pytest.mark.parametrize("term", ["codebook", "adversarial", "discriminator"])
def test_every_loss_is_checked_before_its_step(tmp_path, term):
    stage = tokenizer_stage(discriminator_start=0.0, perturbation=None, gradient_clip=None)
    log_losses = stage.log_losses

    def broken(values, prefix="train/loss"):
        bad = stage.trainer.global_step == 2 and term in values
        log_losses({**values, term: values[term] * math.nan} if bad else values, prefix)

    stage.log_losses = broken
    with pytest.raises(DivergedError, match=rf"train/loss/{term} is not finite at step \d"):
        trainer(tmp_path, 9).fit(stage, data("images", None, batch_size=16))
    assert stage.trainer.global_step == 2 and all(p.isfinite().all() for p in stage.parameters())


def test_a_diverged_loss_names_the_last_good_checkpoint(tmp_path):
    def fit(path=None):
        stage = tokenizer_stage(discriminator=None, perturbation=None, loss_limit=50.0)
        stage.pixel_loss = lambda x, y: (x - y).square().mean() * (1e3 if stage.trainer.global_step == 3 else 1)
        callbacks = [LastCheckpoint(tmp_path, every_n_steps=2)]
        trainer(tmp_path, 9, callbacks, enable_checkpointing=True).fit(
            stage, data("images", None, batch_size=16), ckpt_path=path, weights_only=True
        )

    last = tmp_path / "last.ckpt"
    match = rf"train/loss/reconstruction exploded at step 3.*continue from ckpt={last} with"
    with pytest.raises(DivergedError, match=match):
        fit()
    assert torch.load(last, weights_only=True)["global_step"] == 2
    last.rename(tmp_path / "former.ckpt")
    with pytest.raises(DivergedError, match=rf"step 3.*continue from ckpt={tmp_path}/former\.ckpt"):
        fit(tmp_path / "former.ckpt")


class Destroy(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            pl_module.tokenizer.quant_conv.weight.data[0, 0] = math.inf


def test_destroyed_weights_do_not_replace_the_last_checkpoint(tmp_path):
    callbacks = [Destroy(), LastCheckpoint(tmp_path, every_n_steps=1)]
    stage = tokenizer_stage(discriminator=None)
    match = rf"weight tokenizer\.quant_conv\.weight is not finite at step 2.*ckpt={tmp_path}/last\.ckpt with a lower"
    with pytest.raises(DivergedError, match=match):
        trainer(tmp_path, 9, callbacks, enable_checkpointing=True).fit(stage, data("images", None, batch_size=16))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda batch: batch | {"tokens": batch["tokens"] + 32}, r"token \d+, outside \[0, 32\)"),
        (lambda batch: batch | {"tokens": batch["tokens"] - 32}, r"token -\d+, outside \[0, 32\)"),
        (lambda batch: batch | {"tokens": batch["tokens"][:, :, 1:]}, r"shape \(1, 15\).*makes \(1, 16\)"),
        (lambda batch: batch | {"tokens": batch["tokens"].repeat(1, 2, 1)}, r"shape \(2, 16\)"),
        (lambda batch: {"image": batch["tokens"]}, r"holds image but no tokens; set data\.serve=tokens"),
    ],
)
@pytest.mark.parametrize("build", [generator_stage, post_training_stage])
def test_tokens_of_another_tokenizer_are_refused(tmp_path, build, change, match):
    stage = build()
    stage.training_step = lambda *_: pytest.fail("a bad batch reached the training step")
    module = data("tokens" if build is generator_stage else "pairs", tmp_path)
    check = stage.on_before_batch_transfer
    stage.on_before_batch_transfer = lambda batch, number: check(change(batch), number)
    with pytest.raises(DataError, match=match):
        trainer(tmp_path, 1).fit(stage, module)


def test_labels_out_of_range_and_missing_images_are_refused(tmp_path):
    stage = generator_stage()
    stage.generator.num_classes = 5
    with pytest.raises(DataError, match=r"label \d is outside \[0, 5\)"):
        trainer(tmp_path, 1).fit(stage, data("tokens", tmp_path))
    with pytest.raises(DataError, match=r"set data\.serve=pairs"):
        trainer(tmp_path, 1).fit(post_training_stage(), data("tokens", tmp_path))


def test_post_training_of_another_tokenizer_is_not_continued(tmp_path):
    first = post_training_stage(discriminator=None)
    fit = trainer(tmp_path, 1, enable_checkpointing=True)
    fit.fit(first, data("pairs", tmp_path))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    other = partial(post_training_stage, discriminator=None)()
    with torch.no_grad():
        other.tokenizer.quant_conv.bias += 1
    other.token_space = other.tokenizer.fingerprint()
    with pytest.raises(CheckpointError, match=r"became .*tokenizer\.path"):
        trainer(tmp_path, 2).fit(other, data("pairs", tmp_path), ckpt_path=tmp_path / "a.ckpt", weights_only=True)


def test_a_window_larger_than_the_setting_is_refused():
    stage = generator_stage(accumulate_grad_batches=2)
    with pytest.raises(ConfigError, match=r"accumulate_grad_batches=2 is less than the 3 batches"):
        stage.on_load_checkpoint({"accumulation": {"batches": 3, "gradients": {}}})
