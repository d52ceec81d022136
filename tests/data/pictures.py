"""Small images on disk and in memory for the tests of this folder."""

from pathlib import Path

import numpy as np
from PIL import Image

from tessera.data.images import ArrayImages


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return path


def image_folder(root: Path, per_class: int = 3) -> Path:
    for split in ("train", "val"):
        for number in range(2 * per_class):
            picture(root / split / f"class{number % 2}" / f"{number}.png", number)
    return root


class Squares(ArrayImages):
    """Image n is grey level n (mod 256) but for one corner pixel, its label n mod 3."""

    def __init__(self, split: str, count: int = 40, resolution: int = 4):
        pixels = np.repeat(np.arange(count) % 256, 16).reshape(count, 4, 4).astype(np.uint8)
        pixels[:, 0, 0] = 255
        super().__init__(pixels, np.arange(count) % 3, split, resolution, "squares", 3)
