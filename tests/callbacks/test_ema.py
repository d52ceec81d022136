import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from forked import run_forked
from golden_cases import assert_close, golden
from stage_setup import data, generator_stage, tokenizer_stage, trainer
from tessera.callbacks import EMA, ema
from tessera.callbacks.ema import average, ema_weights, warmed_decay
from tessera.errors import ConfigError
from tessera.zoo import ibq


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


def test_one_update_per_optimizer_step_also_after_resuming_with_accumulation(tmp_path, monkeypatch):
    def fit(max_steps, ckpt_path=None):
        fitted, steps = trainer(tmp_path, max_steps, [EMA(decay=0.9)]), []
        monkeypatch.setattr(ema, "average", lambda *_: steps.append(fitted.global_step))
        stage = generator_stage(accumulate_grad_batches=3)
        fitted.fit(stage, data("tokens", tmp_path, batch_size=16), ckpt_path=ckpt_path, weights_only=True)
        return steps, fitted

    first, fitted = fit(2)
    assert first == [1, 2]
    fitted.save_checkpoint(tmp_path / "a.ckpt")
    # the first two batches after resuming only accumulate
    assert fit(4, tmp_path / "a.ckpt")[0] == [3, 4]


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


def test_the_decay_rises_with_warmup_and_the_same_after_resuming():
    expected, shadow = [], 0.0
    for update, weight in enumerate([8.0, 3.0, 5.0], start=1):
        decay = min(0.25, (1 + update) / (10 + update))
        shadow = decay * shadow + (1 - decay) * weight
        expected.append(shadow)
    weights = [0.0, 8.0, 3.0, 5.0]
    assert averaged(EMA(decay=0.25, warmup=True), weights)[0] == pytest.approx(expected)
    assert averaged(EMA(decay=0.25, warmup=True, warmup_delay=1), weights)[0][0] == 8.0
    callback = EMA(decay=0.9, warmup=True)
    callback.averages = {"part": nn.BatchNorm1d(1)}
    callback.full_decay, callback.last_step = 0.9, 4
    fake, stage = FakeTrainer(), FakeStage()
    with torch.no_grad():
        stage.part.weight.fill_(3.0)
    fake.global_step = 5
    callback.on_train_batch_end(fake, stage, None, None, 0)
    assert callback.averages["part"].weight.item() == pytest.approx(6 / 15 * 1 + 9 / 15 * 3)
    for wrong in ({"warmup_delay": 1}, {"warmup": True, "warmup_delay": -1}):
        with pytest.raises(ConfigError, match=r"callbacks\.ema\.warmup_delay"):
            EMA(decay=0.9, **wrong)


def named_parameters(values):
    """A module with parameters of given dotted names."""
    module = nn.Module()
    for name, value in values.items():
        *path, last = name.split(".")
        node = module
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, nn.Module())
            node = getattr(node, part)
        node.register_parameter(last, nn.Parameter(value.clone()))
    return module


@pytest.mark.golden
@pytest.mark.parametrize("case", ["titok_ema"])
def test_published_average_of_titok(case):
    file = golden(case)
    live, shadow = named_parameters(file.weights), named_parameters(file.weights)
    if "frozen" in file.weights:
        live.frozen.requires_grad_(False)
    decay = file.config["decay"]
    for step in range(file.config["steps"]):
        with torch.no_grad():
            for name, parameter in live.named_parameters():
                parameter.copy_(file.input[f"param_{name}"][step])
        used = warmed_decay(step + 1 - 1, decay)  # the first copies
        assert_close(torch.tensor(used), file.output["decay_used"][step], atol=1e-6)
        average(shadow, live, used)
    for name, parameter in shadow.named_parameters():
        assert_close(parameter.detach(), file.output[f"shadow/{name}"], atol=1e-6)
    found = [warmed_decay(step - 1, decay) for step in file.input["probe_steps"].tolist()]
    assert_close(torch.tensor(found), file.output["decay_at"], atol=1e-6)


def below(tensors, prefix):
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.mark.golden
@pytest.mark.parametrize("case", ["ibq_ema"])
def test_published_average_of_ibq(case):
    """Shadows by step, and which weights the zoo takes out of such a checkpoint."""
    file = golden(case)
    start = {name: value for name, value in below(file.input, "params_step0/").items() if "perceptual" not in name}
    live, shadow = named_parameters(start), named_parameters(start)
    for update in range(1, file.config["n_updates"] + 1):
        weights = below(file.input, f"params_step{update}/")
        with torch.no_grad():
            for name, parameter in live.named_parameters():
                parameter.copy_(weights[name])
        decay = file.config["decay"]
        average(shadow, live, warmed_decay(update, decay) if file.config["use_num_updates"] else decay)
        for name, parameter in shadow.named_parameters():
            expected = file.output[f"ema_step{update}/{name.replace('.', '')}"]
            assert_close(parameter.detach(), expected, atol=1e-6)
        recorded = below(file.output, f"ema_step{update}/")
        assert set(recorded) == {name.replace(".", "") for name in start} | {"decay", "num_updates"}
        assert_close(torch.tensor(file.config["decay"]), recorded["decay"], atol=1e-7)
        count = recorded["num_updates"].item()
        assert count == (update if file.config["use_num_updates"] else -1)
    checkpoint = below(file.output, "checkpoint/")
    last = {**weights, **{f"model_ema.{name}": value for name, value in recorded.items()}}
    assert set(checkpoint) == set(last)
    assert all(torch.equal(checkpoint[name], value) for name, value in last.items())
    for weights, stage in (("ema", "transformer_stage_ema/"), ("live", "transformer_stage_no_ema/")):
        taken, expected = ibq.public_weights(checkpoint, weights), below(file.output, stage)
        assert set(taken) == set(expected)
        assert all(torch.equal(value, expected[name]) for name, value in taken.items())
    copied = {**last, **dict(shadow.named_parameters())}  # parameters without gradient have no shadow
    for name, value in below(file.output, "copy_to/").items():
        assert_close(copied[name].detach(), value, atol=1e-6)
