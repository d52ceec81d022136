"""Crops and flips on PIL images. Random ones draw from a generator of the sample's own."""

import math
import random
from collections.abc import Callable
from functools import partial

from PIL import Image

from tessera.errors import ConfigError

Crop = Callable[[Image.Image, int], Image.Image]
RandomCrop = Callable[[Image.Image, int, random.Random], Image.Image]


def _shrink(image: Image.Image, side: int) -> Image.Image:
    """Resize to a shorter side of `side`: BOX halvings while it is at least twice as long, then bicubic."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.BICUBIC)


def _cut(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def _cut_anywhere(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A random position; draws in the order top, left."""
    top = rng.randrange(image.height - size + 1)
    left = rng.randrange(image.width - size + 1)
    return _cut(image, left, top, size)


def center_crop_adm(image: Image.Image, size: int) -> Image.Image:
    """`center_crop_arr` of openai/guided-diffusion, used by XQ-GAN, RobusTok, LlamaGen and RAR.

    Args:
        image: any size; smaller ones are enlarged.
        size: side of the crop.
    """
    image = _shrink(image, size)
    return _cut(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop_adm(
    image: Image.Image, size: int, rng: random.Random, min_fraction: float = 0.8, max_fraction: float = 1.0
) -> Image.Image:
    """`random_crop_arr` of openai/guided-diffusion: a random shorter side, then a random position.

    Args:
        image: any size.
        size: side of the crop.
        rng: draws in the order shorter side, top, left.
        min_fraction, max_fraction: of the shorter side that the crop covers; the shorter side is resized to a uniform
            integer in [ceil(size / max_fraction), ceil(size / min_fraction)].
    """
    smallest, largest = math.ceil(size / max_fraction), math.ceil(size / min_fraction)
    return _cut_anywhere(_shrink(image, rng.randrange(smallest, largest + 1)), size, rng)


def _resize_shorter(image: Image.Image, side: int, resample: Image.Resampling) -> Image.Image:
    """Resize to a shorter side of `side`, the longer one truncated, as torchvision's Resize does."""
    width, height = image.size
    target = (side, int(side * height / width)) if width <= height else (int(side * width / height), side)
    return image.resize(target, resample=resample)


def _center(image: Image.Image, size: int) -> Image.Image:
    """Centre crop with torchvision's rounding of the offset (half to even)."""
    return _cut(image, round((image.width - size) / 2.0), round((image.height - size) / 2.0), size)


# how each centre crop resizes before it cuts: (image, size of the crop) -> image
RESIZES: dict[str, Crop] = {
    "adm": _shrink,
    "bicubic": lambda image, size: _resize_shorter(image, size, Image.BICUBIC),
    "bilinear": lambda image, size: _resize_shorter(image, size, Image.BILINEAR),
    "var": lambda image, size: _resize_shorter(image, round(1.125 * size), Image.LANCZOS),
}


def center_crop_bicubic(image: Image.Image, size: int) -> Image.Image:
    """Bicubic resize of the shorter side, then centre crop (TiTok, MaskGIT)."""
    return _center(RESIZES["bicubic"](image, size), size)


def center_crop_bilinear(image: Image.Image, size: int) -> Image.Image:
    """Bilinear resize of the shorter side, then centre crop."""
    return _center(RESIZES["bilinear"](image, size), size)


def center_crop_var(image: Image.Image, size: int) -> Image.Image:
    """Lanczos resize of the shorter side to round(1.125 size), then centre crop (VAR)."""
    return _center(RESIZES["var"](image, size), size)


CENTER_CROPS: dict[str, Crop] = {
    "adm": center_crop_adm,
    "bicubic": center_crop_bicubic,
    "bilinear": center_crop_bilinear,
    "var": center_crop_var,
}


def center_crop(name: str) -> Crop:
    """The centre crop of that id.

    Raises:
        ConfigError: unknown.
    """
    if name not in CENTER_CROPS:
        raise ConfigError(f"data.dataset.crop={name!r} is unknown; choose one of {', '.join(CENTER_CROPS)}")
    return CENTER_CROPS[name]


def random_position_crop(name: str) -> RandomCrop:
    """A crop at a random position, of the image resized as the centre crop of that id resizes it.

    Draws in the order top, left. TiTok and IBQ train on such crops of a shorter side of the crop's size (bicubic and
    bilinear), VAR on those of a larger one (var).
    """
    center_crop(name)  # refuses an unknown id
    return partial(_crop_anywhere, name)  # no closure: loader processes may have to pickle it


def _crop_anywhere(name: str, image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    return _cut_anywhere(RESIZES[name](image, size), size, rng)


def mirror(image: Image.Image) -> Image.Image:
    """Horizontal flip."""
    return image.transpose(Image.FLIP_LEFT_RIGHT)


def ten_crop(image: Image.Image, size: int) -> list[Image.Image]:
    """RAR's ten views: four corners and centre of ADM's crop to int(1.1 size), then the same of its mirror image.

    Source: bytedance/1d-tokenizer, scripts/pretokenization.py (torchvision's TenCrop).
    """
    large = center_crop_adm(image, int(1.1 * size))
    end = large.width - size
    middle = round(end / 2.0)
    corners = ((0, 0), (end, 0), (0, end), (end, end), (middle, middle))
    return [_cut(view, left, top, size) for view in (large, mirror(large)) for left, top in corners]


def sample_random(seed: int, epoch: int, index: int) -> random.Random:
    """A sample's own generator: a function of (seed, epoch, index), whatever the worker, the process or the order."""
    return random.Random(f"{seed}/{epoch}/{index}")
