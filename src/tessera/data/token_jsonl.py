"""The published layout of pretokenised data: a text file with one line `{"class_id": 0, "tokens": [...]}` per sample.

Published by RAR (`maskgitvq.jsonl`) and RobusTok. Slow to read, so it is converted into a token cache once.
"""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tessera.data.images import check_labels
from tessera.data.manifest import MANIFEST
from tessera.data.resumable import RowWriter, fill
from tessera.data.token_build import write_images
from tessera.data.token_cache import Manifest, TokenCache, check_tokens, checksum
from tessera.data.views import Views
from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError

BLOCK = 4096  # lines held at once


def export_jsonl(cache: TokenCache, path: str | Path) -> Path:
    """Write a cache as JSON lines; with P > 1 branches `tokens` is a list of P lists.

    Args:
        cache: an open cache.
        path: of the file; appears when it is complete.

    Returns:
        The path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        for start in range(0, len(cache), BLOCK):
            batch = cache.rows(np.arange(start, min(start + BLOCK, len(cache))))
            tokens = batch["tokens"].squeeze(1) if cache.manifest.branches == 1 else batch["tokens"]
            for label, row in zip(batch["label"].tolist(), tokens.tolist(), strict=True):
                file.write(json.dumps({"class_id": label, "tokens": row}) + "\n")
    os.replace(temporary, path)
    return path


def import_jsonl(
    path: str | Path,
    folder: str | Path,
    *,
    tokenizer_fingerprint: str,
    codebook_size: int,
    num_classes: int,
    views: str = "none",
    shape: tuple[int, int] | None = None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Convert JSON lines into a token cache.

    Args:
        path: of the file; every line `class_id` and `tokens` (L integers, or P lists of L).
        folder: of the new cache.
        tokenizer_fingerprint: of the tokenizer that made the tokens; nothing in the file tells.
        codebook_size, num_classes: ranges of tokens and labels.
        views: "none" unless the lines are known to be image-major and view-minor. The published ten-crop files are
            not: each line then counts as an image of its own.
        shape: (P, L) that the lines must have; None takes what is there.
        extra: further facts for the manifest.

    Returns:
        The folder.

    Raises:
        MissingFileError: no such file.
        ConfigError: unknown or random views.
        CheckpointError: the folder holds a finished cache.
        DataError: a malformed line (named by number), tokens or labels out of range, another shape, a full disk.
    """
    path, folder = Path(path), Path(folder)
    views = Views.of(views)
    if views.kind == "random":
        raise ConfigError("random views can't be imported as such, as nothing tells their seed; import with views=none")
    if codebook_size < 1:
        raise ConfigError(f"codebook_size={codebook_size} must be at least 1")
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; give the file of JSON lines")
    _make_way(folder)
    with open(path, "rb") as file:
        lines = sum(1 for _ in file)
    if lines == 0 or lines % views.count:
        raise DataError(f"{path} has {lines} lines, which is no positive multiple of the {views.count} views per image")
    tokens, _ = next(_blocks(path, 1))
    if shape is not None and tokens.shape[1:] != tuple(shape):
        raise DataError(
            f"{path} has tokens of shape {tokens.shape[1:]} per line, but the tokenizer makes {tuple(shape)} "
            "(branches, tokens); give the tokenizer they were made with"
        )
    manifest = Manifest(
        tokenizer=tokenizer_fingerprint,
        data="",
        views=views.kind,
        num_views=views.count,
        images=lines // views.count,
        branches=tokens.shape[1],
        length=tokens.shape[2],
        codebook_size=codebook_size,
        num_classes=num_classes,
        extra=extra or {},
    )

    def work(writer: RowWriter, chunks: list[range]) -> None:
        if chunks:  # one, of the whole file: an interrupted import begins anew, as the file may have been mended
            _read_into(writer, path)
            writer.mark(chunks[0])

    def finish() -> None:
        manifest.checksum = checksum(folder)

    fill(folder, manifest, manifest.images, work, finish)
    return folder


def _make_way(folder: Path) -> None:
    """Refuse a folder that holds a finished cache; forget an interrupted import."""
    if not (folder / MANIFEST).exists():
        return
    found = Manifest.read(folder)
    if found.complete:
        raise CheckpointError(f"{folder} already holds a token cache; delete it or choose another folder")
    if not found.data:
        (folder / MANIFEST).unlink()


def _read_into(writer: RowWriter, path: Path) -> None:
    manifest, done = writer.manifest, 0
    views = manifest.num_views
    for tokens, labels in _blocks(path, BLOCK // views * views):
        where = f"{path}, lines {done * views + 1} to {done * views + len(tokens)}"
        check_tokens(tokens, (len(tokens), manifest.branches, manifest.length), manifest.codebook_size, where)
        check_labels(labels, manifest.num_classes, where)
        labels = labels.reshape(-1, views)
        if (labels != labels[:, :1]).any():
            raise DataError(f"{where}: views of one image have different classes; import with views=none")
        images = range(done, done + len(labels))
        write_images(writer, images, labels[:, 0], np.arange(images.start, images.stop), tokens=tokens)
        done = images.stop


def _blocks(path: Path, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens (n, P, L) and labels (n,) of `size` lines at a time."""
    shape: tuple[int, ...] | None = None
    number = 0
    with open(path) as file:
        while lines := list(islice(file, size)):
            tokens, labels = [], []
            for line in lines:
                number += 1
                try:
                    content = json.loads(line)
                    row, label = np.asarray(content["tokens"]), int(content["class_id"])
                    if row.dtype.kind not in "iu" or row.ndim not in (1, 2):
                        raise ValueError("tokens are no list of integers, or of P equally long ones")
                    shape = shape or row.shape
                    if row.shape != shape:
                        raise ValueError(f"tokens of shape {row.shape} after {shape}")
                except (ValueError, TypeError, KeyError) as error:
                    raise DataError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
                tokens.append(row)
                labels.append(label)
            stacked = np.stack(tokens)
            yield (stacked[:, None] if stacked.ndim == 2 else stacked), np.asarray(labels)
