import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from forked import run_forked
from stage_setup import data, standard_callbacks, tokenizer_stage, trainer
from tessera.callbacks import LastCheckpoint
from tessera.errors import ConfigError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_restores_the_handlers(tmp_path, number):
    before = signal.getsignal(number)
    stage, last = tokenizer_stage(discriminator=None), LastCheckpoint(tmp_path)

    def send(batch, batch_index, **_):
        if stage.trainer.global_step == 2:
            os.kill(os.getpid(), number)

    stage.on_train_batch_start = send
    fit = trainer(tmp_path, 20, [last, *standard_callbacks()], enable_checkpointing=True)
    fit.fit(stage, data("images", None))
    assert last.stopped_by == signal.Signals(number).name and fit.global_step == 3
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3 and "ema" in checkpoint and "rng_states" in checkpoint
    assert signal.getsignal(number) == before


def saved_steps(fit, stage):
    """Global steps of the checkpoints of a fit."""
    steps, save = [], fit.save_checkpoint
    fit.save_checkpoint = lambda path: (steps.append(fit.global_step), save(path))
    fit.fit(stage, data("images", None, batch_size=128))
    return steps


def test_checkpoints_by_steps_and_at_the_end(tmp_path):
    stage = tokenizer_stage(discriminator=None)
    fit = trainer(tmp_path, 7, [LastCheckpoint(tmp_path, every_n_steps=3)], enable_checkpointing=True)
    assert saved_steps(fit, stage) == [3, 6, 7]
    with pytest.raises(ConfigError, match="every_n_steps"):
        LastCheckpoint(tmp_path, every_n_steps=0)


def test_a_training_that_ends_by_epochs_or_by_another_callback_leaves_its_last_step(tmp_path):
    # an epoch has 11 batches of 128
    fit = trainer(tmp_path, -1, [LastCheckpoint(tmp_path)], max_epochs=1, enable_checkpointing=True)
    assert saved_steps(fit, tokenizer_stage(discriminator=None)) == [11]
    stage = tokenizer_stage(discriminator=None)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            trainer.should_stop = trainer.global_step == 4

    fit = trainer(tmp_path, 20, [Stop(), LastCheckpoint(tmp_path)], enable_checkpointing=True)
    assert saved_steps(fit, stage) == [4]


def test_the_second_signal_stops_at_once(tmp_path):
    last = LastCheckpoint(tmp_path)
    last._handle(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        last._handle(signal.SIGINT, None)


def test_outside_of_the_main_thread_signals_are_left_alone(tmp_path):
    before, last = signal.getsignal(signal.SIGINT), LastCheckpoint(tmp_path)
    thread = threading.Thread(target=last.on_train_start, args=(SimpleNamespace(global_step=0), None))
    thread.start()
    thread.join()
    last.on_train_end(None, None)
    assert signal.getsignal(signal.SIGINT) is before


def _stopped_at(rank, world):
    """Steps of the checkpoint when one process is signalled at step 7, in epochs shorter than the checks."""
    saved = []
    last = LastCheckpoint("unused", every_n_steps=1000, check_every_batches=4)
    fake = SimpleNamespace(
        global_step=0,
        max_steps=100,
        should_stop=False,
        is_last_batch=False,
        save_checkpoint=lambda _: saved.append(step),
    )
    last.on_train_start(fake, None)
    for step in range(1, 25):
        if rank == 1 and step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        fake.global_step = step
        last.on_train_batch_end(fake, SimpleNamespace(device=torch.device("cpu")), None, None, (step - 1) % 3)
        if fake.should_stop:
            break
    last.on_train_end(fake, None)
    return saved, last.stopped_by


def test_processes_agree_on_the_batch_to_stop_at():
    assert run_forked(_stopped_at) == [([8], "SIGTERM")] * 2
