"""Published checkpoints by name: download, checks, and the model."""

from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tessera.errors import CheckpointError, ConfigError, TesseraError
from tessera.generators.base import Generator
from tessera.zoo.card import ModelCard
from tessera.zoo.export import from_pretrained, is_export
from tessera.zoo.files import part_of, read_public, require_hash
from tessera.zoo.hub import download
from tessera.zoo.public import from_public
from tessera.zoo.registry import Checkpoint, info, names


def load(name: str, path: str | Path | None = None, check_hash: bool = True) -> nn.Module:
    """The model of a published checkpoint, in eval mode on the CPU.

    Args:
        name: one of `names()`.
        path: its file, a folder with the file, or a folder that `export` wrote of it; None: from the Hugging Face hub
            (which needs `pip install tessera[hub]`), or out of this package.
        check_hash: refuse another file than the published one, where its hash is known.

    Returns:
        A tokenizer, a generator, or an extractor of features. A generator's `sampling` are the published settings, and
        `card` is what an export will say.

    Raises:
        ConfigError: an unknown name; the nearest ones are suggested. No model, but a file that something else takes.
        MissingFileError: no such file, no network, huggingface_hub not installed.
        CheckpointError: a truncated file, one of another hash, a pickle with foreign objects, or weights that do not
            fit: lists missing, unexpected and mis-shaped keys, and says which other published one the file fits.
    """
    entry = info(name)
    if entry.kind == "file":
        raise ConfigError(f"{name} is no model of its own: {entry.note}")
    if entry.kind == "extractor":
        from tessera.metrics import InceptionFeatures

        return InceptionFeatures(path)
    if path is None and entry.folder is not None:
        with as_file(files("tessera.zoo") / "tiny" / entry.folder) as folder:
            return from_pretrained(folder)
    path = _fetched(entry) if path is None else Path(path)
    if entry.filename is not None and (path / entry.filename).is_file() and not is_export(path):
        path = path / entry.filename
    if path.is_dir():
        return _of_folder(entry, path)
    content = read_public(path, f"download {entry.filename} of {entry.repository} from the Hugging Face hub")
    if check_hash and entry.sha256 is not None and path.suffix == Path(str(entry.filename)).suffix:
        require_hash(path, entry.sha256, name)
    try:
        model = from_public(entry.family, entry.config, part_of(content, entry.parts))
    except CheckpointError as error:
        raise CheckpointError(f"{path} is not {name}: {error}{_whose(content, entry)}") from error
    model.card = _card(entry)
    if isinstance(model, Generator):
        model.tokenizer_fingerprint = None  # not published
        model.sampling = model.sampling_types[0](**entry.settings)
    return model


def _card(entry: Checkpoint) -> ModelCard:
    """What an export of a published model says."""
    figures = [{"label": label, "value": value, "protocol": entry.protocol} for label, value in entry.reported.items()]
    place = f" in {entry.repository}" if entry.repository else ""
    note = f"Converted from {entry.filename}{place}, of {entry.source}. Figures are the publisher's, not measured anew."
    return ModelCard(name=entry.name, licence=entry.licence, figures=figures, note=note)


def _fetched(entry: Checkpoint) -> Path:
    """The published file from the hub's cache, or downloaded."""
    if entry.repository is None or entry.filename is None:
        raise ConfigError(f"{entry.name} is in no repository; give its path")
    return download(entry.repository, entry.filename, f'give the file by zoo.load("{entry.name}", path=...)')


def _of_folder(entry: Checkpoint, folder: Path) -> nn.Module:
    """An exported model, which must be of the kind and size of the published one."""
    model = from_pretrained(folder)
    kind = "generator" if isinstance(model, Generator) else "tokenizer"
    millions = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 3)
    if kind != entry.kind or (entry.params_millions is not None and millions != entry.params_millions):
        raise CheckpointError(
            f"{folder} holds a {kind} of {millions} M parameters, but {entry.name} is a {entry.kind} of "
            f"{entry.params_millions} M"
        )
    return model


def _on_meta(content: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with the shapes of its tensors only."""
    kept: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            kept[key] = _on_meta(value)
        elif isinstance(value, Tensor):
            kept[key] = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return kept


def _whose(content: Mapping[str, Any], entry: Checkpoint) -> str:
    """A clause that names a published checkpoint which a file fits; empty where there is none."""
    shapes = _on_meta(content)
    others = [info(name) for name in names() if info(name).config and info(name).config != entry.config]
    for other in sorted(others, key=lambda other: (other.kind != entry.kind, other.filename != entry.filename)):
        part = part_of(shapes, other.parts)
        elements = sum(value.numel() for value in part.values() if isinstance(value, Tensor))
        # a file has all parameters once, and seldom more than twice: no need to build the others
        if not 0.999e6 * (other.params_millions or 0) <= elements <= 2.2e6 * (other.params_millions or 0):
            continue
        try:
            from_public(other.family, other.config, part)
        except TesseraError:
            continue
        return f"; it fits {other.name}"
    return ""
