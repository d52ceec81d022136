"""What the publishers' checkpoints hold, by `published/<family>.json`: hyper-parameters, keys, shapes, counts.

Keys of layers that are alike are listed once: `blocks.[0-23].norm1.weight`.
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessera import zoo
from tessera.zoo import Checkpoint, from_public

FOLDER = Path(__file__).parent / "published"
FAMILIES = ("ibq", "rar", "robustok", "titok", "var", "xqgan")
Shapes = dict[str, list[int]]


@cache
def rows(family: str) -> dict[str, dict[str, Any]]:
    """The rows of a family by their published names."""
    return json.loads((FOLDER / f"{family}.json").read_text())


ROWS = [(family, name) for family in FAMILIES for name in rows(family)]


def expanded(listed: Mapping[str, list[int]]) -> Shapes:
    """Every key with its shape."""
    found: Shapes = {}
    for key, shape in listed.items():
        if alike := re.search(r"\[(\d+)-(\d+)\]", key):
            for i in range(int(alike[1]), int(alike[2]) + 1):
                found |= expanded({key[: alike.start()] + str(i) + key[alike.end() :]: shape})
        else:
            found[key] = shape
    return found


def shapes(family: str, name: str) -> Shapes:
    """Every published key of a row."""
    row = rows(family)[name]
    same = row.get("same_state_dict_as")
    base = expanded(row["state_dict"]) if same is None else shapes(family, same)
    return {**base, **row.get("shape_overrides", {})}


def meta_state(family: str, name: str) -> dict[str, Tensor]:
    """A row's published tensors on the meta device: shapes without values."""
    integers = set(rows(family)[name].get("int64_entries", ()))
    return {
        key: torch.empty(shape, device="meta", dtype=torch.int64 if key in integers else torch.float32)
        for key, shape in shapes(family, name).items()
    }


def published_model(family: str, name: str) -> nn.Module:
    """Our module of a row on the meta device: built from its hyper-parameters, and loaded strictly with its keys."""
    return from_public(family, rows(family)[name]["config"], meta_state(family, name))


def millions(model: nn.Module) -> float:
    """Parameters of a model, in millions, as published: with three decimals."""
    return round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 3)


def registered(family: str, name: str) -> Checkpoint:
    """The zoo's only entry of a row."""
    entries = map(zoo.info, zoo.names() + zoo.names("file"))
    found = [e for e in entries if (name if e.family == family else f"{family}: {name}") in e.published]
    assert len(found) == 1, f"{family} {name}: {[entry.name for entry in found]}"
    return found[0]
