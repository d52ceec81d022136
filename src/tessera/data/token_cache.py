"""Tokens on disk: one memory-mapped array with a manifest, built once in parallel and resumable, then read by many.

Layout of the folder: `manifest.json`, `tokens.bin` (N V, P, L) in the smallest unsigned type, `labels.bin` (N,) int32,
`done.bin` one byte per chunk of images. Rows are image-major, view-minor.
"""

import errno
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import distributed
from tessera.data.images import VIEWS, ImageDataset, check_labels
from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError

log = logging.getLogger(__name__)

FORMAT = 1
Encode = Callable[[dict[str, Tensor]], Tensor]


@dataclass
class Manifest:
    """What a cache holds; all but `checksum` and `complete` must agree for it to be reused.

    Attributes:
        tokenizer: fingerprint of the tokenizer's token space.
        data: fingerprint of the data set; "" for imported tokens.
        views: images per sample: none, flip or ten_crop.
        images: N.
        branches, length: P, L.
        codebook_size: K.
        num_classes: labels are in [0, num_classes).
        extra: whatever else determines the tokens (generator, sigma, sampling settings, seed).
        format: of the folder.
        checksum: sha256 over tokens and labels.
        complete: all rows are written.
    """

    tokenizer: str
    data: str
    views: str
    images: int
    branches: int
    length: int
    codebook_size: int
    num_classes: int
    extra: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT
    checksum: str = ""
    complete: bool = False

    @property
    def rows(self) -> int:
        """N V."""
        return self.images * VIEWS[self.views]

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned type that holds K codes."""
        return np.dtype(
            np.uint8 if self.codebook_size <= 256 else np.uint16 if self.codebook_size <= 65536 else np.uint32
        )

    def identity(self) -> dict[str, Any]:
        """The facts that have to agree, as JSON stores them."""
        facts = {key: value for key, value in asdict(self).items() if key not in ("checksum", "complete")}
        return json.loads(json.dumps(facts))

    def difference(self, other: "Manifest") -> str:
        """Readable list of the facts in which `other` differs; "" if none."""
        ours, theirs = self.identity(), other.identity()
        return "; ".join(
            f"{key} is {theirs[key]!r} instead of {ours[key]!r}" for key in ours if ours[key] != theirs[key]
        )

    def write(self, folder: Path) -> None:
        """Write manifest.json atomically."""
        temporary = folder / "manifest.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(temporary, folder / "manifest.json")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read manifest.json; MissingFileError or CheckpointError where there is none or it is damaged."""
        path = folder / "manifest.json"
        if not path.is_file():
            raise MissingFileError(
                f"{folder} holds no token cache (no manifest.json); build it by training a generator"
            )
        try:
            return cls(**json.loads(path.read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete {folder} to build it again") from error


def _allocate(path: Path, size: int) -> None:
    """Reserve `size` bytes now: a memory map on a full disk would kill the process in the middle."""
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DataError(
                    f"no room for {size / 2**20:.1f} MiB in {path.parent}; free space or set paths.tokens to another disk"
                ) from error
            raise


def _maps(folder: Path, manifest: Manifest, mode: str) -> tuple[np.memmap, np.memmap]:
    tokens = np.memmap(
        folder / "tokens.bin", manifest.dtype, mode, shape=(manifest.rows, manifest.branches, manifest.length)
    )
    return tokens, np.memmap(folder / "labels.bin", np.int32, mode, shape=(manifest.images,))


def _checksum(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("tokens.bin", "labels.bin"):
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def _prepare(folder: Path, wanted: Manifest, chunks: int) -> None:
    """Make the files, or accept those of an interrupted build of the same tokens."""
    if (folder / "manifest.json").exists():
        found = Manifest.read(folder)
        if difference := wanted.difference(found):
            raise CheckpointError(f"{folder} holds other tokens: {difference}; delete it or choose another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    _allocate(folder / "tokens.bin", wanted.rows * wanted.branches * wanted.length * wanted.dtype.itemsize)
    _allocate(folder / "labels.bin", wanted.images * 4)
    (folder / "done.bin").write_bytes(bytes(chunks))
    wanted.write(folder)  # last: a folder without manifest is started over


def build_token_cache(
    folder: str | Path,
    dataset: ImageDataset,
    encode: Encode,
    *,
    tokenizer_fingerprint: str,
    codebook_size: int,
    shape: tuple[int, int],
    views: str = "none",
    extra: dict[str, Any] | None = None,
    batch_size: int = 64,
    chunk_images: int = 256,
) -> Path:
    """Encode a data set into a token cache; every process of the group takes its share of the chunks.

    A finished cache of the same content is left as it is; an interrupted one is continued at the first missing chunk.

    Args:
        folder: of the cache.
        dataset: its `views(number, views)` are encoded.
        encode: dict of `image` (B, 3, S, S), `label` (B,), `index` (B,) -> tokens (B, P, L) integer. The index is the
            row: unique per view.
        tokenizer_fingerprint, codebook_size: of the token space.
        shape: (P, L).
        views: none, flip or ten_crop.
        extra: further facts that determine the tokens, of plain JSON types.
        batch_size: images per call of `encode` (all views of some images, so at least one image's).
        chunk_images: images between two markers on disk.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds other tokens.
        DataError: full disk, or tokens of another shape or range.
    """
    folder = Path(folder)
    if views not in VIEWS:
        raise ConfigError(f"tokens.views={views!r} is unknown; choose one of {', '.join(VIEWS)}")
    wanted = Manifest(
        tokenizer_fingerprint,
        dataset.fingerprint(),
        views,
        len(dataset),
        *shape,
        codebook_size,
        dataset.num_classes,
        extra or {},
    )
    chunks = -(-len(dataset) // chunk_images)
    if distributed.rank() == 0:
        _prepare(folder, wanted, chunks)
    distributed.barrier()
    if Manifest.read(folder).complete:
        return folder
    tokens, labels = _maps(folder, wanted, "r+")
    done = np.memmap(folder / "done.bin", np.uint8, "r+", shape=(chunks,))
    own = range(distributed.rank(), chunks, distributed.world_size())
    log.info("building %s: %d of %d chunks to do here", folder, sum(not done[c] for c in own), chunks)
    for chunk in own:
        if done[chunk]:
            continue
        numbers = range(chunk * chunk_images, min((chunk + 1) * chunk_images, len(dataset)))
        for rows, batch in _batches(dataset, numbers, views, max(1, batch_size // VIEWS[views])):
            found = encode(batch).cpu()
            _check_tokens(found, (len(rows), *shape), codebook_size)
            tokens[rows.start : rows.stop] = found.numpy()
            labels[rows.start // VIEWS[views] : rows.stop // VIEWS[views]] = batch["label"][:: VIEWS[views]].numpy()
        tokens.flush()
        labels.flush()
        done[chunk] = 1
        done.flush()
    distributed.barrier()
    if distributed.rank() == 0:
        if not np.all(np.fromfile(folder / "done.bin", np.uint8)):
            raise DataError(f"{folder}: some chunks were not written; run again to complete it")
        wanted.checksum, wanted.complete = _checksum(folder), True
        wanted.write(folder)
    distributed.barrier()
    return folder


def _batches(
    dataset: ImageDataset, numbers: range, views: str, images: int
) -> Iterator[tuple[range, dict[str, Tensor]]]:
    """(rows, batch) over some images; all views of an image stay in one batch."""
    count = VIEWS[views]
    for start in range(numbers.start, numbers.stop, images):
        part = range(start, min(start + images, numbers.stop))
        rows = range(part.start * count, part.stop * count)
        labels = torch.tensor([dataset.label(number) for number in part])
        yield (
            rows,
            {
                "image": torch.cat([dataset.views(number, views) for number in part]),
                "label": labels.repeat_interleave(count),
                "index": torch.arange(rows.start, rows.stop),
            },
        )


def _check_tokens(tokens: Tensor, shape: tuple[int, ...], codebook_size: int) -> None:
    if tuple(tokens.shape) != shape or tokens.is_floating_point():
        raise DataError(
            f"the encoder gave {tokens.dtype} tokens of shape {tuple(tokens.shape)} instead of integers {shape}"
        )
    if tokens.numel() and (tokens.min() < 0 or tokens.max() >= codebook_size):
        raise DataError(f"the encoder gave token {int(tokens.max())}, outside [0, {codebook_size})")


class TokenCache:
    """A finished cache, opened for reading; processes share its pages.

    Args:
        folder: of the cache.
        tokenizer_fingerprint: refuse tokens of another tokenizer; None accepts any.
        **expected: further manifest facts that must agree (data, views, extra, ...).

    Attributes:
        tokens: (N V, P, L) memory map.
        labels: (N,) memory map.

    Raises:
        MissingFileError: no cache there.
        CheckpointError: unfinished, damaged, or of other content.
    """

    def __init__(self, folder: str | Path, tokenizer_fingerprint: str | None = None, **expected: Any):
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if self.manifest.format != FORMAT:
            raise CheckpointError(
                f"{folder} has format {self.manifest.format}, not {FORMAT}; delete it to build it again"
            )
        if not self.manifest.complete:
            raise CheckpointError(f"{folder} is not finished; run the command that builds it again to complete it")
        if tokenizer_fingerprint is not None and self.manifest.tokenizer != tokenizer_fingerprint:
            raise CheckpointError(
                f"{folder} holds tokens of tokenizer {self.manifest.tokenizer}, not of {tokenizer_fingerprint}; give the "
                "tokenizer it was made with, or another data.token_cache"
            )
        found = self.manifest.identity()
        for key, value in json.loads(json.dumps(expected)).items():
            if found[key] != value:
                raise CheckpointError(
                    f"{folder} has {key}={found[key]!r} instead of {value!r}; delete it to build it again"
                )
        sizes = {
            "tokens.bin": self.manifest.rows
            * self.manifest.branches
            * self.manifest.length
            * self.manifest.dtype.itemsize,
            "labels.bin": self.manifest.images * 4,
        }
        for name, size in sizes.items():
            path = self.folder / name
            actual = path.stat().st_size if path.exists() else 0
            if actual != max(size, 1):
                raise CheckpointError(f"{path} has {actual} bytes instead of {size}; delete {folder} to build it again")
        self.tokens, self.labels = _maps(self.folder, self.manifest, "r")
        check_labels(self.labels, self.manifest.num_classes, str(folder))

    def __len__(self) -> int:
        return self.manifest.rows

    def rows(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens (B, P, L) int64 and labels (B,) int64 of some rows."""
        wanted = np.asarray(numbers)
        tokens = torch.from_numpy(self.tokens[wanted].astype(np.int64))
        labels = torch.from_numpy(self.labels[wanted // VIEWS[self.manifest.views]].astype(np.int64))
        return tokens, labels

    def verify(self) -> None:
        """Compare the checksum (reads everything) and the range of the tokens; CheckpointError where it fails."""
        if _checksum(self.folder) != self.manifest.checksum:
            raise CheckpointError(f"{self.folder} is damaged (checksum); delete it to build it again")
        if len(self) and int(self.tokens.max()) >= self.manifest.codebook_size:
            raise CheckpointError(f"{self.folder} holds tokens outside [0, {self.manifest.codebook_size})")
