import json

import pytest
import torch
from torch import nn

from golden_cases import golden
from tessera.errors import ConfigError
from tessera.optim import decay_groups, decayed_names


def tree(weights):
    """A module with these parameters, by their dotted names."""
    root = nn.Module()
    for name, value in weights.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, nn.Module())
            node = node._modules[part]
        node.register_parameter(leaf, nn.Parameter(value.clone()))
    return root


@pytest.mark.golden
@pytest.mark.parametrize("case", ["rar_forward"])
def test_published_decay_groups(case):
    data = golden(case)
    decayed = decayed_names(tree(data.weights), "public")
    assert decayed == set(json.loads(data.metadata["weight_decay"]))
    assert set(data.weights) - decayed == set(json.loads(data.metadata["no_weight_decay"]))


@pytest.mark.golden
@pytest.mark.parametrize("case", ["var_p1_train"])
def test_published_decay_groups_of_var(case):
    data = golden(case)
    final = {name.removeprefix("final/"): v for name, v in data.output.items() if name.startswith("final/")}
    assert set(final) - decayed_names(tree(final), "var") == set(data.config["no_decay"])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("matrix", {"scale_mul_1H11", "head.weight", "head.bias", "norm.gamma"}),
        ("var", {"head.weight"}),
        ("public", {"scale_mul_1H11", "head.weight"}),
        ("all", {"scale_mul_1H11", "head.weight", "head.bias", "norm.gamma", "norm.beta"}),
    ],
)
def test_rules_by_shape_and_name(rule, expected):
    shapes = {"scale_mul_1H11": (1, 2, 1, 1), "head.weight": (2, 3), "head.bias": (2, 1), "norm.gamma": (1, 3)}
    assert decayed_names(tree({n: torch.zeros(s) for n, s in {**shapes, "norm.beta": (3,)}.items()}), rule) == expected


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


def test_raw_parameters_are_not_decayed_by_the_explicit_rule():
    module = nn.Module()
    module.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    module.inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert decayed_names(module) == {"inner.0.weight"}
    assert decayed_names(module, "public") == {"cls_token", "inner.0.weight"}
    assert decayed_names(module.inner[0]) == {"weight"}
