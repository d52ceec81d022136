from functools import partial

import pytest
import torch
from torch import nn

from golden_cases import assert_close, golden
from tessera.errors import ConfigError
from tessera.optim import (
    ConstantSchedule,
    CosineSchedule,
    DropSchedule,
    EpochCosineSchedule,
    HeldSchedule,
    LinearSchedule,
)
from tessera.optim.schedules import cosine_lr, epoch_cosine_lr


@pytest.mark.golden
@pytest.mark.parametrize("case", ["rar_forward"])
def test_published_learning_rate(case):
    data = golden(case)
    lr = data.config["lr"]
    for step, expected in zip(data.input["lr_steps"].tolist(), data.output["lr"], strict=True):
        actual = cosine_lr(step, lr["base"], lr["warmup"], lr["total"], lr["end"])
        assert_close(torch.tensor(actual), expected, atol=1e-9, rtol=1e-5)


def course(schedule, total, lr, weight_decay=0.0):
    """Rates and weight decays of all steps of a training, of a group with and one without weight decay."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "weight_decay": decay} for decay in (weight_decay, 0.0)]
    optimizer = torch.optim.SGD(groups, lr=lr)
    scheduler, found = schedule(optimizer, total), []
    for _ in range(total):
        found.append([optimizer.param_groups[0]["lr"], *(group["weight_decay"] for group in optimizer.param_groups)])
        optimizer.step()
        scheduler.step()
    return torch.tensor(found, dtype=torch.float64).unbind(1)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_lr_schedule"])
def test_published_rates_per_epoch(case):
    data = golden(case)
    options, steps = data.config, 3  # per epoch
    scale, epochs, start = options["global_batch_size"] / 128, options["epochs"], options["disc_epoch_start"]
    start = min(start, epochs - 1)
    left, rates = epochs - start, (options["lr"] * scale, options["disc_lr"] * scale)
    recorded = data.output["lr_gen"].double(), data.output["lr_disc"][start:].double()
    for lr, length, warmup, expected in zip(rates, (epochs, left), (1, int(0.02 * epochs)), recorded, strict=True):
        ours = [epoch_cosine_lr(epoch, lr, warmup, length, 5e-5, 1e-5) for epoch in range(len(expected))]
        assert_close(1e4 * torch.tensor(ours, dtype=torch.float64), expected, atol=1e-6)
        if lr < 5e-5 or warmup > length:  # a decay that would raise the rate, and no decay at all: ours refuses both
            continue
        schedule = EpochCosineSchedule(length, warmup, warmup_lr=1e-5, min_lr=5e-5)
        found, _, _ = course(schedule, steps * length, lr)
        assert_close(1e4 * found, expected.repeat_interleave(steps), atol=1e-6)
    # before its start the published discriminator waits at its first rate; ours does not run
    assert_close(data.output["lr_disc"][:start], data.output["lr_disc"][start].expand(start))


HELD = {
    "cos": {"shape": "cosine", "hold": 0.0},
    "lin": {"hold": 0.15},
    "lin0": {"hold": 0.05},
    "lin00": {"hold": 0.0},
    "exp": {"shape": "exponential", "hold": 0.15},
}


@pytest.mark.golden
@pytest.mark.parametrize("case", ["var_schedules"])
def test_published_rates_of_var(case):
    data = golden(case)
    for name, options in data.config["runs"].items():
        kind = options["sche"]
        schedule = HeldSchedule(
            **HELD.get(kind) or {"hold": 0.0, "knee": float(kind.removeprefix("lin"))},
            warmup_factor=options["wp0"],
            warmup_steps=options["wp_it"],
            end_factor=options["wpe"],
            end_weight_decay=options["wd_end"],
        )
        found = course(schedule, options["max_it"], options["peak_lr"], options["wd"])
        assert_close(found[0], data.output[f"{name}/lr"], atol=0, rtol=1e-12)
        assert_close(found[1], data.output[f"{name}/wd"], atol=0, rtol=1e-12)
        assert (found[2] == 0).all()


@pytest.mark.golden
@pytest.mark.parametrize("case", ["ibq_schedules"])
def test_published_rates_of_ibq(case):
    data, close = golden(case), {"atol": 1e-12, "rtol": 2e-6}
    for name, options in data.config["ar"].items():
        lr, decay = options["lr"], options["weight_decay"]
        schedule = HeldSchedule(
            warmup_factor=options["wp0"],
            warmup_steps=round(options["wp"] * options["iters_per_epoch"]),
            end_factor=options["wpe"],
            end_weight_decay=options["twde"] or decay,
        )
        found = course(schedule, options["max_epochs"] * options["iters_per_epoch"], lr, decay)
        assert_close(found[0], data.output[f"ar/{name}/lr"].double(), **close)
        assert_close(found[1], data.output[f"ar/{name}/wd_decay_group"].double(), **close)
        assert (found[2] == 0).all()  # where the published code decays both groups alike
        assert_close(found[1], data.output[f"ar/{name}/wd_nodecay_group"].double(), **close)
    for name, options in data.config["pretrain"].items():
        lr, total, warmup = options["lr"], options["max_iter"], options["wp_iter"]
        schedule = HeldSchedule(
            **HELD[options["sche_type"]], warmup_factor=options["wp0"], warmup_steps=warmup, end_factor=options["wpe"]
        )
        assert_close(course(schedule, total, lr)[0], data.output[f"pretrain/{name}/lr"].double(), **close)
    steps = 3  # per epoch
    for name, options in data.config["tokenizer"].items():
        epochs = options["max_epochs"]
        drops = [epoch for epoch in options["lr_drop_epoch"] if epoch <= epochs]
        expected = data.output[f"tokenizer/{name}/lr_during_epoch"].double().repeat_interleave(steps)
        for times in ({"drop_fractions": [e / epochs for e in drops]}, {"drop_steps": [steps * e for e in drops]}):
            schedule = DropSchedule(factor=options["lr_drop_rate"], **times)
            assert_close(course(schedule, steps * epochs, options["lr"])[0], expected, **close)
    for name, options in data.config["lambda"].items():
        expected = data.output[f"lambda/{name}/multiplier"].double()
        warmup, total = options["warmup"], options["max_steps"]
        kind = ConstantSchedule if options["kind"] == "linear-warmup" else CosineSchedule
        ours = course(kind(warmup_steps=warmup), total, 1.0)[0]
        assert_close(ours.clamp_min(options.get("mult_min", 0.0)).where(torch.arange(total) >= warmup, ours), expected)


def rates(schedule, total=10, lr=1.0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = schedule(optimizer, total)
    found = []
    for _ in range(total + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_by_step():
    assert rates(ConstantSchedule(warmup_steps=2))[:4] == [0.0, 0.5, 1.0, 1.0]
    linear = rates(LinearSchedule(warmup_fraction=0.5, min_lr=0.5))
    assert linear[5] == 1.0 and linear[10] == pytest.approx(0.5) and linear[7] == pytest.approx(0.8)
    cosine = rates(CosineSchedule(min_lr=0.1))
    assert cosine[0] == 1.0 and cosine[5] == pytest.approx(0.55) and cosine[10] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"min_lr": 2.0}, r"scheduler\.min_lr=2\.0 is above optimizer\.lr=1\.0"),
        ({"warmup_steps": 20}, r"warmup_steps=20 exceeds the 10 steps"),
        ({"warmup_steps": -1}, r"warmup_steps=-1.*must not be negative"),
        ({"warmup_fraction": 1.0}, r"warmup_fraction=1\.0 must be in \[0, 1\)"),
        ({"warmup_steps": 1, "warmup_fraction": 0.1}, "not both"),
    ],
)
def test_impossible_schedules(arguments, match):
    with pytest.raises(ConfigError, match=match):
        rates(CosineSchedule(**arguments))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: EpochCosineSchedule(0), r"scheduler\.epochs=0"),
        (lambda: EpochCosineSchedule(2, 3), r"scheduler\.warmup_epochs=3"),
        (lambda: HeldSchedule(hold=1.0), r"scheduler\.hold=1\.0"),
        (lambda: HeldSchedule(warmup_factor=-1.0), r"scheduler\.warmup_factor=-1\.0"),
        (lambda: HeldSchedule(end_factor=2.0), r"scheduler\.end_factor=2\.0"),
        (lambda: HeldSchedule("step"), r"scheduler\.shape='step'.*linear, cosine, exponential"),
        (lambda: HeldSchedule("cosine", knee=0.4), r"scheduler\.knee=0\.4.*shape=linear"),
        (lambda: HeldSchedule(knee=1.0), r"scheduler\.knee=1\.0 must be in \(0, 1\)"),
        (lambda: HeldSchedule("exponential", end_factor=0.0), r"scheduler\.end_factor=0"),
        (lambda: CosineSchedule(end_weight_decay=-1.0), r"scheduler\.end_weight_decay=-1\.0"),
        (lambda: DropSchedule(), r"one of scheduler\.drop_fractions and scheduler\.drop_steps"),
        (lambda: DropSchedule([0.5], [3]), "one of"),
        (lambda: DropSchedule([1.5]), r"scheduler\.drop_fractions=\[1\.5\]"),
        (lambda: DropSchedule(drop_steps=[-1]), r"scheduler\.drop_steps=\[-1\]"),
        (lambda: DropSchedule([0.5], factor=2.0), r"scheduler\.factor=2\.0"),
    ],
)
def test_impossible_settings(build, match):
    with pytest.raises(ConfigError, match=match):
        build()


def test_epochs_that_steps_do_not_fill():
    found = rates(EpochCosineSchedule(3, 1, warmup_lr=0.5), total=10)
    assert found[:4] == [0.5] * 4 and len(set(found[:10])) == 3  # 4 + 3 + 3 steps


@pytest.mark.parametrize(
    "schedule",
    [ConstantSchedule, CosineSchedule, LinearSchedule, HeldSchedule, partial(DropSchedule, [0.4])],
)
def test_a_schedule_continues_from_its_step_alone(schedule):
    whole = rates(schedule(warmup_steps=3), total=12)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    first = schedule(warmup_steps=3)(optimizer, 12)
    for _ in range(5):
        optimizer.step()
        first.step()
    state = first.state_dict()
    again = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    second = schedule(warmup_steps=3)(again, 12)
    again.load_state_dict(optimizer.state_dict())
    second.load_state_dict(state)
    again.step()
    second.step()
    assert again.param_groups[0]["lr"] == whole[6]


def test_every_group_keeps_its_own_rate():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.1)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = CosineSchedule(warmup_steps=2, min_lr=0.05)(optimizer, 4)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])
