"""EMA, random-number states and the last checkpoint."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from stage_setup import data, standard_callbacks, tokenizer_stage, trainer
from torch import nn

from tessera.callbacks import EMA, LastCheckpoint, ResumeState
from tessera.callbacks.ema import ema_weights
from tessera.callbacks.resume_state import rng_state, set_rng_state
from tessera.errors import ConfigError


class FakeTrainer:
    def __init__(self, max_steps=10):
        self.global_step, self.max_steps = 0, max_steps


class FakeStage:
    def __init__(self):
        self.part = nn.BatchNorm1d(1)

    def averaged_modules(self):
        return {"part": self.part}


def averaged(callback, weights):
    """The average after each of the given weights."""
    fake, stage, found = FakeTrainer(), FakeStage(), []
    with torch.no_grad():
        stage.part.weight.fill_(weights[0])
    callback.on_fit_start(fake, stage)
    for step, value in enumerate(weights[1:], start=1):
        with torch.no_grad():
            stage.part.weight.fill_(value)
        stage.part.num_batches_tracked += 7
        for fake.global_step in (step, step):  # the second batch of the same step changes nothing
            callback.on_train_batch_end(fake, stage, None, None, 0)
        found.append(callback.averaged_state_dict()["part"]["weight"].item())
    return found, stage, fake


def test_average_by_hand():
    found, stage, fake = averaged(EMA(decay=0.5), [0.0, 8.0, 8.0, 0.0])
    assert found == [4.0, 6.0, 3.0]
    callback = EMA(decay=0.5, every_n_steps=2)
    assert averaged(callback, [0.0, 8.0, 8.0, 0.0])[0] == [0.0, 4.0, 4.0]
    # integer buffers are copied, not averaged
    assert callback.averaged_state_dict()["part"]["num_batches_tracked"] == 14


def test_swapping_restores_exactly_even_after_an_error():
    callback = EMA(decay=0.9)
    _, stage, fake = averaged(callback, [0.0, 0.3, 0.7])
    raw = stage.part.weight.clone()
    with pytest.raises(KeyError), callback.averaged(stage):
        assert not torch.equal(stage.part.weight, raw)
        raise KeyError
    assert torch.equal(stage.part.weight, raw)
    callback.on_validation_start(fake, stage)
    with pytest.raises(RuntimeError, match="averaged weights"):
        callback.on_save_checkpoint(fake, stage, {})
    callback.on_exception(fake, stage, KeyError())
    assert torch.equal(stage.part.weight, raw)


def test_half_life():
    assert EMA(half_life_steps=10).decay_for(100) == pytest.approx(0.5**0.1)
    assert EMA(half_life_fraction=0.1).decay_for(100) == pytest.approx(0.5**0.1)
    assert EMA(half_life_steps=10, every_n_steps=5).decay_for(100) == pytest.approx(0.5**0.5)
    for wrong in ({}, {"decay": 0.9, "half_life_steps": 3}, {"decay": 1.0}, {"half_life_steps": 0}):
        with pytest.raises(ConfigError, match=r"callbacks\.ema"):
            EMA(**wrong)


def test_averages_travel_in_checkpoints():
    callback = EMA(decay=0.5)
    _, stage, fake = averaged(callback, [0.0, 8.0])
    checkpoint = {}
    callback.on_save_checkpoint(fake, stage, checkpoint)
    assert ema_weights(checkpoint)["part"]["weight"].item() == 4.0 and ema_weights({}) is None
    other = EMA(decay=0.5)
    other.on_load_checkpoint(fake, stage, checkpoint)
    other.on_fit_start(fake, stage)
    assert other.averaged_state_dict()["part"]["weight"].item() == 4.0


def draws():
    return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()


def test_random_number_states_round_trip(tmp_path):
    random.gauss(0, 1)
    torch.save(rng_state(), tmp_path / "state")
    expected = draws()
    draws()
    set_rng_state(torch.load(tmp_path / "state", weights_only=True))
    assert draws() == expected


def test_validation_leaves_no_trace():
    callback = ResumeState()
    state = rng_state()
    expected = draws()
    set_rng_state(state)
    callback.on_validation_start(None, None)
    draws()
    callback.on_validation_end(None, None)
    assert draws() == expected


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


def test_checkpoints_by_steps_and_at_the_end(tmp_path, monkeypatch):
    steps = []
    stage = tokenizer_stage(discriminator=None)
    fit = trainer(tmp_path, 7, [LastCheckpoint(tmp_path, every_n_steps=3)], enable_checkpointing=True)
    save = fit.save_checkpoint
    fit.save_checkpoint = lambda path: (steps.append(fit.global_step), save(path))
    fit.fit(stage, data("images", None))
    assert steps == [3, 6, 7]
    with pytest.raises(ConfigError, match="every_n_steps"):
        LastCheckpoint(tmp_path, every_n_steps=0)
