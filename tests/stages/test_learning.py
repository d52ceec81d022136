"""Each stage learns one batch by heart, and its loss curve stays what it was."""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch

from stage_setup import STAGES, data, generator, generator_stage, post_training_stage, trainer

CURVES = Path(__file__).parent / "curves.json"


def one_batch(module):
    """A data module that serves its first samples over and over."""
    batches = module.train_batches
    module.train_batches = lambda: (batches()[0], module.batch_size)
    return module


def constant(optimizer, total):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


def course(tmp_path, build, serve, key, steps, lr, **changes):
    """First and last value of a loss on one batch."""
    stage = build(optimizer=partial(torch.optim.AdamW, lr=lr), scheduler=constant, **changes)
    values = []
    stage.on_train_batch_end = lambda *_: values.append(float(stage.trainer.callback_metrics[key]))
    trainer(tmp_path, steps).fit(stage, one_batch(data(serve, tmp_path, batch_size=16)))
    return values[0], values[-1]


def test_generator_overfits_one_batch(tmp_path):
    def run(lr):
        # always in raster order and with its label
        model = generator(dropout=0.0)
        model.order_anneal, model.class_dropout = (0.0, 0.0), 0.0
        return course(tmp_path, generator_stage, "tokens", "train/loss/total", 150, lr, generator=model)

    first, last = run(1e-2)
    assert first > 3.0 and last < 0.6
    assert run(0.0)[1] == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("source", ["tokens", "reencode"])
def test_post_training_overfits_one_batch(tmp_path, source):
    settings = {"discriminator": None, "clean_share": 0.0, "source": source}
    run = partial(course, tmp_path, post_training_stage, "pairs", "train/loss/reconstruction", 60, **settings)
    first, last = run(lr=3e-3)
    assert last < 0.3 * first
    assert run(lr=0.0)[1] == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("name", STAGES)
def test_loss_curves_stay(tmp_path, name):
    """A refactor changes no digit but by rounding, which differs between processors.

    Set TESSERA_UPDATE_CURVES=1 to store the curves anew after a change that is meant to move them.
    """
    build, serve = STAGES[name]
    stage = build(**({"discriminator_start": 0.5} if name == "tokenizer" else {}))
    curve = []

    def record(*_):
        metrics = stage.trainer.callback_metrics
        curve.append({key: float(value) for key, value in sorted(metrics.items()) if key.startswith("train/")})

    stage.on_train_batch_end = record
    trainer(tmp_path, 6).fit(stage, data(serve, tmp_path, batch_size=16))
    stored = json.loads(CURVES.read_text()) if CURVES.exists() else {}
    if os.environ.get("TESSERA_UPDATE_CURVES"):
        CURVES.write_text(json.dumps({**stored, name: curve}, indent=1) + "\n")
        return
    assert len(curve) == len(stored[name])
    for step, (found, expected) in enumerate(zip(curve, stored[name], strict=True)):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4), step
