"""What early stopping decides from a series of values; whole trainings are in tests/run/test_post_train.py."""

from types import SimpleNamespace

import pytest
import torch

from stage_setup import post_training_stage
from tessera.callbacks import EarlyStopping
from tessera.callbacks.ema import ema_weights
from tessera.errors import ConfigError
from tessera.metrics.protocol import Figure, Protocol


class Scripted:
    """Measures given values; other figures come along."""

    tokens, prefix = "tokens.safetensors", "val"

    def __init__(self, values=()):
        self.values = list(values)

    def begin(self, trainer, pl_module):
        assert not any(module.training for module in pl_module.modules())

    def finish(self, trainer, pl_module):
        protocol = Protocol(extractor="tiny", samples=2)
        return [Figure("IS", 1.0, protocol), Figure("gFID", self.values.pop(0), protocol)]


class Course:
    """A training whose last layer holds the step."""

    def __init__(self, values, steps, **settings):
        self.stage = post_training_stage(discriminator=None)
        self.stage.train()
        self.logged = []
        logger = SimpleNamespace(log_metrics=lambda values, step: self.logged.append((step, values)))
        self.trainer = SimpleNamespace(
            global_step=0, max_steps=steps, callbacks=[], loggers=[logger], should_stop=False
        )
        self.callback = EarlyStopping(Scripted(values), **settings)

    def run(self):
        self.callback.on_train_start(self.trainer, self.stage)
        while self.trainer.global_step < self.trainer.max_steps and not self.trainer.should_stop:
            self.trainer.global_step += 1
            with torch.no_grad():
                self.stage.tokenizer.last_layer.fill_(self.trainer.global_step)
            for _ in range(2):  # a second batch of the same step changes nothing
                self.callback.on_train_batch_end(self.trainer, self.stage, None, None, 0)
        return self


@pytest.mark.parametrize(
    ("values", "settings", "stops", "best"),
    [
        ((5, 4, 3, 3.5, 3, 9), {"patience": 2}, 8, 4),
        ((5, 6, 4, 5, 3, 2), {"patience": 2}, 9, 9),  # the last step is measured, too
        ((5, 4.95, 4.8, 4.75, 4.72), {"patience": 2, "min_delta": 0.1}, 8, 4),
        ((5, 4.95, 4.92), {"patience": 2, "min_delta": 0.1}, 4, 0),
        ((5, float("nan"), float("nan")), {"patience": 2}, 4, 0),
    ],
)
def test_the_best_is_published(values, settings, stops, best):
    course = Course(values, 9, every_n_steps=2, **settings).run()
    assert course.trainer.global_step == stops and course.callback.published["step"] == best
    checkpoint = {}
    course.callback.on_save_checkpoint(course.trainer, course.stage, checkpoint)
    published = ema_weights({**checkpoint, "ema": {"tokenizer.decoder": {}}})
    (last,) = (value for key, value in published["tokenizer.decoder"].items() if key.endswith("conv_out.weight"))
    assert (last == best).all() if best else not (last == last.flatten()[0]).all()
    assert all(module.training for module in course.stage.tokenizer.decoder.modules())
    assert not any(module.training for part in course.stage.frozen_parts() for module in part.modules())
    assert [step for step, _ in course.logged] == [*range(0, stops, 2), stops]
    assert {key.partition("[")[0] for _, logged in course.logged for key in logged} == {"val/gfid", "val/is"}


def test_a_continued_training_decides_the_same():
    values = [5, 4, 3, 3.5, 3]
    whole = Course(values, 9, patience=2, every_n_steps=2).run()
    cut, checkpoint = Course(values[:3], 4, patience=2, every_n_steps=2).run(), {}
    cut.callback.on_save_checkpoint(cut.trainer, cut.stage, checkpoint)
    rest = Course(values[3:], 9, patience=2, every_n_steps=2)
    rest.callback.on_load_checkpoint(rest.trainer, rest.stage, checkpoint)
    rest.trainer.global_step = 4
    rest.run()
    assert rest.trainer.global_step == whole.trainer.global_step == 8
    assert rest.callback.published["step"] == whole.callback.published["step"] == 4
    # a training that had stopped takes no further step
    done, checkpoint = Course([], 9, patience=2, every_n_steps=2), {}
    rest.callback.on_save_checkpoint(rest.trainer, rest.stage, checkpoint)
    done.callback.on_load_checkpoint(done.trainer, done.stage, checkpoint)
    done.trainer.global_step = 8
    assert done.run().trainer.global_step == 8


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"patience": 0}, r"early_stopping\.patience=0 must be at least 1"),
        ({"every_n_steps": 0}, r"early_stopping\.every_n_steps=0"),
        ({"min_delta": -0.1}, r"early_stopping\.min_delta=-0\.1"),
    ],
)
def test_impossible_settings(settings, match):
    with pytest.raises(ConfigError, match=match):
        EarlyStopping(Scripted(), **{"patience": 1, "every_n_steps": 1, **settings})


def test_it_needs_fixed_tokens():
    gfid = Scripted()
    gfid.tokens = None
    with pytest.raises(ConfigError, match=r"fixed tokens of callbacks\.gfid\.tokens"):
        EarlyStopping(gfid, 1, 1)
