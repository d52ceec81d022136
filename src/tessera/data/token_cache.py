"""Tokens on disk: memory-mapped arrays with a manifest, made once (token_build.py), read by many processes.

Layout of the folder: `manifest.json`; `tokens.bin` (N V, P, L) in the smallest unsigned type, rows image-major and
view-minor; `labels.bin` (N,) int32; `index.bin` (N,) int64, the images' numbers in the data set.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tessera.data.images import check_labels
from tessera.data.manifest import MANIFEST, FolderManifest, StoredArray
from tessera.data.views import Views
from tessera.errors import CheckpointError, DataError, MissingFileError

FORMAT = 2
ARRAYS = ("tokens.bin", "labels.bin", "index.bin")


@dataclass(kw_only=True)
class Manifest(FolderManifest):
    """What a cache holds.

    Attributes:
        tokenizer: fingerprint of the tokenizer's token space.
        data: fingerprint of the data set; "" for imported tokens.
        views: kind of the images per sample (`tessera.data.views`).
        num_views: V of them.
        views_seed: of random views.
        images: N.
        branches, length: P, L.
        codebook_size: K; tokens are in [0, K).
        num_classes: labels are in [0, num_classes).
        extra: whatever else determines the tokens (generator, sigma, sampling settings, seed), of plain JSON types.
        checksum: sha256 over the arrays, once complete.
    """

    FORMAT: ClassVar[int] = FORMAT
    STATE: ClassVar[tuple[str, ...]] = (*FolderManifest.STATE, "checksum")
    NOUN: ClassVar[str] = "tokens"
    SPACE_KEY: ClassVar[str] = "paths.tokens"

    kind: str = "tokens"
    format: int = FORMAT
    tokenizer: str
    data: str
    views: str = "none"
    num_views: int = 1
    views_seed: int = 0
    images: int
    branches: int
    length: int
    codebook_size: int
    num_classes: int
    extra: dict[str, Any] = field(default_factory=dict)
    checksum: str = ""

    @property
    def units(self) -> int:
        """N: images are done with all their views."""
        return self.images

    @property
    def rows_per_image(self) -> int:
        """V."""
        return self.num_views

    @property
    def rows(self) -> int:
        """N V."""
        return self.images * self.rows_per_image

    @property
    def view_set(self) -> Views:
        """The views of each image."""
        return Views(self.views, self.num_views, self.views_seed)

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned type that holds K codes."""
        return np.min_scalar_type(self.codebook_size - 1)

    def arrays(self) -> dict[str, StoredArray]:
        shapes = {
            "tokens.bin": (self.dtype, (self.rows, self.branches, self.length)),
            "labels.bin": (np.dtype(np.int32), (self.images,)),
            "index.bin": (np.dtype(np.int64), (self.images,)),
        }
        return {name: StoredArray(name, dtype, shape) for name, (dtype, shape) in shapes.items()}


def checksum(folder: Path, names: Iterable[str] = ARRAYS) -> str:
    """sha256 over the content of the arrays."""
    digest = hashlib.sha256()
    for name in names:
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


