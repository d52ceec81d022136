"""Training continues with exactly the samples it would have seen, wherever the checkpoint was written."""

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from data.pictures import Squares
from tessera.data import ImageDataModule
from tessera.errors import CheckpointError

BATCH, COUNT = 8, 44  # 5 batches and a rest
PER_EPOCH = COUNT // BATCH


class Recorder(lightning.LightningModule):
    """Writes down the samples of every step."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.validated = [], 0

    def training_step(self, batch, batch_index):
        self.seen.append(tuple(batch["index"].tolist()))
        return self.layer(batch["image"].mean((1, 2, 3))[:, None]).square().mean()

    def validation_step(self, batch, batch_index):
        self.validated += len(batch["index"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class SaveAt(Callback):
    """Writes a checkpoint at the given moments (hook, number of steps done)."""

    def __init__(self, folder, hooks):
        self.folder, self.hooks, self.written = folder, hooks, []

    def _save(self, trainer, hook):
        if hook in self.hooks and not trainer.sanity_checking:
            path = self.folder / f"{hook}-{trainer.global_step}.ckpt"
            trainer.save_checkpoint(path)
            self.written.append((trainer.global_step, path))

    def on_train_batch_end(self, trainer, *_):
        self._save(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        self._save(trainer, "validation")

    def on_train_epoch_start(self, trainer, *_):
        self._save(trainer, "epoch_start")

    def on_train_epoch_end(self, trainer, *_):
        self._save(trainer, "epoch")


def fit(module, data, callbacks=(), ckpt_path=None, **settings):
    defaults = {"max_steps": 17, "max_epochs": -1, "val_check_interval": 3}
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **(defaults | settings),
    )
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def data(workers=0, seed=1):
    return ImageDataModule(
        lambda split: Squares(split, COUNT if split == "train" else 5), BATCH, num_workers=workers, seed=seed
    )


RUNS = {
    "steps": {"max_steps": 17},
    "steps, validation across epochs": {"max_steps": 17, "check_val_every_n_epoch": None},
    "steps, no validation": {"max_steps": 17, "limit_val_batches": 0, "val_check_interval": 1.0},
    "epochs, validation at their ends": {"max_steps": -1, "max_epochs": 3, "val_check_interval": 1.0},
    "epochs cut short": {"max_steps": -1, "max_epochs": 4, "val_check_interval": 1.0, "limit_train_batches": 3},
}


@pytest.mark.parametrize("hook", ["batch", "validation", "epoch_start", "epoch"])
@pytest.mark.parametrize("run", RUNS)
def test_every_checkpoint_continues_exactly(tmp_path, run, hook):
    settings, whole, saver = RUNS[run], Recorder(), SaveAt(tmp_path, [hook])
    fit(whole, data(), [saver], **settings)
    assert bool(saver.written) == (hook != "validation" or "limit_val_batches" not in settings)
    for steps, path in saver.written:
        resumed = Recorder()
        fit(resumed, data(), ckpt_path=path, **settings)
        expected = whole.seen[steps:]
        if hook == "epoch_start" and settings["max_steps"] == -1 and steps:
            # Lightning takes the epoch that begins for a finished one, so that training ends an epoch early
            expected = expected[: len(resumed.seen)]
        assert resumed.seen == expected, f"{path.stem} of {len(whole.seen)} steps"


def test_whole_epochs_are_permutations():
    module = Recorder()
    fit(module, data())
    assert len(module.seen) == 17
    epochs = [module.seen[start : start + PER_EPOCH] for start in range(0, 15, PER_EPOCH)]
    assert all(len({n for batch in epoch for n in batch}) == PER_EPOCH * BATCH for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("step", [1, 4, 5, 6, 13])
def test_resume_with_loader_processes(tmp_path, step):
    whole, saver = Recorder(), SaveAt(tmp_path, ["batch"])
    fit(whole, data(workers=2), [saver])
    resumed = Recorder()
    fit(resumed, data(workers=2), ckpt_path=tmp_path / f"batch-{step}.ckpt")
    assert resumed.seen == whole.seen[step:]


def test_loader_processes_change_nothing():
    seen, states = [], []
    for workers in (0, 2):
        torch.manual_seed(0)
        module = Recorder()
        fit(module, data(workers))
        seen.append(module.seen)
        states.append(torch.get_rng_state())
    assert seen[0] == seen[1] and torch.equal(*states), "neither the order nor the draws of a model"


def test_resume_of_a_resumed_run(tmp_path):
    whole = Recorder()
    fit(whole, data())
    seen, path = [], None
    for number, steps in enumerate((2, 5, 9, 10, 17)):
        part = Recorder()
        trainer = fit(part, data(), ckpt_path=path, max_steps=steps)
        path = tmp_path / f"{number}.ckpt"
        trainer.save_checkpoint(path)  # after the end of fit, as a run does
        seen += part.seen
    assert seen == whole.seen


class Bomb(Callback):
    """Raises in the middle of a step, and saves as a checkpoint callback with save_on_exception does."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_before_zero_grad(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("bomb")

    def on_exception(self, trainer, *_):
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [3, 5])
def test_a_batch_that_an_exception_cut_short_is_served_again(tmp_path, step):
    whole = Recorder()
    fit(whole, data())
    path = tmp_path / "exception.ckpt"
    with pytest.raises(RuntimeError, match="bomb"):
        fit(Recorder(), data(), [Bomb(step, path)])
    resumed = Recorder()
    fit(resumed, data(), ckpt_path=path)
    assert resumed.seen == whole.seen[step:]


def test_a_second_fit_without_checkpoint_starts_anew(tmp_path):
    whole, module, reused = Recorder(), Recorder(), data()
    fit(whole, data())
    fit(module, reused, [SaveAt(tmp_path, ["batch"])], max_steps=7)
    fit(Recorder(), reused, ckpt_path=tmp_path / "batch-6.ckpt", max_steps=8)
    again = Recorder()
    fit(again, reused)
    assert again.seen == whole.seen


@pytest.mark.parametrize("change", [{"seed": 2}, {"batch": 4}])
def test_a_position_of_another_order_is_refused(tmp_path, change):
    fit(Recorder(), data(), [SaveAt(tmp_path, ["batch"])], max_steps=2)
    other = data(seed=change.get("seed", 1))
    other.batch_size = change.get("batch", BATCH)
    with pytest.raises(CheckpointError, match=r"written with (seed 1|global batch size 8), this run has"):
        fit(Recorder(), other, ckpt_path=tmp_path / "batch-1.ckpt")
