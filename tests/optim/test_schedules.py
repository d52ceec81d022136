import pytest
import torch
from torch import nn

from golden_cases import assert_close, golden
from tessera.errors import ConfigError
from tessera.optim import ConstantSchedule, CosineSchedule, LinearSchedule
from tessera.optim.schedules import cosine_lr


@pytest.mark.golden
@pytest.mark.parametrize("case", ["rar_forward"])
def test_published_learning_rate(case):
    data = golden(case)
    lr = data.config["lr"]
    for step, expected in zip(data.input["lr_steps"].tolist(), data.output["lr"], strict=True):
        actual = cosine_lr(step, lr["base"], lr["warmup"], lr["total"], lr["end"])
        assert_close(torch.tensor(actual), expected, atol=1e-9, rtol=1e-5)


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


@pytest.mark.parametrize("schedule", [ConstantSchedule, CosineSchedule, LinearSchedule])
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
