import json

import pytest
import torch
from torch import nn

from golden_cases import golden
from tessera.errors import ConfigError
from tessera.optim import decay_groups, decayed_names


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
