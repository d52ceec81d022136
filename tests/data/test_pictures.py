import pytest
import torch
from PIL import Image

from tessera.data import tile, write_png
from tessera.errors import DataError


def test_tile_places_images_in_rows():
    images = torch.stack([torch.full((3, 2, 3), value) for value in (-1.0, 0.0, 1.0)])
    canvas = tile(images, columns=2, padding=1)
    assert canvas.shape == (3, 7, 9) and canvas.dtype == torch.uint8
    assert canvas[0, 1:3, 1:4].unique().tolist() == [0]
    assert canvas[0, 1:3, 5:8].unique().tolist() == [128]
    assert canvas[0, 4:6, 1:4].unique().tolist() == [255]
    assert canvas[0, 0].unique().tolist() == [255]


def test_png_holds_the_levels(tmp_path):
    image = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    write_png(tmp_path / "a" / "b.png", image, scale=3)
    with Image.open(tmp_path / "a" / "b.png") as file:
        assert file.size == (15, 12)
        assert file.getpixel((3, 0)) == tuple(image[:, 0, 1].tolist())


def test_a_single_image_is_no_grid():
    with pytest.raises(DataError, match=r"\(B, 3, H, W\), not \(3, 4, 4\)"):
        tile(torch.zeros(3, 4, 4), columns=1)
