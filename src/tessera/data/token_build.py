"""Builds token caches (token_cache.py): in parallel ranks, chunk by chunk, resumable after a kill."""

import fcntl
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tessera import distributed
from tessera.data.images import VIEWS, ImageDataset, check_labels, check_views
from tessera.data.token_cache import MANIFEST, Manifest
from tessera.data.token_writer import DONE, TokenWriter, allocate, check_tokens, finish
from tessera.errors import CheckpointError, ConfigError, DataError

log = logging.getLogger(__name__)

LOCK = "build.lock"
Encode = Callable[[dict[str, Tensor]], Tensor]


def build_token_cache(
    folder: str | Path,
    dataset: ImageDataset,
    encode: Encode,
    *,
    tokenizer_fingerprint: str,
    codebook_size: int,
    shape: tuple[int, int],
    views: str = "none",
    indices: Sequence[int] | None = None,
    extra: dict[str, Any] | None = None,
    batch_size: int = 64,
    chunk_images: int = 256,
    num_workers: int = 0,
) -> Path:
    """Encode a data set into a token cache; all processes of the group share the work.

    A finished cache of the same content is left as it is, an interrupted one is completed: chunks that are done are not
    encoded again, whatever the number of processes then and now. Disk space is reserved before the first image is
    encoded. Another job that builds the same folder is waited for.

    Args:
        folder: of the cache.
        dataset: its `views(number, views)` are encoded (fixed crops, no augmentation).
        encode: batch of `image` (B, 3, S, S) float, `label` (B,), `index` (B,) -> tokens (B, P, L) integer. The index
            tells views apart: number of the image in the data set times V, plus the view.
        tokenizer_fingerprint, codebook_size: of the token space.
        shape: (P, L).
        views: none, flip or ten_crop.
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
    check_views(views)
    for key, value in (("codebook_size", codebook_size), ("batch_size", batch_size), ("chunk_images", chunk_images)):
        if value < 1:
            raise ConfigError(f"tokens.{key}={value} must be at least 1")
    folder = Path(folder)
    numbers = np.arange(len(dataset)) if indices is None else np.asarray(indices, dtype=np.int64)
    if not len(numbers):
        raise ConfigError(f"there are no images to make tokens of for {folder}; correct pairs.num_images")
    if not 0 <= numbers.min() <= numbers.max() < len(dataset):
        raise ConfigError(f"indices reach from {numbers.min()} to {numbers.max()}, but there are {len(dataset)} images")
    extra = dict(extra or {})
    if indices is not None:
        extra["indices"] = _digest(numbers)
    manifest = Manifest(
        tokenizer=tokenizer_fingerprint,
        data=dataset.fingerprint(),
        views=views,
        images=len(numbers),
        branches=shape[0],
        length=shape[1],
        codebook_size=codebook_size,
        num_classes=dataset.num_classes,
        extra=extra,
    )
    with _locked(folder):
        pending = _together(lambda: _prepare(folder, manifest, chunk_images) if distributed.rank() == 0 else None)
        pending = distributed.broadcast_object(pending)
        if pending is None:
            return folder
        own = pending[distributed.rank() :: distributed.world_size()]
        log.info("tokens in %s: %d chunks of %d images to make here", folder, len(own), chunk_images)
        source = _Views(dataset, views)
        plan = _Plan(numbers, chunk_images, max(1, batch_size // VIEWS[views]))
        with TokenWriter(folder, manifest) as writer:
            _together(lambda: _encode_chunks(writer, plan, own, source, encode, num_workers))
        _together(lambda: finish(folder, manifest) if distributed.rank() == 0 else None)
    return folder


def _digest(numbers: np.ndarray) -> str:
    return hashlib.sha256(numbers.astype("<i8").tobytes()).hexdigest()[:16]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, on behalf of all processes of this job."""
    file = None

    def acquire() -> None:
        nonlocal file
        if distributed.rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / LOCK, "w")  # noqa: SIM115 (held until the build ends; the kernel frees it on a kill)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another job is building %s; waiting for it", folder)
                fcntl.flock(file, fcntl.LOCK_EX)

    _together(acquire)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _together(work: Callable[[], Any]) -> Any:
    """Do the work of this process; if any process fails, raise on all of them instead of leaving them to wait."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if distributed.is_distributed():
        problems: list = [None] * distributed.world_size()
        dist.all_gather_object(problems, None if error is None else f"{type(error).__name__}: {error}")
        failed = [rank for rank, problem in enumerate(problems) if problem is not None]
        if failed and error is None:
            raise DataError(f"process {failed[0]} failed to make its tokens: {problems[failed[0]]}")
    if error is not None:
        raise error
    return result


def _prepare(folder: Path, wanted: Manifest, chunk_images: int) -> list[int] | None:
    """Make the files, or accept those of an interrupted build; returns the chunks to do, None if all is done."""
    chunks = -(-wanted.images // chunk_images)
    if (folder / MANIFEST).exists():
        found = Manifest.read(folder)
        if difference := found.difference(wanted.facts()):
            raise CheckpointError(f"{folder} holds other tokens: {difference}; delete it or choose another folder")
        if found.complete:
            return None
        done = np.fromfile(folder / DONE, np.uint8)
        if len(done) == chunks:
            log.info("continuing %s: %d of %d chunks are done", folder, int(done.sum()), chunks)
            return np.flatnonzero(done == 0).tolist()
        # another chunk size: the markers mean other images
        log.warning("tokens.chunk_images changed; starting %s over", folder)
    allocate(folder, wanted, chunks)
    return list(range(chunks))


class _Plan:
    """Which images make up a chunk and a batch."""

    def __init__(self, numbers: np.ndarray, chunk_images: int, batch_images: int):
        self.numbers, self.chunk_images, self.batch_images = numbers, chunk_images, batch_images

    def batches(self, chunk: int) -> list[range]:
        """Positions (in `numbers`) of the images of each batch of a chunk."""
        end = min((chunk + 1) * self.chunk_images, len(self.numbers))
        starts = range(chunk * self.chunk_images, end, self.batch_images)
        return [range(start, min(start + self.batch_images, end)) for start in starts]


class _Views(Dataset):
    """Batches of all views of some images, for the loader's processes."""

    def __init__(self, dataset: ImageDataset, views: str):
        self.dataset, self.kind, self.count = dataset, views, VIEWS[views]

    def __getitem__(self, numbers: list[int]) -> dict[str, Tensor]:
        samples = [self.dataset.views(number, self.kind) for number in numbers]
        label, index = (torch.tensor([sample[key] for sample in samples]) for key in ("label", "index"))
        view = torch.arange(self.count).repeat(len(samples))
        return {
            "image": torch.cat([sample["image"] for sample in samples]),
            "label": label.repeat_interleave(self.count),
            "index": index.repeat_interleave(self.count) * self.count + view,
        }


def _encode_chunks(
    writer: TokenWriter, plan: _Plan, chunks: list[int], source: _Views, encode: Encode, num_workers: int
) -> None:
    manifest = writer.manifest
    work = [(chunk, images) for chunk in chunks for images in plan.batches(chunk)]
    order = [plan.numbers[images.start : images.stop].tolist() for _, images in work]
    loader = DataLoader(
        source, batch_size=None, sampler=order, num_workers=num_workers, generator=torch.Generator().manual_seed(0)
    )
    for position, batch in enumerate(loader):
        chunk, images = work[position]
        tokens = encode(batch).cpu().numpy()
        rows = len(images) * source.count
        check_tokens(tokens, (rows, manifest.branches, manifest.length), manifest.codebook_size)
        labels, index = batch["label"][:: source.count], batch["index"][:: source.count] // source.count
        check_labels(labels.numpy(), manifest.num_classes, "the data set")
        writer.write(images, tokens, labels.numpy(), index.numpy())
        if position + 1 == len(work) or work[position + 1][0] != chunk:
            writer.mark(chunk)
