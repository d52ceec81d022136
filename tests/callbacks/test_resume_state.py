import random

import numpy as np
import torch

from forked import run_forked
from tessera.callbacks import ResumeState
from tessera.callbacks.resume_state import rng_state, set_rng_state


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


def test_a_checkpoint_during_validation_holds_the_state_before_it():
    callback, checkpoint = ResumeState(), {}
    callback.on_validation_start(None, None)
    draws()
    callback.on_save_checkpoint(None, None, checkpoint)
    callback.on_validation_end(None, None)
    expected = draws()
    resume(checkpoint)
    assert draws() == expected


def resume(checkpoint):
    callback = ResumeState()
    callback.on_load_checkpoint(None, None, checkpoint)
    draws()  # what setting up draws is undone
    callback.on_train_batch_start(None, None, None, 0)
    return callback


def _own_state_on_rank(rank, world):
    torch.manual_seed(rank)
    checkpoint = {}
    ResumeState().on_save_checkpoint(None, None, checkpoint)
    expected = draws()
    resume(checkpoint)
    return len(checkpoint["rng_states"]), expected[0], draws() == expected


def test_each_process_gets_its_own_state_back():
    (count, first, same), (_, second, also) = run_forked(_own_state_on_rank)
    assert count == 2 and same and also and first != second


def test_restored_once():
    checkpoint = {}
    ResumeState().on_save_checkpoint(None, None, checkpoint)
    callback, first = resume(checkpoint), draws()
    callback.on_train_batch_start(None, None, None, 1)
    assert draws() != first


def test_another_number_of_processes_is_said(caplog):
    checkpoint = {"rng_states": [rng_state(), rng_state()]}
    state = rng_state()
    callback = ResumeState()
    callback.on_load_checkpoint(None, None, checkpoint)
    callback.on_train_batch_start(None, None, None, 0)
    assert "states of 2 processes" in caplog.text and torch.equal(rng_state()["torch"], state["torch"])
