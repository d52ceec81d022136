"""Sets of finished images to be measured: an .npz or .npy array, a folder of files, a data set, or a tensor.

Those on disk are read in shares and batches as uint8, never as a whole.
"""

import hashlib
import logging
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader

from tessera.errors import ConfigError, DataError, MissingFileError
from tessera.metrics.features import as_uint8

log = logging.getLogger(__name__)

LOSSY = (".jpg", ".jpeg")
SUFFIXES = (*LOSSY, ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
STATISTICS_KEYS = ("mu", "sigma", "mu_s", "sigma_s")


class ImageSet:
    """Images of one size, numbered from 0.

    Attributes:
        name: goes into figure names where the set is a reference.
        size: (H, W).
        labels: (N,) int64 classes, or None.
        crop: id of the crop that made the images; "" when not known.
    """

    name: str
    size: tuple[int, int]
    labels: Tensor | None = None
    crop: str = ""

    def __len__(self) -> int:
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Identity of the content: 16 hex digits."""
        raise NotImplementedError

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(B,) int64 numbers and (B, 3, H, W) uint8 images of the samples start to stop."""
        raise NotImplementedError


class ArrayImageSet(ImageSet):
    """Images of an .npz (its only array of images, or `arr_0`) or .npy file: (N, H, W, 3) uint8.

    Labels are those of ADM's sample files, `arr_1`.

    Args:
        path: the file; it may hold statistics besides.

    Raises:
        MissingFileError: no such file.
        DataError: no array of images, or one of another layout or dtype; the message names the keys.
    """

    def __init__(self, path: str | Path):
        self.path, self.name = Path(path), Path(path).stem
        if not self.path.is_file():
            raise MissingFileError(f"{path} does not exist; give an .npz file or a folder of images")
        self.key: str | None = None
        try:
            if self.path.suffix == ".npz":
                with zipfile.ZipFile(self.path) as archive:
                    keys = [name.removesuffix(".npy") for name in archive.namelist()]
                self.key = self._image_key(keys)
            with self._open() as file:
                self.shape, self.dtype = _header(file)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{path} is not an .npz or .npy file ({error})") from error
        where = f"{path}" + (f"[{self.key}]" if self.key else "")
        if len(self.shape) != 4 or self.shape[3] != 3:
            raise DataError(f"{where} has shape {self.shape}; images are (N, H, W, 3), channels last")
        if self.dtype != np.uint8:
            raise DataError(
                f"{where} holds {self.dtype}, but images to be measured are uint8: convert floats in [-1, 1] by "
                "tessera.data.to_uint8, as other rules give other figures"
            )
        self.size = self.shape[1], self.shape[2]
        if self.key is not None and "arr_1" in keys:
            with np.load(self.path, allow_pickle=False) as file:
                labels = file["arr_1"]
            if labels.shape == (len(self),) and np.issubdtype(labels.dtype, np.integer):
                self.labels = torch.from_numpy(labels.astype(np.int64))

    def _image_key(self, keys: list[str]) -> str:
        if "arr_0" in keys:
            return "arr_0"
        candidates = [key for key in keys if key not in STATISTICS_KEYS]
        if len(candidates) != 1:
            raise DataError(f"{self.path} has the keys {', '.join(keys)}; images are expected under arr_0")
        return candidates[0]

    def _open(self) -> IO[bytes]:
        return self.path.open("rb") if self.key is None else zipfile.ZipFile(self.path).open(f"{self.key}.npy")

    def __len__(self) -> int:
        return self.shape[0]

    def fingerprint(self) -> str:
        return file_hash(self.path)

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        length = self.shape[1] * self.shape[2] * 3
        with self._open() as file:
            _header(file)
            # a share in the middle: what comes before is read past, without being kept
            file.seek(start * length, 1)
            for first in range(start, stop, batch_size):
                count = min(batch_size, stop - first)
                content = bytearray(file.read(count * length))
                if len(content) != count * length:
                    raise DataError(f"{self.path} ends after {first + len(content) // length} of {len(self)} images")
                images = torch.frombuffer(content, dtype=torch.uint8).view(count, *self.shape[1:])
                yield torch.arange(first, first + count), images.permute(0, 3, 1, 2)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an .npy stream, which is left at the first number."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 1:
        raise ValueError("it is stored in Fortran order; save it with numpy.ascontiguousarray")
    return shape, dtype


class FolderImageSet(ImageSet):
    """Image files in a folder and its sub-folders, sorted by path; converted to RGB.

    Where every file is in a sub-folder, the sub-folders are the classes.

    Args:
        path: the folder.

    Raises:
        MissingFileError: no such folder.
        DataError: no images in it.
    """

    def __init__(self, path: str | Path):
        self.path, self.name = Path(path), Path(path).resolve().name
        if not self.path.is_dir():
            raise MissingFileError(f"{path} does not exist; give an .npz file or a folder of images")
        self.files = sorted(file for file in self.path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not self.files:
            raise DataError(f"{path} holds no images ({', '.join(SUFFIXES)})")
        if lossy := sum(file.suffix.lower() in LOSSY for file in self.files):
            log.warning(
                "%d of %d images in %s are JPEG files, whose compression moves a FID; save samples as PNG",
                lossy,
                len(self.files),
                path,
            )
        parents = [file.parent.relative_to(self.path).as_posix() for file in self.files]
        if "." not in parents:
            numbers = {name: number for number, name in enumerate(sorted(set(parents)))}
            self.labels = torch.tensor([numbers[name] for name in parents])
        self.size = tuple(self._read(0).shape[:2])

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, number: int) -> np.ndarray:
        file = self.files[number]
        try:
            with Image.open(file) as image:
                return np.array(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{file} is not a readable image ({error})") from error

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(path.relative_to(self.path).as_posix().encode())
            digest.update(file_hash(path).encode())
        return digest.hexdigest()[:16]

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(start, stop, batch_size):
            numbers = range(first, min(first + batch_size, stop))
            images = [self._read(number) for number in numbers]
            for number, image in zip(numbers, images, strict=True):
                if image.shape[:2] != self.size:
                    raise DataError(
                        f"{self.files[number]} has {image.shape[0]} x {image.shape[1]} pixels, but {self.files[0]} "
                        f"{self.size[0]} x {self.size[1]}; a set has images of one size"
                    )
            yield torch.tensor(numbers), torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


class DatasetImageSet(ImageSet):
    """The images of a data set in their fixed crop, rounded to uint8.

    Args:
        dataset: a `tessera.data.ImageDataset`.
        num_samples: of its images, see `subset_numbers`; None: all.
        num_workers: processes that read them.

    Attributes:
        numbers: (N,) int64 of the images in the data set.

    Raises:
        ConfigError: more samples than there are.
    """

    def __init__(self, dataset: Any, num_samples: int | None = None, num_workers: int = 0):
        from tessera.data import to_uint8

        self.dataset, self._to_uint8 = dataset.without_augmentation(), to_uint8
        self.num_workers, self.name = num_workers, f"{dataset.name}-{dataset.split}"
        self.numbers = subset_numbers(len(dataset), num_samples)
        self.size, self.crop = (dataset.resolution, dataset.resolution), dataset.crop_id
        self.labels = torch.tensor([dataset.label(number) for number in self.numbers.tolist()])

    def __len__(self) -> int:
        return len(self.numbers)

    def fingerprint(self) -> str:
        whole = self.dataset.fingerprint()
        if len(self) == len(self.dataset):
            return whole
        return hashlib.sha256(f"{whole}/{len(self)}".encode()).hexdigest()[:16]

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        places = torch.arange(start, stop).split(batch_size) if stop > start else ()
        loader = DataLoader(
            self.dataset,
            batch_size=None,  # the keys are batches already
            sampler=[self.numbers[part].tolist() for part in places],
            num_workers=self.num_workers,
            generator=torch.Generator(),  # drawing the workers' seeds must not advance torch's global one
        )
        for part, batch in zip(places, loader, strict=True):
            yield part, self._to_uint8(batch["image"])


def subset_numbers(count: int, num_samples: int | None, key: str = "num_samples") -> Tensor:
    """(N,) int64 numbers, ascending, of the images that stand for a whole set in a quick figure.

    They are drawn at random, as sets are often sorted by class, and always the same; more samples include fewer.

    Args:
        count: of the whole set.
        num_samples: N; None: all.
        key: config key of N, for the message.

    Raises:
        ConfigError: N below 2 or above `count`.
    """
    if num_samples is None:
        return torch.arange(count)
    if not 2 <= num_samples <= count:
        raise ConfigError(f"{key}={num_samples} must be between 2 and the {count} images there are; null takes all")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:num_samples].sort().values


class TensorImageSet(ImageSet):
    """Images in memory, such as reconstructions or samples just made; rounded to uint8.

    Args:
        images: (N, 3, H, W) uint8, or float in [-1, 1].
        name: see `ImageSet`.
        labels: (N,) int64 classes, or None.
        crop: see `ImageSet`.

    Raises:
        DataError: another shape or dtype, values out of range, or labels that are not one per image.
    """

    def __init__(self, images: Tensor, name: str = "images", labels: Tensor | None = None, crop: str = ""):
        self.images, self.name, self.labels, self.crop = as_uint8(images), name, labels, crop
        if labels is not None and labels.shape != (len(images),):
            raise DataError(f"{name} has {len(images)} images but labels of shape {tuple(labels.shape)}")
        self.size = tuple(images.shape[2:])

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        shape = repr(tuple(self.images.shape)).encode()
        return hashlib.sha256(shape + self.images.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(start, stop, batch_size):
            last = min(first + batch_size, stop)
            yield torch.arange(first, last), self.images[first:last]


def file_hash(path: Path) -> str:
    """First 16 hex digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def open_images(path: str | Path) -> ImageSet:
    """The set in an .npz or .npy file, or in a folder."""
    return FolderImageSet(path) if Path(path).is_dir() else ArrayImageSet(path)


def image_hashes(images_u8: Tensor) -> Tensor:
    """(B,) int64 identities of the pixels of (B, 3, H, W) uint8 images."""
    rows: Sequence[np.ndarray] = images_u8.cpu().contiguous().numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.int64).copy())
