"""Image data sets in ImageNet's folder layout."""

import hashlib
import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tessera.data.images import ImageDataset
from tessera.data.transforms import center_crop, mirror, random_crop_adm, random_position_crop, sample_random
from tessera.errors import ConfigError, DataError, MissingFileError

log = logging.getLogger(__name__)

# torchvision's list, so that the numbering of files agrees with published pretokenised data
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# a plain conversion to RGB cuts these off at 255 instead of scaling them
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class FolderImages(ImageDataset):
    """Images in ImageNet's layout: root/{train,val}/<class folder>/<image>.

    Classes are the sorted folder names of the training split, samples are numbered as torchvision's ImageFolder does.
    Training images get a random crop and a random flip, validation images a fixed crop. Grey, palette, CMYK and
    transparent images are converted to RGB (transparency is dropped, as in torchvision); images of more than 8 bits are
    refused.

    Args:
        split: train or val.
        root: the folder above train and val.
        resolution: S.
        crop: id of the fixed crop: adm, bicubic, bilinear or var.
        random_crop: crop in training. True: ADM's random crop; "position": a random position in the image as the fixed
            crop resizes it; False: the fixed crop.
        flip: random horizontal flips in training.
        num_classes: number of class folders there must be; None takes what is there.
        on_error: "raise" stops at an unreadable image and names it; "skip" serves the next readable image of the same
            class in its place, under that one's `index`, and counts it in `skipped`.
        seed: of the augmentation.

    Raises:
        MissingFileError: no such folder.
        DataError: no images, another number of classes than expected, classes that training doesn't have.
        ConfigError: an unknown crop or `on_error`.
    """

    def __init__(
        self,
        split: str,
        root: str | Path,
        resolution: int = 256,
        crop: str = "adm",
        random_crop: bool | str = True,
        flip: bool = True,
        num_classes: int | None = None,
        on_error: str = "raise",
        seed: int = 0,
    ):
        super().__init__(split, resolution, augment=bool(random_crop) or flip)
        if on_error not in ("raise", "skip"):
            raise ConfigError(f"data.dataset.on_error={on_error!r} is unknown; choose raise or skip")
        if random_crop not in (True, False, "position"):
            raise ConfigError(f"data.dataset.random_crop={random_crop!r} is unknown; choose true, false or position")
        self.crop, self.flip = center_crop(crop), flip
        self.random_crop = random_position_crop(crop) if random_crop == "position" else random_crop and random_crop_adm
        self.random_crop_id = {True: "adm", False: ""}.get(random_crop, random_crop)
        self.crop_id, self.seed = f"{crop}-{resolution}", seed
        self.folder = Path(root) / split
        self.classes = _classes(Path(root), split, num_classes)
        self.num_classes = len(self.classes)
        self.name = "imagenet" if num_classes == 1000 else Path(root).resolve().name
        self.files: list[str] = []  # strings: a million Path objects would fill the memory of every worker
        labels: list[int] = []
        for number, name in enumerate(self.classes):
            found = _images_in(self.folder / name)
            self.files += found
            labels += [number] * len(found)
        if not self.files:
            raise DataError(
                f"{self.folder} holds no images; data.dataset.root needs <root>/{split}/<class>/<image>, an image "
                f"ending in {', '.join(SUFFIXES)}"
            )
        self.labels = np.asarray(labels, dtype=np.int64)
        # one flag per image, shared with loader processes: a count in each of them would be lost
        self._unreadable = torch.zeros(len(self), dtype=torch.bool).share_memory_() if on_error == "skip" else None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def skipped(self) -> int:
        """Number of images found unreadable so far, by this process and its loader's."""
        return 0 if self._unreadable is None else int(self._unreadable.sum())

    def facts(self) -> list[Any]:
        listing = hashlib.sha256()
        for path in self.files:
            listing.update(f"{os.path.relpath(path, self.folder)}:{os.stat(path).st_size}\n".encode())
        return [self.classes, listing.hexdigest()]

    def label(self, number: int) -> int:
        return int(self.labels[number])

    def read(self, number: int) -> tuple[Image.Image, int]:
        if self._unreadable is None:
            return read_rgb(self.files[number]), number
        first, last = np.searchsorted(self.labels, [self.labels[number], self.labels[number] + 1])
        for candidate in [*range(number, last), *range(first, number)]:
            if self._unreadable[candidate]:
                continue
            try:
                return read_rgb(self.files[candidate]), candidate
            except DataError as error:
                self._unreadable[candidate] = True
                log.warning("skipped image (%d so far): %s", self.skipped, error)
        raise DataError(
            f"none of the {last - first} images in {self.folder / self.classes[self.label(number)]} is readable"
        )

    def fit(self, image: Image.Image) -> Image.Image:
        return self.crop(image, self.resolution)

    def random_fit(self, image: Image.Image, epoch: int, number: int) -> Image.Image:
        return self.random_view(image, sample_random(self.seed, epoch, number))

    @property
    def random_view_id(self) -> str:
        if not self.random_crop_id and not self.flip:
            raise ConfigError(
                "tokens.views=random needs data.dataset.random_crop or data.dataset.flip; without both all views of an "
                "image are alike"
            )
        return "+".join(filter(None, (self.random_crop_id or "fixed", "flip" if self.flip else "")))

    def random_view(self, image: Image.Image, rng: random.Random) -> Image.Image:
        image = self.random_crop(image, self.resolution, rng) if self.random_crop else self.fit(image)
        return mirror(image) if self.flip and rng.random() < 0.5 else image


def read_rgb(path: str | Path) -> Image.Image:
    """Read an image file, as RGB.

    Raises:
        DataError: not an image, truncated, or more than 8 bits per channel; names the file.
    """
    try:
        with Image.open(path) as image:
            mode = image.mode
            # reads the pixels: a truncated file fails only here
            rgb = None if mode in DEEP_MODES else image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise DataError(
            f"{path} can't be read ({error}); repair or remove it, or set data.dataset.on_error=skip"
        ) from error
    if rgb is None:
        raise DataError(f"{path} has more than 8 bits per channel (mode {mode}); convert it to 8-bit RGB first")
    return rgb


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _classes(root: Path, split: str, num_classes: int | None) -> list[str]:
    """Class names: those of the training split where there is one, so that both splits number them alike."""
    folder = root / split
    if not folder.is_dir():
        raise MissingFileError(
            f"{folder} does not exist; set data.dataset.root (or TESSERA_DATA, or IMAGENET_ROOT for data=imagenet) to "
            "the folder that holds train/ and val/"
        )
    classes = own = _subfolders(folder)
    if split != "train" and (root / "train").is_dir():
        classes = _subfolders(root / "train")
        if unknown := sorted(set(own) - set(classes)):
            raise DataError(f"{folder / unknown[0]} is a class that {root / 'train'} doesn't have; remove or rename it")
    if num_classes is not None and len(classes) != num_classes:
        raise DataError(
            f"data.dataset.root={root} has {len(classes)} class folders, but data.dataset.num_classes={num_classes}; "
            "labels would be out of range or mean other classes"
        )
    return classes


def _images_in(folder: Path) -> list[str]:
    """Image files below a class folder, in torchvision's order; none if a split lacks the class."""
    return [
        os.path.join(parent, name)
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(SUFFIXES)
    ]
