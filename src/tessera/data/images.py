"""Image data sets: each sample is a dict of `image` (3, S, S) float in [-1, 1], `label` and `index`."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from tessera.data.pixels import from_uint8
from tessera.data.transforms import center_crop, random_crop_adm, sample_random, ten_crop
from tessera.errors import ConfigError, DataError, MissingFileError

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
VIEWS = {"none": 1, "flip": 2, "ten_crop": 10}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# one BOX halving less than the ADM rule needs no other decoder; deep images lose their range in a plain convert
DEEP_MODES = {"I", "F", "I;16", "I;16B", "I;16L"}

Key = int | tuple[int, int]


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any 8-bit mode as RGB (transparency is dropped); refuses 16-bit and float images, which need scaling first.

    Raises:
        DataError: an integer or float mode of more than 8 bits.
    """
    if image.mode in DEEP_MODES:
        raise DataError(f"{name} has mode {image.mode} (more than 8 bits); convert it to 8-bit RGB first")
    return image if image.mode == "RGB" else image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> float (3, H, W) in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.array(image))).permute(2, 0, 1).contiguous()


class ImageDataset(Dataset):
    """Base of the data sets.

    A key is a sample number, or (epoch, number) where augmentation shall differ between epochs. `views(number)` gives
    the fixed crops that pretokenisation stores.

    Attributes:
        name: goes into figure names.
        num_classes: labels are in [0, num_classes).
        resolution: side length of the images.
        crop_id: identity of the validation crop, e.g. `adm-256`.
    """

    name: str
    num_classes: int
    resolution: int
    crop_id: str

    def __init__(self, split: str, resolution: int, augment: bool, seed: int):
        if split not in SPLITS:
            raise ConfigError(f"split={split!r} is unknown; choose train or val")
        if resolution < 1:
            raise ConfigError(f"data.dataset.resolution={resolution} must be at least 1")
        self.split, self.resolution, self.seed = split, resolution, seed
        self.augment = augment and split == "train"

    def __len__(self) -> int:
        raise NotImplementedError

    def pil(self, number: int) -> Image.Image:
        """The stored image, RGB, uncropped."""
        raise NotImplementedError

    def label(self, number: int) -> int:
        """Its class."""
        raise NotImplementedError

    def facts(self) -> list[Any]:
        """What determines the content; hashed by `fingerprint`."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Identity of the images (without augmentation): sha256, 16 hex digits."""
        return hashlib.sha256(repr([self.name, self.split, self.resolution, *self.facts()]).encode()).hexdigest()[:16]

    def fit(self, image: Image.Image) -> Image.Image:
        """The fixed crop to the resolution."""
        return image

    def random_fit(self, image: Image.Image, epoch: int, number: int) -> Image.Image:
        """The augmented crop of training."""
        return self.fit(image)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, number = key if isinstance(key, tuple) else (0, key)
        image = self.pil(number)
        image = self.random_fit(image, epoch, number) if self.augment else self.fit(image)
        return {"image": to_tensor(image), "label": self.label(number), "index": int(number)}

    def views(self, number: int, views: str) -> Tensor:
        """The fixed crops of an image: (V, 3, S, S) float in [-1, 1].

        Args:
            number: of the image.
            views: none (the centre crop), flip (and its mirror image) or ten_crop (RAR's ten crops).
        """
        if views not in VIEWS:
            raise ConfigError(f"tokens.views={views!r} is unknown; choose one of {', '.join(VIEWS)}")
        image = self.pil(number)
        if views == "ten_crop":
            crops = ten_crop(image, self.resolution)
        else:
            crops = [self.fit(image)]
            if views == "flip":
                crops.append(crops[0].transpose(Image.FLIP_LEFT_RIGHT))
        return torch.stack([to_tensor(crop) for crop in crops])


