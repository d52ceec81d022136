"""N steps equal k steps, a checkpoint, and N - k steps: weights, optimizers, averages and sample order."""

import lightning
import pytest
import torch
from stage_setup import STAGES, data, standard_callbacks, trainer

from tessera.callbacks import LastCheckpoint


class Losses(lightning.pytorch.callbacks.Callback):
    """Losses of every batch."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        found = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("train/loss")}
        self.values.append((batch["index"].tolist(), found))


def run(folder, name, max_steps, workers=0, ckpt=None, save_at=None, **changes):
    build, serve = STAGES[name]
    stage = build(**changes)
    losses = Losses()
    last = LastCheckpoint(save_at.parent if save_at else folder / "unused")
    fit = trainer(folder, max_steps, [*standard_callbacks(), losses, last], enable_checkpointing=True)
    total = 30  # schedules see the whole training in every part
    type(stage).total_steps = property(lambda self: total)
    fit.fit(stage, data(serve, folder, workers=workers), ckpt_path=ckpt, weights_only=True)
    return stage, fit, losses.values


# an epoch has 22 batches of 64
@pytest.mark.parametrize(
    ("name", "stop", "workers"),
    [("tokenizer", 13, 0), ("tokenizer", 22, 0), ("tokenizer", 13, 2), ("generator", 13, 0), ("post_training", 13, 0)],
)
def test_resuming_is_exact(tmp_path, monkeypatch, name, stop, workers):
    for stage in ("TokenizerTraining", "GeneratorTraining", "DecoderPostTraining"):
        cls = getattr(__import__("tessera.stages", fromlist=[stage]), stage)
        monkeypatch.setattr(cls, "total_steps", cls.total_steps, raising=False)
    whole, fit, seen = run(tmp_path, name, 30, workers)
    run(tmp_path, name, stop, workers, save_at=tmp_path / "k" / "last.ckpt")
    resumed, again, rest = run(tmp_path, name, 30, workers, ckpt=tmp_path / "k" / "last.ckpt")
    assert rest == seen[len(seen) - len(rest) :] and len(rest) == 30 - stop
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    for a, b in zip(fit.optimizers, again.optimizers, strict=True):
        for x, y in zip(a.state_dict()["state"].values(), b.state_dict()["state"].values(), strict=True):
            assert all(torch.equal(torch.as_tensor(x[key]), torch.as_tensor(y[key])) for key in x)
    averages = [run.callbacks[0].averaged_state_dict() for run in (fit, again)]
    for part, values in averages[0].items():
        assert all(torch.equal(value, averages[1][part][key]) for key, value in values.items())


def test_accumulation_window_survives(tmp_path, monkeypatch):
    from tessera.stages import TokenizerTraining

    monkeypatch.setattr(TokenizerTraining, "total_steps", TokenizerTraining.total_steps, raising=False)
    changes = {"accumulate_grad_batches": 4, "discriminator": None}
    whole, _, seen = run(tmp_path, "tokenizer", 8, **changes)
    assert len(seen) == 32
    run(tmp_path, "tokenizer", 3, save_at=tmp_path / "k" / "last.ckpt", **changes)
    resumed, _, _ = run(tmp_path, "tokenizer", 8, ckpt=tmp_path / "k" / "last.ckpt", **changes)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
