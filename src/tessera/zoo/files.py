"""Reading published files without running what they hold, and checking that they are whole and the right ones."""

import argparse
import hashlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file

from tessera.errors import CheckpointError, MissingFileError

# What published pickles hold besides tensors, containers and numbers: the options of a command line
PLAIN = [argparse.Namespace]
_AGAIN = "download it again"


def read_public(path: str | Path, hint: str) -> dict[str, Any]:
    """A published weight file, by its content safetensors or a pickle, of which only plain values are read.

    Tensors stay on disk until they are used, where the format allows it.

    Args:
        hint: where to get the file, for the message.

    Raises:
        MissingFileError: no such file.
        CheckpointError: a truncated or damaged file; a pickle with foreign objects; not a weight file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; {hint}, or give its path")
    with path.open("rb") as file:
        start = file.read(16)
    try:
        if start.startswith(b"PK"):
            found = _zipped(path)
        elif start.startswith(b"\x80"):  # a pickle as torch wrote it before 1.6
            found = _unpickled(path, mmap=False)
        elif start[8:9] == b"{":
            found = load_file(path)
        else:
            raise CheckpointError(f"{path} is no weight file, but starts with {start!r}; {_AGAIN}")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} can't be read as weights ({type(error).__name__}: {error}): truncated or damaged; {_AGAIN}"
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, not a dictionary of weights")
    return found


def _zipped(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # the table of contents is at the end
        raise CheckpointError(f"{path} is truncated after {path.stat().st_size} bytes; {_AGAIN}")
    return _unpickled(path, mmap=True)


def _unpickled(path: Path, mmap: bool) -> Any:
    try:
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except UnpicklingError as error:
        foreign = ", ".join(dict.fromkeys(re.findall(r"GLOBAL ([\w.]+)", str(error))))
        raise CheckpointError(
            f"{path} is refused: it holds {foreign or 'more than plain data'}, and reading that could run code. Only "
            "tensors, containers, numbers, texts and argparse.Namespace are read; get the weights alone from their "
            "publisher, best as safetensors"
        ) from error


def require_hash(path: str | Path, expected: str, name: str) -> None:
    """Refuse a file of another SHA-256.

    Args:
        expected: 64 hex digits.
        name: of what it should be.

    Raises:
        CheckpointError: another one.
    """
    with Path(path).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise CheckpointError(
            f"{path} has the sha256 {found[:16]}..., but the published file of {name} has {expected[:16]}...: it is "
            f"truncated, changed, or another file; {_AGAIN}, or accept it with check_hash=False"
        )


def part_of(content: Mapping[str, Any], paths: Sequence[str]) -> Mapping[str, Any]:
    """The first of several dotted paths that leads to a dictionary in a checkpoint; else the checkpoint itself."""
    for path in paths:
        node: Any = content
        for name in path.split("."):
            node = node.get(name) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping):
            return node
    return content
