"""N steps equal k steps, a checkpoint, and N - k steps: weights, optimizers, averages and sample order."""

import os
import signal

import lightning
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from stage_setup import STAGES, data, guided_stage, standard_callbacks, trainer
from tessera.callbacks import LastCheckpoint
from tessera.stages import TokenizerTraining

STAGES = {**STAGES, "guided": (guided_stage, "images")}


class Losses(lightning.pytorch.callbacks.Callback):
    """Losses of every batch."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        found = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("train/loss")}
        self.values.append((batch["index"].tolist(), found))


def run(
    folder, name, max_steps, workers=0, ckpt=None, save_at=None, callbacks=(), plugins=(), batch_size=64, **changes
):
    build, serve = STAGES[name]
    stage = build(**changes)
    losses = Losses()
    last = LastCheckpoint(save_at.parent if save_at else folder / "unused")
    fit = trainer(
        folder,
        max_steps,
        [*standard_callbacks(), losses, *callbacks, last],
        enable_checkpointing=True,
        plugins=list(plugins),
    )
    total = 30  # schedules see the whole training in every part
    type(stage).total_steps = property(lambda self: total)
    fit.fit(stage, data(serve, folder, batch_size, workers), ckpt_path=ckpt, weights_only=True)
    return stage, fit, losses.values


# an epoch has 22 batches of 64
@pytest.mark.parametrize(
    ("name", "stop", "workers"),
    [
        ("tokenizer", 13, 0),
        ("tokenizer", 22, 0),
        ("tokenizer", 13, 2),
        ("generator", 13, 0),
        ("post_training", 13, 0),
        ("guided", 13, 0),
    ],
)
def test_resuming_is_exact(tmp_path, monkeypatch, name, stop, workers):
    for stage in ("TokenizerTraining", "GeneratorTraining", "DecoderPostTraining"):
        cls = getattr(__import__("tessera.stages", fromlist=[stage]), stage)
        monkeypatch.setattr(cls, "total_steps", cls.total_steps, raising=False)
    whole, fit, seen = run(tmp_path, name, 30, workers)
    run(tmp_path, name, stop, workers, save_at=tmp_path / "k" / "last.ckpt")
    resumed, again, rest = run(tmp_path, name, 30, workers, ckpt=tmp_path / "k" / "last.ckpt")
    assert rest == seen[len(seen) - len(rest) :] and len(rest) == 30 - stop
    assert_same(whole, fit, resumed, again)


def assert_same(whole, fit, resumed, again):
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for a, b in zip(fit.optimizers, again.optimizers, strict=True):
        for x, y in zip(a.state_dict()["state"].values(), b.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(torch.as_tensor(x[key]), torch.as_tensor(y[key])) for key in x)
    averages = [run.callbacks[0].averaged_state_dict() for run in (fit, again)]
    for part, values in averages[0].items():
        assert all(torch.equal(value, averages[1][part][key]) for key, value in values.items())


class StopAfter(lightning.pytorch.callbacks.Callback):
    """A signal while a batch is processed."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx + 1 == self.batches:
            os.kill(os.getpid(), signal.SIGTERM)


def scaled():
    """Float16 with a loss scale that changes at every step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    return [MixedPrecision("16-mixed", "cpu", scaler)]


@pytest.mark.parametrize("plugins", [list, scaled], ids=["float32", "float16"])
def test_open_accumulation_windows_survive(tmp_path, monkeypatch, plugins):
    monkeypatch.setattr(TokenizerTraining, "total_steps", TokenizerTraining.total_steps, raising=False)
    changes = {"accumulate_grad_batches": 4, "discriminator_start": 0.0, "batch_size": 16}
    whole, fit, seen = run(tmp_path, "tokenizer", 4, plugins=plugins(), **changes)
    assert len(seen) == 16
    last = tmp_path / "k" / "last.ckpt"
    # the second window is open, with two batches of four
    _, cut, _ = run(tmp_path, "tokenizer", 4, save_at=last, callbacks=[StopAfter(6)], plugins=plugins(), **changes)
    assert cut.global_step == 1 and torch.load(last, weights_only=True)["accumulation"]["batches"] == 2
    resumed, again, rest = run(tmp_path, "tokenizer", 4, ckpt=last, plugins=plugins(), **changes)
    assert len(rest) == 10 and rest == seen[6:]
    assert_same(whole, fit, resumed, again)
