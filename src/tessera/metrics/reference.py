"""What generated images are compared with: stored statistics, or a set of images measured once."""

import logging
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera import distributed
from tessera.errors import DataError
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.image_sets import STATISTICS_KEYS, ArrayImageSet, ImageSet, file_hash, open_images
from tessera.metrics.set_measure import measure_set
from tessera.metrics.statistics import ADM_EXTRACTOR, Statistics, content_key

log = logging.getLogger(__name__)

# ADM's published files (and LTH14/mar's copy of the statistics alone): stem -> side of the images. Their statistics are
# of the whole training set, their 10 000 images serve precision and recall.
ADM_FILES = {
    "VIRTUAL_imagenet64_labeled": 64,
    "VIRTUAL_imagenet128_labeled": 128,
    "VIRTUAL_imagenet256_labeled": 256,
    "VIRTUAL_imagenet512": 512,
    "adm_in256_stats": 256,
}


@dataclass
class Reference:
    """A set that generated images are compared with.

    Attributes:
        id: name of the set in figure names, e.g. `imagenet-train-256`.
        statistics: of the features, with spatial ones where known.
        features: (N, d) float32 of its images for precision, recall and KID; None without images.
        size: (H, W) of its images; None without images.
        crop: id of the crop that made them; "" when not known.
        hash: identity of the file or set.
    """

    id: str
    statistics: Statistics
    features: Tensor | None = None
    size: tuple[int, int] | None = None
    crop: str = ""
    hash: str = ""


def load_reference(
    source: str | Path | ImageSet,
    extractor: FeatureExtractor,
    reference_id: str | None = None,
    keep_features: bool = True,
    cache: str | Path | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> Reference:
    """A reference from stored statistics, a file or folder of images, or a data set; all processes call it together.

    As in ADM, a file that holds statistics (`mu`, `sigma`) is used for these, and its images for precision, recall and
    KID alone. Statistics of another extractor are refused where the file holds no images to measure.

    Args:
        source: an .npz of statistics, images or both; a folder of images; or a set (`DatasetImageSet` of a data set).
        extractor: of the features.
        reference_id: name of the set; None: that of ADM's published files, or else of the file, folder or data set.
        keep_features: measure the images for precision, recall and KID.
        cache: folder that keeps what was measured, by content; None: measure each time.
        batch_size, device: of the measurement.

    Raises:
        MissingFileError: no such file.
        DataError: neither statistics nor images in it, or statistics of another extractor without images.
    """
    if isinstance(source, ImageSet):
        return _of_images(source, extractor, reference_id, keep_features, cache, batch_size, device)
    path = Path(source)
    keys = _keys(path)
    if "mu" not in keys:
        return _of_images(open_images(path), extractor, reference_id, keep_features, cache, batch_size, device)
    images = ArrayImageSet(path) if "arr_0" in keys else None
    statistics = Statistics.load(path)
    if statistics.extractor != extractor.identity:
        if images is None:
            Statistics.load(path, extractor.identity)  # refuses
        log.info(
            "%s holds statistics of %s; those of %s are made of its %d images",
            path,
            statistics.extractor or "an unknown extractor",
            extractor.identity,
            len(images),
        )
        name = reference_id or f"{path.stem}-images"
        return _of_images(images, extractor, name, keep_features, cache, batch_size, device)
    content = _on_first_process(lambda: file_hash(path))
    found = Reference(reference_id or statistics.source, statistics, crop=statistics.crop, hash=content)
    if path.stem in ADM_FILES and statistics.extractor == ADM_EXTRACTOR:
        side = ADM_FILES[path.stem]
        if images is not None and images.size != (side, side):
            raise DataError(f"{path} holds images of {images.size} pixels, not the {side} that its name says")
        found.id, found.crop, found.size = reference_id or f"imagenet-train-{side}", f"adm-{side}", (side, side)
    if images is not None:
        found.size = images.size
        if keep_features:
            log.info("FID uses the statistics in %s; precision, recall and KID its %d images", path, len(images))
            found.features = _cached(images, found.hash, extractor, True, cache, batch_size, device)[1]
    return found


def check_reference(source: str | Path, extractor: FeatureExtractor) -> None:
    """Refuse what `load_reference` could not use, without measuring anything.

    Raises:
        As `load_reference`.
    """
    path = Path(source)
    keys = _keys(path)
    if "mu" not in keys:
        open_images(path)
    else:
        Statistics.load(path, None if "arr_0" in keys else extractor.identity)


def _keys(path: Path) -> list[str]:
    """Names of the arrays in an .npz file; none for anything else."""
    if path.suffix != ".npz" or not path.is_file():
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not an .npz file ({error})") from error
    if not set(keys) - {"n", "extractor", "source", "crop"}:
        raise DataError(f"{path} has neither {', '.join(STATISTICS_KEYS[:2])} nor images (arr_0)")
    return keys


def _of_images(
    images: ImageSet,
    extractor: FeatureExtractor,
    reference_id: str | None,
    keep_features: bool,
    cache: str | Path | None,
    batch_size: int,
    device: torch.device | str,
) -> Reference:
    content = _on_first_process(images.fingerprint)
    statistics, features = _cached(images, content, extractor, keep_features, cache, batch_size, device)
    name = reference_id or images.name
    statistics.source, statistics.crop = name, images.crop
    return Reference(name, statistics, features, images.size, images.crop, content)


def _on_first_process(compute: Callable[[], Any]) -> Any:
    """What rank 0 computes, on all processes."""
    return distributed.broadcast_object(compute() if distributed.rank() == 0 else None)


def _cached(
    images: ImageSet,
    content: str,
    extractor: FeatureExtractor,
    keep_features: bool,
    cache: str | Path | None,
    batch_size: int,
    device: torch.device | str,
) -> tuple[Statistics, Tensor | None]:
    """Statistics and features of a set, read from the cache where it has them."""
    stem = content_key(content, extractor.identity)
    if cache is not None:
        # rank 0 decides: the folder need not be shared
        found = _on_first_process(lambda: _read(Path(cache), stem, extractor, keep_features))
        if found is not None:
            return found
    measured = measure_set(images, extractor, batch_size, keep_features, score=False, device=device)
    if cache is not None and distributed.rank() == 0:
        measured.statistics.crop = images.crop
        measured.statistics.save(Path(cache) / f"statistics-{stem}.npz")
        if measured.features is not None:
            path = Path(cache) / f"features-{stem}.npy"
            with path.with_suffix(".tmp").open("wb") as file:
                np.save(file, measured.features.numpy())
            os.replace(path.with_suffix(".tmp"), path)
    return measured.statistics, measured.features


def _read(
    cache: Path, stem: str, extractor: FeatureExtractor, keep_features: bool
) -> tuple[Statistics, Tensor | None] | None:
    path, rows = cache / f"statistics-{stem}.npz", cache / f"features-{stem}.npy"
    if not path.is_file() or (keep_features and not rows.is_file()):
        return None
    statistics = Statistics.load(path, extractor.identity)
    if extractor.num_spatial and statistics.spatial is None:
        return None
    return statistics, torch.from_numpy(np.load(rows)) if keep_features else None
