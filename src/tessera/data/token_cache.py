"""Tokens on disk: memory-mapped arrays with a manifest, made once (token_build.py), read by many processes.

Layout of the folder: `manifest.json`; `tokens.bin` (N V, P, L) in the smallest unsigned type, rows image-major and
view-minor; `labels.bin` (N,) int32; `index.bin` (N,) int64, the images' numbers in the data set; and while it is being
built `done.bin`, one byte per chunk of images.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.data.images import VIEWS, check_labels
from tessera.errors import CheckpointError, MissingFileError

FORMAT = 1
MANIFEST = "manifest.json"
ARRAYS = ("tokens.bin", "labels.bin", "index.bin")


@dataclass
class Manifest:
    """What a cache holds.

    Attributes:
        tokenizer: fingerprint of the tokenizer's token space.
        data: fingerprint of the data set; "" for imported tokens.
        views: images per sample: none, flip or ten_crop.
        images: N.
        branches, length: P, L.
        codebook_size: K; tokens are in [0, K).
        num_classes: labels are in [0, num_classes).
        extra: whatever else determines the tokens (generator, sigma, sampling settings, seed), of plain JSON types.
        format: version of the folder's layout.
        complete: all rows are written.
        checksum: sha256 over the arrays, once complete.
        seal: sha256 over the other fields.
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
    complete: bool = False
    checksum: str = ""
    seal: str = ""

    @property
    def rows(self) -> int:
        """N V."""
        return self.images * VIEWS[self.views]

    @property
    def dtype(self) -> np.dtype:
        """Smallest unsigned type that holds K codes."""
        return np.min_scalar_type(self.codebook_size - 1)

    def arrays(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Type and shape of each array file."""
        return {
            "tokens.bin": (self.dtype, (self.rows, self.branches, self.length)),
            "labels.bin": (np.dtype(np.int32), (self.images,)),
            "index.bin": (np.dtype(np.int64), (self.images,)),
        }

    def facts(self) -> dict[str, Any]:
        """What has to agree for a cache to be used in the place of another, as JSON stores it."""
        facts = {key: value for key, value in asdict(self).items() if key not in ("complete", "checksum", "seal")}
        return json.loads(json.dumps(facts))

    def difference(self, wanted: dict[str, Any]) -> str:
        """Readable list of the facts that are not as wanted; "" if none."""
        own = self.facts()
        wanted = json.loads(json.dumps(wanted))
        return "; ".join(f"{key} is {own[key]!r}, not {wanted[key]!r}" for key in wanted if own[key] != wanted[key])

    def _seal(self) -> str:
        content = {key: value for key, value in asdict(self).items() if key != "seal"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the manifest file atomically."""
        self.seal = self._seal()
        temporary = folder / f"{MANIFEST}.tmp"
        with open(temporary, "w") as file:
            json.dump(asdict(self), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest file.

        Raises:
            MissingFileError: there is none.
            CheckpointError: damaged, or of another format version.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise MissingFileError(
                f"{folder} holds no token cache (no {MANIFEST}); correct data.token_cache, or build it: training a "
                "generator does"
            )
        try:
            content = json.loads(path.read_text())
            version = content.get("format")
            manifest = cls(**content) if version == FORMAT else None
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete {folder} to build it again") from error
        if manifest is None:
            raise CheckpointError(
                f"{path} has format version {version}, not {FORMAT}; delete {folder} to build it again"
            )
        if manifest.seal != manifest._seal():
            raise CheckpointError(f"{path} was changed after it was written; delete {folder} to build it again")
        return manifest


def checksum(folder: Path) -> str:
    """sha256 over the content of the arrays."""
    digest = hashlib.sha256()
    for name in ARRAYS:
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

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        maps = {
            name: np.memmap(folder / name, dtype, "r", shape=shape)
            for name, (dtype, shape) in manifest.arrays().items()
        }
        self.tokens, self.labels, self.index = (maps[name] for name in ARRAYS)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenCache, (self.folder, self.manifest)  # a pickled memory map would carry its content

    @classmethod
    def open(cls, folder: str | Path, *, tokenizer_fingerprint: str | None = None, **wanted: Any) -> "TokenCache":
        """Open a cache after checking that it is whole (manifest and sizes; `verify` reads the content) and fits.

        Args:
            folder: of the cache.
            tokenizer_fingerprint: refuse tokens of another tokenizer; None accepts any.
            **wanted: further fields of the manifest that must agree (data, views, codebook_size, extra, ...).

        Raises:
            MissingFileError: no cache there.
            CheckpointError: unfinished, damaged, or of other content.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if not manifest.complete:
            raise CheckpointError(f"{folder} is not finished; repeat the command that builds it to complete it")
        if tokenizer_fingerprint is not None and manifest.tokenizer != tokenizer_fingerprint:
            raise CheckpointError(
                f"data.token_cache={folder} holds tokens of tokenizer {manifest.tokenizer}, not of "
                f"{tokenizer_fingerprint}; give the tokenizer it was made with, or another cache"
            )
        if difference := manifest.difference(wanted):
            raise CheckpointError(f"data.token_cache={folder} holds other tokens: {difference}; choose another folder")
        for name, (dtype, shape) in manifest.arrays().items():
            size = dtype.itemsize * int(np.prod(shape))
            actual = (folder / name).stat().st_size if (folder / name).exists() else 0
            if actual != size:
                raise CheckpointError(
                    f"{folder / name} has {actual} bytes, not {size}; delete {folder} to build it again"
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
            `tokens` (B, P, L), `label` (B,) and `index` (B,), all int64. The index tells views apart: number of the
            image in the data set times V, plus the view.
        """
        images, views = np.divmod(np.asarray(numbers), VIEWS[self.manifest.views])
        index = self.index[images] * VIEWS[self.manifest.views] + views
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
        if checksum(self.folder) != self.manifest.checksum:
            raise CheckpointError(f"{self.folder} is damaged (its checksum differs); delete it to build it again")
        if len(self) and int(self.tokens.max()) >= self.manifest.codebook_size:
            raise CheckpointError(f"{self.folder} holds tokens outside [0, {self.manifest.codebook_size})")
