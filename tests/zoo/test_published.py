"""Published tokenizers of IBQ, TiTok, MaskGIT-VQGAN and VAR at full size: every key, every shape, every count."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tessera.tokenizers import Tokenizer
from tessera.zoo import ibq, maskgit, titok, var
from tessera.zoo.export import build
from tessera.zoo.keys import key_problems, rename

FOLDER = Path(__file__).parent / "published"
ROWS = {
    (path.stem, name): row
    for path in sorted(FOLDER.glob("*.json"))
    if not path.stem.endswith("_generator")
    if not path.stem.endswith("_generator")  # theirs is a test of its own
    for name, row in json.loads(path.read_text()).items()
}


def published_shapes(family: str, name: str) -> dict[str, list[int]]:
    row = ROWS[family, name]
    base = published_shapes(family, row["same_state_dict_as"]) if "same_state_dict_as" in row else row["state_dict"]
    return {**base, **row.get("shape_overrides", {})}


def meta_state(family: str, name: str) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in published_shapes(family, name).items()}


def built(family: str, name: str) -> tuple[Tokenizer, dict[str, Tensor]]:
    """Our tokenizer on the meta device, and the published weights under our names."""
    config: dict[str, Any] = ROWS[family, name]["config"]
    state = meta_state(family, name)
    with torch.device("meta"):
        if family == "ibq":
            return build(ibq.architecture(config), name), rename(ibq.public_weights(state), ibq.rules(5))
        if family == "var":
            return build(var.architecture(config), name), var.renamed(state, 5)
        if name.startswith("maskgit"):
            return build(maskgit.architecture(config), name), rename(state, maskgit.rules(5))
        tokenizer = build(titok.architecture(config), name)
        return tokenizer, titok.renamed(tokenizer, state)


def test_the_lists_are_there():
    assert {family: sum(f == family for f, _ in ROWS) for family, _ in ROWS} == {"ibq": 6, "titok": 10, "var": 1}


@pytest.mark.parametrize(("family", "name"), ROWS)
def test_keys_shapes_and_count(family, name):
    tokenizer, state = built(family, name)
    assert key_problems(tokenizer.state_dict(), state) == []
    count = sum(p.numel() for p in tokenizer.parameters())
    assert round(count / 1e6, 3) == ROWS[family, name]["params_millions"]


def test_a_changed_list_is_noticed():
    tokenizer, state = built("ibq", "ibq-tokenizer-1024")
    state["encoder.conv_blocks.0.res.4.conv1.weight"] = state.pop("encoder.conv_blocks.0.res.3.conv1.weight")
    assert len(key_problems(tokenizer.state_dict(), state)) == 2