class TokenCache:
    """A finished cache, opened for reading by `TokenCache.open`. Processes share its pages; pickling reopens it.

    Attributes:
        folder: of the cache.
        manifest: what it holds.
        tokens: (N V, P, L) memory map.
        labels: (N,) memory map.
        index: (N,) memory map; the images' numbers in the data set.
    """

    manifest_type: ClassVar[type[Manifest]] = Manifest
    # for messages
    NAME: ClassVar[str] = "token cache"
    MADE_BY: ClassVar[str] = "training a generator and task=pretokenize do"
    HOW_TO_COMPLETE: ClassVar[str] = "repeat the command that builds it to complete it"

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self.maps = {
            name: np.memmap(folder / name, array.dtype, "r", shape=array.shape)
            for name, array in manifest.arrays().items()
        }
        self.tokens, self.labels, self.index = (self.maps[name] for name in ARRAYS)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.manifest)  # a pickled memory map would carry its content

    @classmethod
    def read_manifest(cls, folder: Path, key: str) -> Manifest:
        """What the folder that config key `key` chose says about itself.

        Raises:
            MissingFileError: no cache there.
            CheckpointError: damaged, or a folder of another kind.
        """
        if not (folder / MANIFEST).is_file():
            raise MissingFileError(
                f"{key}={folder} holds no {cls.NAME} (no {MANIFEST}); correct {key}, or build it, as {cls.MADE_BY}"
            )
        return cls.manifest_type.read(folder)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        tokenizer_fingerprint: str | None = None,
        key: str = "data.token_cache",
        **wanted: Any,
    ) -> "TokenCache":
        """Open a cache after checking that it is whole (manifest and sizes; `verify` reads the content) and fits.

        Args:
            folder: of the cache.
            tokenizer_fingerprint: refuse tokens of another tokenizer; None accepts any.
            key: config key that chose the folder, for messages.
            **wanted: further fields of the manifest that must agree (data, views, codebook_size, extra, ...).

        Raises:
            MissingFileError: no cache there.
            CheckpointError: unfinished, damaged, or of other content.
        """
        folder = Path(folder)
        manifest = cls.read_manifest(folder, key)
        if not manifest.complete:
            raise CheckpointError(f"{key}={folder} is not finished; {cls.HOW_TO_COMPLETE}")
        if tokenizer_fingerprint is not None and manifest.tokenizer != tokenizer_fingerprint:
            raise CheckpointError(
                f"{key}={folder} holds tokens of tokenizer {manifest.tokenizer}, not of "
                f"{tokenizer_fingerprint}; give the tokenizer it was made with, or another cache"
            )
        if difference := manifest.difference(wanted):
            raise CheckpointError(f"{key}={folder} holds other tokens: {difference}; choose another folder")
        for name, array in manifest.arrays().items():
            actual = (folder / name).stat().st_size if (folder / name).exists() else 0
            if actual != array.end:
                raise CheckpointError(
                    f"{folder / name} has {actual} bytes, not {array.end}; delete {folder} to build it again"
                )
        cache = cls(folder, manifest)
        check_labels(cache.labels, manifest.num_classes, str(folder))
        return cache

    def __len__(self) -> int:
        return self.manifest.rows

    def rows(self, numbers: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Some rows as a batch.

        Args:
            numbers: B row numbers in [0, N V).

        Returns:
            `tokens` (B, P, L), `label` (B,) and `index` (B,), all int64. The index tells an image's rows apart: number
            of the image in the data set times the rows per image, plus the row's (its view).
        """
        images, own = np.divmod(np.asarray(numbers), self.manifest.rows_per_image)
        index = self.index[images] * self.manifest.rows_per_image + own
        return {
            "tokens": torch.from_numpy(self.tokens[numbers].astype(np.int64)),
            "label": torch.from_numpy(self.labels[images].astype(np.int64)),
            "index": torch.from_numpy(index),
        }

    def verify(self) -> None:
        """Read everything: compare the checksum and the range of the tokens.

        Raises:
            CheckpointError: damaged.
        """
        if checksum(self.folder, self.maps) != self.manifest.checksum:
            raise CheckpointError(f"{self.folder} is damaged (its checksum differs); delete it to build it again")
        if len(self) and int(self.tokens.max()) >= self.manifest.codebook_size:
            raise CheckpointError(f"{self.folder} holds tokens outside [0, {self.manifest.codebook_size})")


def check_tokens(
    tokens: Tensor | np.ndarray, shape: tuple[int, ...], codebook_size: int, origin: str = "the encoder"
) -> None:
    """Refuse tokens of another shape, of a type that holds no integers, or outside [0, K).

    Raises:
        DataError: says where they come from.
    """
    tokens = np.asarray(tokens)
    if tokens.shape != shape or tokens.dtype.kind not in "iu":
        raise DataError(f"{origin} gave {tokens.dtype} tokens of shape {tokens.shape}, not integers {shape}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < codebook_size:
        culprit = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DataError(f"{origin} gave token {culprit}, outside [0, {codebook_size}) of codebook_size={codebook_size}")
