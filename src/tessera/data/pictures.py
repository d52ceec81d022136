"""Pictures for people: images laid out in a grid, and PNG files that are large enough to see."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tessera.data.pixels import to_uint8
from tessera.errors import DataError


def tile(images: Tensor, columns: int, padding: int = 2) -> Tensor:
    """Lay images out in rows on white.

    Args:
        images: (B, 3, H, W) float in [-1, 1].
        columns: images per row.
        padding: white pixels around each image.

    Returns:
        (3, rows * (H + padding) + padding, columns * (W + padding) + padding) uint8.

    Raises:
        DataError: images of another shape.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise DataError(f"a grid is made of images (B, 3, H, W), not {tuple(images.shape)}")
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = torch.full(
        (3, rows * (height + padding) + padding, columns * (width + padding) + padding),
        255,
        dtype=torch.uint8,
    )
    for number, image in enumerate(to_uint8(images).cpu()):
        top = padding + number // columns * (height + padding)
        left = padding + number % columns * (width + padding)
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def write_png(path: str | Path, image: Tensor, scale: int = 1) -> None:
    """Write (3, H, W) uint8 as PNG, each pixel enlarged to `scale` x `scale`; the folder is made where needed."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    large = image.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    Image.fromarray(large.permute(1, 2, 0).contiguous().numpy()).save(path)
