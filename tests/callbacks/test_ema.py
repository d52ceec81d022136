import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from forked import run_forked
from stage_setup import data, generator_stage, tokenizer_stage, trainer
from tessera.callbacks import EMA
from tessera.callbacks.ema import ema_weights
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
    callback.on_train_start(fake, stage)
    for step, value in enumerate(weights[1:], start=1):
        with torch.no_grad():
            stage.part.weight.fill_(value)
        stage.part.num_batches_tracked += 7
        for fake.global_step in (step, step):  # the second batch of the same step changes nothing
            callback.on_train_batch_end(fake, stage, None, None, 0)
        found.append(callback.averaged_state_dict()["part"]["weight"].item())
    return found, stage, fake


def test_average_by_hand():
    assert averaged(EMA(decay=0.5), [0.0, 8.0, 8.0, 0.0])[0] == [4.0, 6.0, 3.0]
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


class Updates(EMA):
    """Notes the global steps at which the averages move."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.steps = []

    def on_fit_start(self, trainer, pl_module):
        super().on_fit_start(trainer, pl_module)
        for averaged_model in self.averages.values():
            update = averaged_model.update_parameters
            averaged_model.update_parameters = lambda module, update=update: (
                self.steps.append(trainer.global_step),
                update(module),
            )


def test_one_update_per_optimizer_step_also_after_resuming_with_accumulation(tmp_path):
    def fit(max_steps, ckpt_path=None):
        callback = Updates(decay=0.9)
        fitted = trainer(tmp_path, max_steps, [callback])
        stage = generator_stage(accumulate_grad_batches=3)
        fitted.fit(stage, data("tokens", tmp_path, batch_size=16), ckpt_path=ckpt_path, weights_only=True)
        return callback, fitted

    first, fitted = fit(2)
    assert first.steps == [1, 2]
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    # the first two batches after resuming only accumulate
    assert fit(4, tmp_path / "a.ckpt")[0].steps == [3, 4]


def test_validation_sees_the_averages_and_training_the_weights(tmp_path):
    callback, seen = EMA(decay=0.9), []

    def weight(stage):
        return stage.tokenizer.quant_conv.weight.detach().clone()

    stage = tokenizer_stage(discriminator=None)
    validate, end = stage.validation_step, stage.on_train_batch_end
    stage.validation_step = lambda *arguments: (seen.append(("val", weight(stage))), validate(*arguments))[1]
    stage.on_train_batch_end = lambda *a: (seen.append(("raw", weight(stage))), end(*a))[1]
    settings = {"limit_val_batches": 1, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer(tmp_path, 4, [callback], **settings).fit(stage, data("images", None))
    assert [name for name, _ in seen] == ["raw"] * 4 + ["val"]
    (_, raw), (_, validated) = seen[-2:]
    average = callback.averaged_state_dict()["tokenizer"]["quant_conv.weight"]
    assert torch.equal(validated, average) and not torch.equal(raw, average)
    assert torch.equal(weight(stage), raw)


def test_an_error_in_validation_leaves_the_raw_weights(tmp_path):
    stage, raw = tokenizer_stage(discriminator=None), []

    def fail(*_):
        raise KeyError("broken metric")

    stage.validation_step = fail
    stage.on_train_batch_end = lambda *_: raw.append(stage.tokenizer.quant_conv.weight.detach().clone())
    settings = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    with pytest.raises(KeyError, match="broken metric"):
        trainer(tmp_path, 3, [EMA(decay=0.9)], **settings).fit(stage, data("images", None))
    assert torch.equal(stage.tokenizer.quant_conv.weight, raw[-1])


def _averages_on_rank(rank, world):
    stage, fake, callback = FakeStage(), FakeTrainer(), EMA(decay=0.5)
    stage.part = nn.Linear(2, 1)
    nn.init.ones_(stage.part.weight)
    model = DistributedDataParallel(stage.part)
    optimizer = torch.optim.SGD(stage.part.parameters(), lr=1.0)
    callback.on_fit_start(fake, stage)
    callback.on_train_start(fake, stage)
    for step in (1, 2):
        optimizer.zero_grad()
        model(torch.tensor([[2.0 * rank, 4.0]])).sum().backward()
        optimizer.step()
        fake.global_step = step
        callback.on_train_batch_end(fake, stage, None, None, step)
    return callback.averaged_state_dict()["part"]["weight"].tolist()


def test_averages_agree_over_processes():
    # the mean gradient is (1, 4): weights 1 -> (0, -3) -> (-1, -7), averages (0.5, -1) -> (-0.25, -4)
    assert run_forked(_averages_on_rank) == [[[-0.25, -4.0]]] * 2
