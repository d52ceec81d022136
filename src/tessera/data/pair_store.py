"""Generated tokens with the images they belong to, on disk: what decoder post-training reads (run/pairs.py makes it).

A token cache with R rows per image, one for each sigma and draw, which also holds `keep.bin` (N R, ceil(P L / 8)): of
each token a bit that says whether it is the real image's own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tessera.data.images import ImageDataset
from tessera.data.manifest import StoredArray, kind_of
from tessera.data.token_build import check_sizes, choice, fill_cache, image_numbers
from tessera.data.token_cache import Manifest, TokenCache

# batch of images, labels and indices -> tokens (B R, P, L) int64 and keep (B R, P, L) bool, image-major
MakePairs = Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]


@dataclass(kw_only=True)
class PairManifest(Manifest):
    """What a store holds. Rows of an image: all draws of the first sigma, then those of the next.

    Attributes:
        generator: fingerprint of the weights that made the tokens.
        sampling: its settings.
        sigmas: preservation ratios.
        draws: per image and sigma.
        seed: draw number d of an image is a function of (seed, image, d), whatever sigma is.
    """

    FORMAT: ClassVar[int] = 1
    NOUN: ClassVar[str] = "pairs"

    kind: str = "pairs"
    format: int = FORMAT
    generator: str
    sampling: dict[str, Any]
    sigmas: list[float]
    draws: int
    seed: int

    @property
    def rows_per_image(self) -> int:
        """R."""
        return len(self.sigmas) * self.draws

    def arrays(self) -> dict[str, StoredArray]:
        bits = (self.branches * self.length + 7) // 8
        keep = StoredArray("keep.bin", np.dtype(np.uint8), (self.rows, bits))
        return {**super().arrays(), keep.file: keep}


class PairStore(TokenCache):
    """A finished store, opened for reading by `PairStore.open`.

    Its rows have the `index` image number times R, plus the number of the image's row.
    """

    manifest_type: ClassVar[type[Manifest]] = PairManifest
    NAME: ClassVar[str] = "pairs"
    MADE_BY: ClassVar[str] = "post-training with a generator and task=pairs do"
    HOW_TO_COMPLETE: ClassVar[str] = (
        "repeat the command that makes it to complete it, or give post-training the generator that began it "
        "(generator.path=...)"
    )

    def keep(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """(B, P, L) bool of rows (B,): whether a token is the real image's own, which the generator had to keep."""
        manifest = self.manifest
        bits = np.unpackbits(self.maps["keep.bin"][numbers], axis=1, count=manifest.branches * manifest.length)
        return torch.from_numpy(bits.astype(bool)).view(-1, manifest.branches, manifest.length)

    def sigma(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """(B,) float64 preservation ratios of rows (B,)."""
        own = np.asarray(numbers) % self.manifest.rows_per_image
        return torch.tensor(self.manifest.sigmas, dtype=torch.float64)[own // self.manifest.draws]

    def draw(self, numbers: Sequence[int] | np.ndarray) -> Tensor:
        """(B,) int64 numbers of the draws of rows (B,)."""
        return torch.from_numpy(np.asarray(numbers) % self.manifest.draws)

    def kept_shares(self) -> dict[float, float]:
        """Realised share of kept tokens by sigma."""
        kept = np.zeros(self.manifest.rows, np.int64)
        for start in range(0, len(kept), 1 << 16):
            rows = slice(start, start + (1 << 16))
            kept[rows] = np.unpackbits(self.maps["keep.bin"][rows], axis=1).sum(1)
        mean = kept.reshape(self.manifest.images, len(self.manifest.sigmas), -1).mean((0, 2))
        tokens = self.manifest.branches * self.manifest.length
        return dict(zip(self.manifest.sigmas, (mean / tokens).tolist(), strict=True))


def build_pair_store(
    folder: str | Path,
    dataset: ImageDataset,
    make: MakePairs,
    *,
    tokenizer_fingerprint: str,
    codebook_size: int,
    shape: tuple[int, int],
    generator: str,
    sampling: dict[str, Any],
    sigmas: Sequence[float],
    draws: int = 1,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    chunk_images: int = 256,
    num_workers: int = 0,
) -> Path:
    """Make pairs of a data set's images, or complete them; all processes of the group share the work.

    A finished store of the same content is left as it is, an interrupted one is completed, as by `build_token_cache`.

    Args:
        folder: of the store.
        dataset: whose images are paired, in their fixed crop.
        make: batch of `image` (B, 3, S, S) float, `label` (B,), `index` (B,; numbers of the images) -> tokens and keep,
            both (B R, P, L).
        tokenizer_fingerprint, codebook_size: of the token space.
        shape: (P, L).
        generator, sampling, sigmas, draws, seed: see `PairManifest`.
        indices: numbers of the images, in this order; None: all.
        batch_size: images given to `make`.
        chunk_images: images between two markers on disk: the most work per process that a kill can cost.
        num_workers: processes that read images.

    Returns:
        The folder.

    Raises:
        ConfigError: sizes below 1, no images.
        CheckpointError: the folder holds other pairs.
        DataError: full disk, an unreadable image, tokens of another shape or range. Raised on every process.
    """
    check_sizes("pairs", draws=draws, batch_size=batch_size, chunk_images=chunk_images)
    folder = Path(folder)
    numbers = image_numbers(dataset, indices, folder)
    manifest = PairManifest(
        tokenizer=tokenizer_fingerprint,
        data=dataset.fingerprint(),
        images=len(numbers),
        branches=shape[0],
        length=shape[1],
        codebook_size=codebook_size,
        num_classes=dataset.num_classes,
        extra=choice(indices, numbers),
        generator=generator,
        sampling=sampling,
        sigmas=list(sigmas),
        draws=draws,
        seed=seed,
    )

    def rows_of(batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        tokens, keep = (part.cpu().numpy() for part in make(batch))
        return {"tokens": tokens, "keep": np.packbits(keep.reshape(len(keep), -1), axis=1)}

    fill_cache(folder, manifest, dataset, numbers, rows_of, batch_size, chunk_images, num_workers)
    return folder


def open_pairs(folder: str | Path, **expected: Any) -> TokenCache:
    """What post-training reads: pairs, or a token cache, whose images are paired with their own tokens.

    Args:
        folder: of the store.
        **expected: see `TokenCache.open`.

    Raises:
        MissingFileError, CheckpointError: see `TokenCache.open`.
    """
    kind = TokenCache if kind_of(Path(folder)) == "tokens" else PairStore
    return kind.open(folder, **expected)
