"""Loads golden files: tensors of the published modules with the options that made them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

DEFAULT_FOLDER = Path(__file__).parent / "golden"


@dataclass
class Golden:
    """One golden file: `weights`, `input`, `output` by name, `config` (parsed) and all metadata."""

    weights: dict[str, Tensor]
    input: dict[str, Tensor]
    output: dict[str, Tensor]
    config: Any
    metadata: dict[str, str]


def golden(stem: str) -> Golden:
    """Read `<stem>.safetensors` from tests/golden, or from the folder in TESSERA_GOLDEN_DIR."""
    folder = Path(os.environ.get("TESSERA_GOLDEN_DIR") or DEFAULT_FOLDER)
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "input": {}, "output": {}}
    with safe_open(folder / f"{stem}.safetensors", framework="pt") as file:
        metadata = file.metadata()
        for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
            part, name = key.split("/", 1)
            parts[part][name] = file.get_tensor(key)
    return Golden(**parts, config=json.loads(metadata.get("config", "{}")), metadata=metadata)


def assert_close(actual: Tensor, expected: Tensor, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    """`torch.testing.assert_close` without dtype strictness (golden files store some float64)."""
    torch.testing.assert_close(
        torch.as_tensor(actual).to(expected.dtype), expected, atol=atol, rtol=rtol, check_device=False
    )


def assert_outputs(actual: dict[str, Tensor], file: Golden, atol: float = 2e-5) -> None:
    """All recorded outputs of a file, integers exactly; none missing, none too many."""
    assert set(file.output) == set(actual), "every recorded output is compared"
    for name, expected in file.output.items():
        if expected.dtype == torch.int64:
            assert torch.equal(actual[name], expected), name
        else:
            assert_close(actual[name], expected, atol=atol)
