"""The common behaviour of image data sets, and the small ones that are held in memory.

`FolderImages` is in folder.py. A data set is made by a factory `factory(split="train" | "val")`, for instance
`functools.partial(DigitsImages, resolution=16)`.
"""

import copy
import gzip
import hashlib
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from tessera.data.pixels import from_uint8
from tessera.data.sampler import Key
from tessera.data.transforms import mirror, random_crop_adm, sample_random, ten_crop
from tessera.data.views import Views
from tessera.errors import ConfigError, DataError, MissingFileError

SPLITS = ("train", "val")


def to_tensor(image: Image.Image) -> Tensor:
    """PIL RGB -> float (3, H, W) in [-1, 1]."""
    return from_uint8(torch.from_numpy(np.array(image))).permute(2, 0, 1).contiguous()


def check_labels(labels: np.ndarray, num_classes: int, name: str) -> None:
    """Refuse labels outside [0, num_classes)."""
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        culprit = labels.min() if labels.min() < 0 else labels.max()
        raise DataError(f"{name} has label {culprit}, outside [0, {num_classes}); correct num_classes, or the labels")


class ImageDataset(Dataset):
    """Base of the data sets. Samples are dicts of `image` (3, S, S) float in [-1, 1], `label` and `index`.

    A key is a sample number, or (epoch, number) where augmentation shall differ between epochs; a list of keys gives
    the batch of those samples. The `index` of a sample is its number, unless the image is unreadable and another one
    was served in its place (see `FolderImages`).

    Attributes:
        name: goes into figure names.
        num_classes: labels are in [0, num_classes).
        resolution: S.
        crop_id: identity of the fixed crop, e.g. `adm-256`.
        augment: whether samples are augmented; only ever in the training split.
    """

    name: str
    num_classes: int
    crop_id: str

    def __init__(self, split: str, resolution: int, augment: bool = False):
        if split not in SPLITS:
            raise ConfigError(f"split={split!r} is unknown; choose train or val")
        if resolution < 1:
            raise ConfigError(f"data.dataset.resolution={resolution} must be at least 1")
        self.split, self.resolution = split, resolution
        self.augment = augment and split == "train"
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, number: int) -> tuple[Image.Image, int]:
        """The stored image, RGB and uncropped, and its number (another's if it is unreadable and skipped)."""
        raise NotImplementedError

    def label(self, number: int) -> int:
        """The class of a sample."""
        raise NotImplementedError

    def facts(self) -> list[Any]:
        """What determines the content, besides name, split and resolution."""
        raise NotImplementedError

    def fit(self, image: Image.Image) -> Image.Image:
        """The fixed crop to S x S."""
        return image

    def random_fit(self, image: Image.Image, epoch: int, number: int) -> Image.Image:
        """The augmented crop of training, a function of the arguments and the data set's seed."""
        return self.fit(image)

    @property
    def random_view_id(self) -> str:
        """Identity of the random views, e.g. `adm+flip`.

        Raises:
            ConfigError: there are none, as all would be alike.
        """
        return "adm+flip"

    def random_view(self, image: Image.Image, rng: random.Random) -> Image.Image:
        """A random crop and flip, whether or not training has them: ADM's random crop unless a data set has its own."""
        image = random_crop_adm(image, self.resolution, rng)
        return mirror(image) if rng.random() < 0.5 else image

    def fingerprint(self) -> str:
        """Identity of the images without augmentation: sha256, 16 hex digits."""
        if self._fingerprint is None:
            facts = repr([self.name, self.split, self.resolution, self.crop_id, *self.facts()])
            self._fingerprint = hashlib.sha256(facts.encode()).hexdigest()[:16]
        return self._fingerprint

    def without_augmentation(self) -> "ImageDataset":
        """The same images in their fixed crop; shares the memory."""
        plain = copy.copy(self)
        plain.augment = False
        return plain

    def __getitem__(self, key: Key | list[Key]) -> dict[str, Any]:
        if isinstance(key, list):
            return default_collate([self[one] for one in key])
        epoch, number = key if isinstance(key, tuple) else (0, key)
        # one past the end ends a plain `for sample in dataset`
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        image, index = self.read(int(number))
        image = self.random_fit(image, epoch, index) if self.augment else self.fit(image)
        return {"image": to_tensor(image), "label": self.label(index), "index": index}

    def views(self, number: int, views: Views | str) -> dict[str, Any]:
        """The crops of an image that pretokenisation stores, as `image` (V, 3, S, S), `label` and `index`.

        Args:
            number: of the sample.
            views: which ones; see `Views`.
        """
        views = Views.of(views)
        image, index = self.read(number)
        if views.kind == "random":
            rngs = [sample_random(views.seed, view, index) for view in range(views.count)]
            crops = [self.random_view(image, rng) for rng in rngs]
        elif views.kind == "ten_crop":
            crops = ten_crop(image, self.resolution)
        else:
            crops = [self.fit(image)]
            if views.kind == "flip":
                crops.append(mirror(crops[0]))
        return {
            "image": torch.stack([to_tensor(crop) for crop in crops]),
            "label": self.label(index),
            "index": index,
        }