class ArrayImages(ImageDataset):
    """Small grey images held in memory, resized bilinearly and repeated to RGB."""

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray,
        split: str,
        resolution: int,
        seed: int,
        name: str,
        num_classes: int,
    ):
        """Args: pixels (N, h, w) uint8; labels (N,) integers in [0, num_classes)."""
        super().__init__(split, resolution, augment=False, seed=seed)
        self.name, self.num_classes, self.crop_id = name, num_classes, f"full-{resolution}"
        check_labels(labels, num_classes, name)
        size = (resolution, resolution)
        same = pixels.shape[1:] == size
        self.pixels = (
            pixels if same else np.stack([np.array(Image.fromarray(p).resize(size, Image.BILINEAR)) for p in pixels])
        )
        self.labels = labels.astype(np.int64)
        self._content = hashlib.sha256(self.pixels.tobytes() + self.labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def pil(self, number: int) -> Image.Image:
        return Image.fromarray(self.pixels[number]).convert("RGB")

    def label(self, number: int) -> int:
        return int(self.labels[number])

    def facts(self) -> list[Any]:
        return [self._content]


class DigitsImages(ArrayImages):
    """scikit-learn's embedded handwritten digits (1 797 images of 8 x 8, 10 classes) as RGB.

    Every fifth image (numbers 4, 9, 14, ...) is for validation: 1 438 train, 359 val.

    Args:
        split: train or val.
        resolution: side length the images are resized to.
        seed: unused by this data set's fixed images, accepted as by all data sets.
    """

    def __init__(self, split: str, resolution: int = 16, seed: int = 0):
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.clip(np.rint(digits.images * (255 / 16)), 0, 255).astype(np.uint8)
        chosen = (np.arange(len(pixels)) % 5 == 4) == (split == "val")
        super().__init__(pixels[chosen], digits.target[chosen], split, resolution, seed, "digits", 10)


class FashionMNISTImages(ArrayImages):
    """Fashion-MNIST (60 000 train, 10 000 val images of 28 x 28, 10 classes) as RGB.

    Args:
        split: train or val (the official test set).
        root: torchvision's root (root/FashionMNIST/raw), or a folder that holds the raw files, gzipped or not.
        resolution: side length the images are resized to.
        download: fetch missing files by torchvision into root.
        seed: as in `DigitsImages`.

    Raises:
        MissingFileError: the files aren't there and `download` is off.
    """

    def __init__(self, split: str, root: str | Path, resolution: int = 32, download: bool = False, seed: int = 0):
        pixels, labels = read_fashion_mnist(Path(root), split == "train", download)
        super().__init__(pixels, labels, split, resolution, seed, "fashion-mnist", 10)


def read_fashion_mnist(root: Path, train: bool, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """(N, 28, 28) uint8 pixels and (N,) labels through torchvision's class, wherever the raw files lie."""
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    prefix = "train" if train else "t10k"
    stems = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    for folder in (root, root / "FashionMNIST" / "raw"):
        found = [
            next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None) for stem in stems
        ]
        if all(found):
            images, labels = (_plain_copy(path) for path in found)
            return read_image_file(str(images)).numpy(), read_label_file(str(labels)).numpy()
    if not download:
        raise MissingFileError(
            f"Fashion-MNIST's raw files ({stems[0]}.gz and so on) are not in {root}; set data.dataset.root (or the "
            "environment variable TESSERA_FASHION_MNIST) to their folder, or data.dataset.download=true"
        )
    dataset = FashionMNIST(root, train=train, download=True)
    return dataset.data.numpy(), dataset.targets.numpy()


def _plain_copy(path: Path) -> Path:
    """torchvision reads uncompressed files: unpack a gzipped one into a temporary file."""
    if path.suffix != ".gz":
        return path
    import gzip
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="fashion-mnist-"))
    target = folder / path.stem
    with gzip.open(path, "rb") as packed, open(target, "wb") as plain:
        shutil.copyfileobj(packed, plain)
    return target


