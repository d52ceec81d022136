import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from golden_cases import golden
from tessera.data import transforms
from tessera.data.pixels import from_uint8, to_uint8
from tessera.errors import ConfigError, DataError


def numbered(tensors: dict[str, torch.Tensor], prefix: str) -> dict[int, torch.Tensor]:
    """Tensors named <prefix><number>, by number."""
    found = {re.fullmatch(rf"{prefix}(\d+)", name): value for name, value in tensors.items()}
    return {int(match[1]): value for match, value in found.items() if match}


def pil(tensor: torch.Tensor) -> Image.Image:
    return Image.fromarray(tensor.numpy())


def assert_levels(image: Image.Image, expected: torch.Tensor) -> None:
    """Equal within the one grey level that Pillow versions differ by."""
    actual = np.asarray(image).astype(int)
    assert actual.shape == tuple(expected.shape)
    assert np.abs(actual - expected.numpy().astype(int)).max() <= 1


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_crops"])
def test_crops(case):
    data = golden(case)
    size = data.config["image_size"]
    images = numbered(data.input, "image_")
    assert images
    for number, image in images.items():
        assert_levels(transforms.center_crop_adm(pil(image), size), data.output[f"center_{number}"])
        draws = data.output[f"random_{number}_draws"].tolist()
        forced = Forced(draws)
        assert_levels(transforms.random_crop_adm(pil(image), size, forced), data.output[f"random_{number}"])
        assert not forced.draws


class Forced(random.Random):
    """Returns recorded draws and checks that they are asked for with the recorded bounds."""

    def __init__(self, draws):
        super().__init__(0)
        self.draws = list(draws)

    def randrange(self, *bounds):
        low, high = bounds if len(bounds) == 2 else (0, bounds[0])
        expected_low, expected_high, value = self.draws.pop(0)
        assert (low, high) == (expected_low, expected_high)
        return value


@pytest.mark.golden
@pytest.mark.parametrize("case", ["rar_tencrop"])
def test_ten_crop(case):
    data = golden(case)
    size = data.config["img_size"]
    images = numbered(data.input, "image_")
    assert images
    for number, image in images.items():
        assert_levels(transforms.center_crop_adm(pil(image), size), data.output[f"center_crop_{number}"])
        crops = transforms.ten_crop(pil(image), size)
        expected = data.output[f"ten_crop_{number}"]
        assert len(crops) == len(expected)
        for crop, target in zip(crops, expected, strict=True):
            assert_levels(crop, target.permute(1, 2, 0))


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_preprocess"])
def test_preprocess(case):
    data = golden(case)
    size = data.config["size"]
    crops = {
        "center_crop_arr_": "adm",
        "resize_bicubic_centercrop_": "bicubic",
        "resize_bilinear_centercrop_": "bilinear",
        "var_lanczos_1.125_centercrop_": "var",
    }
    images = numbered(data.input, "image_")
    assert images
    for prefix, name in crops.items():
        expected = numbered(data.output, re.escape(prefix))
        assert expected.keys() == images.keys()
        for number, target in expected.items():
            assert_levels(transforms.center_crop(name)(pil(images[number]), size), target)
    pm1, unit = data.input["pm1"], data.input["unit"]
    assert torch.equal(to_uint8(pm1), data.output["u8_pm1/adm_127.5x_plus_128"])
    assert torch.equal(to_uint8(pm1, "half_even"), data.output["u8_pm1/round_half_even"])
    assert torch.equal(to_uint8(pm1, "truncate"), data.output["u8_pm1/seedvoken_clamp_half_times255_trunc"])
    for name in ("imagefolder_var_255x_clamp_trunc", "titok_clamp_times255_trunc"):
        assert torch.equal((unit * 255).clamp(0, 255).to(torch.uint8), data.output[f"u8_unit/{name}"])


def test_uint8_round_trip_is_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    for rounding in ("half_up", "half_even"):
        assert torch.equal(to_uint8(from_uint8(levels), rounding), levels)


def test_uint8_range_is_checked():
    with pytest.raises(DataError, match=r"50\.00% of the pixels"):
        to_uint8(torch.tensor([0.0, 200.0]), tolerance=1e-3)
    assert to_uint8(torch.tensor([5.0, -5.0])).tolist() == [255, 0]
    with pytest.raises(DataError, match="int64"):
        to_uint8(torch.tensor([1]))


def test_unknown_crop_names_the_key():
    with pytest.raises(ConfigError, match=r"data\.dataset\.crop='middle'.*adm"):
        transforms.center_crop("middle")


def test_augmentation_depends_on_seed_epoch_and_index_only():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))

    def crop(*key):
        return np.asarray(transforms.random_crop_adm(image, 32, transforms.sample_random(*key)))

    assert np.array_equal(crop(0, 1, 2), crop(0, 1, 2))
    assert len({crop(0, epoch, index).tobytes() for epoch in range(3) for index in range(3)}) > 5