class ArrayImages(ImageDataset):
    """Small grey images held in memory, brought to size once and repeated to RGB.

    Args:
        pixels: (N, h, w) uint8.
        labels: (N,) integers in [0, num_classes).
        split, resolution, name, num_classes: see `ImageDataset`.
        pad: keep the pixels and surround them with black, where S >= h, w; False: resize bilinearly.

    Raises:
        ConfigError: padding to a smaller size.
        DataError: labels out of range, or not one per image.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray,
        split: str,
        resolution: int,
        name: str,
        num_classes: int,
        pad: bool = False,
    ):
        super().__init__(split, resolution)
        self.name, self.num_classes = name, num_classes
        self.crop_id = f"{'pad' if pad else 'resize'}-{resolution}"
        if len(pixels) != len(labels):
            raise DataError(f"{name} has {len(pixels)} images but {len(labels)} labels; fetch its files again")
        check_labels(labels, num_classes, name)
        if pad:
            pixels = _pad(pixels, resolution)
        elif pixels.shape[1:] != (resolution, resolution):
            size = (resolution, resolution)
            pixels = np.stack([np.array(Image.fromarray(p).resize(size, Image.BILINEAR)) for p in pixels])
        self.pixels, self.labels = pixels, labels.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key | list[Key]) -> dict[str, Any]:
        if not isinstance(key, list):
            return super().__getitem__(key)
        # the same for a batch at once: image by image costs 50 us each
        index = torch.tensor([one[1] if isinstance(one, tuple) else one for one in key])
        grey = from_uint8(torch.from_numpy(self.pixels[index.numpy()]))
        images = grey[:, None].expand(-1, 3, -1, -1).contiguous()
        return {"image": images, "label": torch.from_numpy(self.labels[index.numpy()]), "index": index}

    def read(self, number: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[number]).convert("RGB"), number

    def label(self, number: int) -> int:
        return int(self.labels[number])

    def facts(self) -> list[Any]:
        return [hashlib.sha256(self.pixels.tobytes() + self.labels.tobytes()).hexdigest()]


def _pad(pixels: np.ndarray, size: int) -> np.ndarray:
    height, width = pixels.shape[1:]
    if size < max(height, width):
        raise ConfigError(
            f"data.dataset.resolution={size} can't be reached by padding {height} x {width} images; set "
            "data.dataset.pad=false"
        )
    top, left = (size - height) // 2, (size - width) // 2
    return np.pad(pixels, ((0, 0), (top, size - height - top), (left, size - width - left)))


class DigitsImages(ArrayImages):
    """scikit-learn's embedded handwritten digits (1 797 images of 8 x 8, 10 classes) as RGB.

    Every fifth image (numbers 4, 9, 14, ...) is for validation: 1 438 train, 359 val.

    Args:
        split: train or val.
        resolution: side length the images are resized to.
    """

    def __init__(self, split: str, resolution: int = 16):
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = np.clip(np.rint(digits.images * (255 / 16)), 0, 255).astype(np.uint8)
        chosen = (np.arange(len(pixels)) % 5 == 4) == (split == "val")
        super().__init__(pixels[chosen], digits.target[chosen], split, resolution, "digits", 10)


class FashionMNISTImages(ArrayImages):
    """Fashion-MNIST (60 000 train, 10 000 val images of 28 x 28, 10 classes) as RGB.

    Args:
        split: train or val (the official test set).
        root: torchvision's root (root/FashionMNIST/raw), or a folder that holds the raw files, gzipped or not.
        resolution: side length the images are brought to.
        pad: to that size by a black border instead of resizing.
        download: fetch missing files by torchvision into root.
        num_train: only the first so many training images, for small studies; the name, and with it the reference in
            figures' names, then says so. None: all.

    Raises:
        MissingFileError: the files aren't there and `download` is off.
        DataError: a damaged file.
        ConfigError: num_train outside [1, 60000].
    """

    def __init__(
        self,
        split: str,
        root: str | Path,
        resolution: int = 32,
        pad: bool = False,
        download: bool = False,
        num_train: int | None = None,
    ):
        pixels, labels = read_fashion_mnist(Path(root), split == "train", download)
        name = "fashion-mnist"
        if num_train is not None and split == "train":
            if not 1 <= num_train <= len(labels):
                raise ConfigError(f"data.dataset.num_train={num_train} is outside [1, {len(labels)}]; null takes all")
            name, pixels, labels = f"{name}-first{num_train}", pixels[:num_train], labels[:num_train]
        super().__init__(pixels, labels, split, resolution, name, 10, pad)


def read_fashion_mnist(root: Path, train: bool, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """(N, 28, 28) uint8 pixels and (N,) labels through torchvision, wherever below root the raw files lie."""
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.mnist import read_image_file, read_label_file

    prefix = "train" if train else "t10k"
    images, labels = (f"{prefix}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
    for folder in (root, root / "FashionMNIST" / "raw"):
        found = [
            next((path for path in (folder / stem, folder / f"{stem}.gz") if path.is_file()), None)
            for stem in (images, labels)
        ]
        if all(found):
            return _read_idx(found[0], read_image_file), _read_idx(found[1], read_label_file)
    if not download:
        raise MissingFileError(
            f"Fashion-MNIST's raw files ({images}.gz and so on) are not in {root}; set data.dataset.root to their "
            "folder (or TESSERA_FASHION_MNIST, or TESSERA_DATA to the folder that holds fashion-mnist/), or "
            "data.dataset.download=true"
        )
    dataset = FashionMNIST(root, train=train, download=True)
    return dataset.data.numpy(), dataset.targets.numpy()


def _read_idx(path: Path, reader: Any) -> np.ndarray:
    """Read a raw file; torchvision's readers take the name of an unpacked one."""
    try:
        if path.suffix != ".gz":
            return reader(str(path)).numpy()
        with tempfile.NamedTemporaryFile() as unpacked:
            unpacked.write(gzip.decompress(path.read_bytes()))
            unpacked.flush()
            return reader(unpacked.name).numpy()
    except Exception as error:  # whatever a damaged file makes gzip and torchvision raise
        raise DataError(f"{path} can't be read ({error}); fetch it again") from error