class FolderImages(ImageDataset):
    """Images in ImageNet's layout: root/{train,val}/<class folder>/<image>; classes are the sorted folder names.

    Training images get ADM's random crop and a random flip, validation images a centre crop.

    Args:
        split: train or val.
        root: the folder above train and val.
        resolution: S.
        crop: id of the centre crop (transforms.CENTER_CROPS).
        random_crop: ADM's random crop in training; False: the centre crop.
        flip: random horizontal flips in training.
        num_classes: expected number of class folders; None takes what is there.
        on_error: "raise" names an unreadable image and stops; "skip" serves the next readable one
            of the same class in its place, counts it in `skipped` and logs it.
        seed: of the augmentation.

    Raises:
        MissingFileError: no such folder.
        DataError: no images, another number of classes than expected, an unreadable image.
    """

    def __init__(
        self,
        split: str,
        root: str | Path,
        resolution: int = 256,
        crop: str = "adm",
        random_crop: bool = True,
        flip: bool = True,
        num_classes: int | None = None,
        on_error: str = "raise",
        seed: int = 0,
    ):
        super().__init__(split, resolution, augment=random_crop or flip, seed=seed)
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"data.dataset.on_error={on_error!r} is unknown; choose raise or skip")
        self.crop, self.random_crop, self.flip, self.on_error = center_crop(crop), random_crop, flip, on_error
        self.crop_id, self.skipped = f"{crop}-{resolution}", 0
        self.folder = Path(root) / split
        if not self.folder.is_dir():
            raise MissingFileError(
                f"{self.folder} does not exist; set data.dataset.root to a folder with train/ and val/ of class folders"
            )
        self.classes = sorted(path.name for path in self.folder.iterdir() if path.is_dir())
        self.name = "imagenet" if num_classes == 1000 and len(self.classes) == 1000 else Path(root).resolve().name
        if num_classes is not None and len(self.classes) > num_classes:
            raise DataError(
                f"{self.folder} has {len(self.classes)} class folders but data.dataset.num_classes={num_classes}, so labels "
                "would be out of range; remove the extra folders or raise data.dataset.num_classes"
            )
        self.num_classes = num_classes or len(self.classes)
        self.files: list[Path] = []
        labels: list[int] = []
        for number, name in enumerate(self.classes):
            found = sorted(path for path in (self.folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
            self.files += found
            labels += [number] * len(found)
        if not self.files:
            raise DataError(f"{self.folder} holds no images in class folders; expected {self.folder}/<class>/<image>")
        self.labels = np.asarray(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.files)

    def facts(self) -> list[Any]:
        listing = "\n".join(f"{path.parent.name}/{path.name}:{path.stat().st_size}" for path in self.files)
        return [self.crop_id, hashlib.sha256(listing.encode()).hexdigest()]

    def label(self, number: int) -> int:
        return int(self.labels[number])

    def pil(self, number: int) -> Image.Image:
        path = self.files[number]
        try:
            with Image.open(path) as image:
                image.load()  # reads it all: a truncated file fails here
                return to_rgb(image, str(path))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path} can't be read ({error}); repair or remove it, or set data.dataset.on_error=skip"
            ) from error

    def fit(self, image: Image.Image) -> Image.Image:
        return self.crop(image, self.resolution)

    def random_fit(self, image: Image.Image, epoch: int, number: int) -> Image.Image:
        rng = sample_random(self.seed, epoch, number)
        image = random_crop_adm(image, self.resolution, rng) if self.random_crop else self.fit(image)
        return image.transpose(Image.FLIP_LEFT_RIGHT) if self.flip and rng.random() < 0.5 else image

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, number = key if isinstance(key, tuple) else (0, key)
        return self._readable(number, lambda candidate: super(FolderImages, self).__getitem__((epoch, candidate)))

    def views(self, number: int, views: str) -> Tensor:
        return self._readable(number, lambda candidate: super(FolderImages, self).views(candidate, views))

    def _readable(self, number: int, read: Callable[[int], Any]) -> Any:
        """`read(number)`, or of the next readable image of the same class where unreadable ones are skipped."""
        if self.on_error == "raise":
            return read(number)
        alike = np.flatnonzero(self.labels == self.labels[number])
        for candidate in np.roll(alike, -int(np.searchsorted(alike, number))):
            try:
                return read(int(candidate))
            except DataError as error:
                self.skipped += 1
                log.warning("skipped (%d so far in this process): %s", self.skipped, error)
        raise DataError(f"none of the {len(alike)} images in {self.files[number].parent} can be read")


def check_labels(labels: np.ndarray, num_classes: int, name: str) -> None:
    """Refuse labels outside [0, num_classes)."""
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        culprit = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(
            f"{name} has label {culprit}, outside [0, {num_classes}); set num_classes to the number of classes"
        )
