import json

import pytest
import torch
from torch import nn

from golden_cases import assert_close, golden
from tessera.errors import ConfigError
from tessera.optim import ConstantSchedule, CosineSchedule, LinearSchedule, decay_groups, decayed_names
from tessera.optim.schedules import cosine_lr


@pytest.mark.golden
@pytest.mark.parametrize("case", ["rar_forward"])
def test_published_learning_rate(case):
    data = golden(case)
    lr = data.config["lr"]
    for step, expected in zip(data.input["lr_steps"].tolist(), data.output["lr"], strict=True):
        actual = cosine_lr(step, lr["base"], lr["warmup"], lr["total"], lr["end"])
        assert_close(torch.tensor(actual), expected, atol=1e-9, rtol=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["rar_forward"])
def test_published_decay_groups(case):
    data = golden(case)
    tree = nn.Module()
    for name, value in data.weights.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        node.register_parameter(leaf, nn.Parameter(value.clone()))
    decayed = decayed_names(tree, "public")
    assert decayed == set(json.loads(data.metadata["weight_decay"]))
    assert set(data.weights) - decayed == set(json.loads(data.metadata["no_weight_decay"]))


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
        ({"warmup_steps": -1}, r"must not be negative"),
        ({"warmup_steps": 1, "warmup_fraction": 0.1}, "not both"),
    ],
)
def test_impossible_schedules(arguments, match):
    with pytest.raises(ConfigError, match=match):
        rates(CosineSchedule(**arguments))


def test_decay_groups_cover_every_trainable_parameter_once():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 2), nn.Embedding(3, 2))
    module[2].bias.requires_grad_(False)
    assert decayed_names(module) == {"0.weight", "2.weight"}
    groups = decay_groups(module, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    assert len(decay_groups(module, 0.1, "all")) == 1
    with pytest.raises(ConfigError, match=r"decay_rule='none'"):
        decay_groups(module, 0.1, "none")
