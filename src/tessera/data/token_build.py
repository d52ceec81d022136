"""Builds token caches (token_cache.py) from images: in parallel processes, chunk by chunk, resumable after a kill."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tessera.data.images import ImageDataset, check_labels
from tessera.data.resumable import RowWriter, fill
from tessera.data.token_cache import Manifest, check_tokens, checksum
from tessera.data.views import Views
from tessera.errors import ConfigError

Encode = Callable[[dict[str, Tensor]], Tensor]
RowsOf = Callable[[dict[str, Tensor]], dict[str, np.ndarray]]


def build_token_cache(
    folder: str | Path,
    dataset: ImageDataset,
    encode: Encode,
    *,
    tokenizer_fingerprint: str,
    codebook_size: int,
    shape: tuple[int, int],
    views: Views | str = "none",
    indices: Sequence[int] | None = None,
    extra: dict[str, Any] | None = None,
    batch_size: int = 64,
    chunk_images: int = 256,
    num_workers: int = 0,
) -> Path:
    """Encode a data set into a token cache; all processes of the group share the work.

    A finished cache of the same content is left as it is, an interrupted one is completed: images that are done are not
    encoded again. Disk space is reserved before the first image is encoded (`tessera.data.resumable.fill`).

    Args:
        folder: of the cache.
        dataset: its `views(number, views)` are encoded (without training's augmentation).
        encode: batch of `image` (B, 3, S, S) float, `label` (B,), `index` (B,) -> tokens (B, P, L) integer. The index
            tells views apart: number of the image in the data set times V, plus the view.
        tokenizer_fingerprint, codebook_size: of the token space.
        shape: (P, L).
        views: crops of each image.
        indices: numbers of the images to encode, in this order; None: all.
        extra: further facts that determine the tokens, of plain JSON types.
        batch_size: of `encode`, views counted (but at least one image's).
        chunk_images: images between two markers on disk: the most work per process that a kill can cost.
        num_workers: processes that read images.

    Returns:
        The folder.

    Raises:
        ConfigError: unknown views, sizes below 1.
        CheckpointError: the folder holds other tokens.
        DataError: full disk, an unreadable image, tokens of another shape or range. Raised on every process.
    """
    views = Views.of(views)
    check_sizes("tokens", codebook_size=codebook_size, batch_size=batch_size, chunk_images=chunk_images)
    folder = Path(folder)
    numbers = image_numbers(dataset, indices, folder)
    extra = {**(extra or {}), **choice(indices, numbers)}
    if views.kind == "random":
        extra["random_views"] = dataset.random_view_id
    manifest = Manifest(
        tokenizer=tokenizer_fingerprint,
        data=dataset.fingerprint(),
        views=views.kind,
        num_views=views.count,
        views_seed=views.seed,
        images=len(numbers),
        branches=shape[0],
        length=shape[1],
        codebook_size=codebook_size,
        num_classes=dataset.num_classes,
        extra=extra,
    )

    def rows_of(batch: dict[str, Tensor]) -> dict[str, np.ndarray]:
        return {"tokens": encode(batch).cpu().numpy()}

    batch_images = max(1, batch_size // views.count)
    fill_cache(folder, manifest, dataset, numbers, rows_of, batch_images, chunk_images, num_workers)
    return folder


def check_sizes(node: str, **sizes: int) -> None:
    """Refuse sizes below 1, which config node `node` gave."""
    for key, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{node}.{key}={value} must be at least 1")


def image_numbers(dataset: ImageDataset, indices: Sequence[int] | None, folder: Path) -> np.ndarray:
    """Numbers of the images to make tokens of: these, or all.

    Raises:
        ConfigError: none, or some that the data set doesn't have.
    """
    numbers = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    if not len(numbers):
        raise ConfigError(f"there are no images to make tokens of for {folder}; correct pairs.num_images")
    if not 0 <= numbers.min() <= numbers.max() < len(dataset):
        raise ConfigError(f"indices reach from {numbers.min()} to {numbers.max()}, but there are {len(dataset)} images")
    return numbers


def choice(indices: Sequence[int] | None, numbers: np.ndarray) -> dict[str, str]:
    """What a manifest's `extra` says about chosen images; nothing where all are taken."""
    return {} if indices is None else {"indices": hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16]}


def fill_cache(
    folder: Path,
    manifest: Manifest,
    dataset: ImageDataset,
    numbers: np.ndarray,
    rows_of: RowsOf,
    batch_images: int,
    chunk_images: int,
    num_workers: int,
) -> None:
    """Fill a folder of tokens; all processes of the group share the work.

    Args:
        folder, manifest: of the cache.
        dataset: its `views(number, views)` are read.
        numbers: (N,) of the images.
        rows_of: batch as `build_token_cache` describes it -> by name of the file
            (without `.bin`), all rows of its images, image-major: `tokens`, and whatever else the manifest has.
        batch_images: images of a batch.
        chunk_images, num_workers: see `build_token_cache`.
    """
    source = _ViewBatches(dataset, manifest.view_set)

    def work(writer: RowWriter, chunks: list[range]) -> None:
        _encode(writer, chunks, numbers, source, rows_of, batch_images, num_workers)

    def finish() -> None:
        manifest.checksum = checksum(folder, manifest.arrays())

    fill(folder, manifest, chunk_images, work, finish)


def write_images(writer: RowWriter, images: range, labels: np.ndarray, index: np.ndarray, **rows: np.ndarray) -> None:
    """Write the images at these positions: labels and index (len,), and by file name (without `.bin`) all their rows,
    such as tokens (len V, P, L)."""
    for name, content in rows.items():
        writer.write(f"{name}.bin", images.start * writer.manifest.rows_per_image, content)
    writer.write("labels.bin", images.start, labels)
    writer.write("index.bin", images.start, index)


class _ViewBatches(Dataset):
    """Batches of all views of some images, for the loader's processes."""

    def __init__(self, dataset: ImageDataset, views: Views):
        self.dataset, self.views = dataset, views

    def __getitem__(self, numbers: list[int]) -> dict[str, Tensor]:
        samples = [self.dataset.views(number, self.views) for number in numbers]
        label, index = (torch.tensor([sample[key] for sample in samples]) for key in ("label", "index"))
        count = self.views.count
        return {
            "image": torch.cat([sample["image"] for sample in samples]),
            "label": label.repeat_interleave(count),
            "index": index.repeat_interleave(count) * count + torch.arange(count).repeat(len(samples)),
        }


def _encode(
    writer: RowWriter,
    chunks: list[range],
    numbers: np.ndarray,
    source: _ViewBatches,
    rows_of: RowsOf,
    batch_images: int,
    num_workers: int,
) -> None:
    manifest, views = writer.manifest, source.views.count
    # of each batch: its positions, and the chunk that it completes
    work = []
    for chunk in chunks:
        starts = range(chunk.start, chunk.stop, batch_images)
        batches = [range(start, min(start + batch_images, chunk.stop)) for start in starts]
        work += [(images, None) for images in batches[:-1]] + [(batches[-1], chunk)]
    order = [numbers[images.start : images.stop].tolist() for images, _ in work]
    loader = DataLoader(
        source, batch_size=None, sampler=order, num_workers=num_workers, generator=torch.Generator().manual_seed(0)
    )
    for (images, completed), batch in zip(work, loader, strict=True):
        rows = rows_of(batch)
        shape = (len(images) * manifest.rows_per_image, manifest.branches, manifest.length)
        check_tokens(rows["tokens"], shape, manifest.codebook_size)
        labels, index = batch["label"][::views].numpy(), batch["index"][::views].numpy() // views
        check_labels(labels, manifest.num_classes, "the data set")
        write_images(writer, images, labels, index, **rows)
        if completed is not None:
            writer.mark(completed)
