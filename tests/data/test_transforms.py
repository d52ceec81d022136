"""Crops against the published ones, and the augmentation's generator."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from golden_cases import golden
from tessera.data import transforms
from tessera.errors import ConfigError

EVAL_CROPS = {
    "center_crop_arr": "adm",
    "resize_bicubic_centercrop": "bicubic",
    "resize_bilinear_centercrop": "bilinear",
    "var_lanczos_1.125_centercrop": "var",
}


class ForcedDraws:
    """Stands for random.Random: checks the range that is asked for and gives the recorded draw."""

    def __init__(self, draws):
        self.draws = iter(draws.tolist())

    def randrange(self, start, stop=None):
        low, high = (0, start) if stop is None else (start, stop)
        expected_low, expected_high, value = next(self.draws)
        assert (low, high) == (expected_low, expected_high)
        return value


def pil(tensor):
    return Image.fromarray(tensor.numpy())


def equal(image, expected):
    """Within a grey level, as the files allow for another Pillow."""
    found = torch.from_numpy(np.array(image)).int()
    assert found.shape == expected.shape
    return (found - expected.int()).abs().max() <= 1


@pytest.mark.golden
@pytest.mark.parametrize("case", ["eval_preprocess"])
def test_golden_evaluation_crops(case):
    data = golden(case)
    seen = set()
    for key, expected in data.output.items():
        if key.startswith("u8_"):
            continue
        rule, _, number = key.rpartition("_")
        crop = transforms.center_crop(EVAL_CROPS[rule])
        assert equal(crop(pil(data.input[f"image_{number}"]), data.config["size"]), expected), key
        seen.add(rule)
    assert seen == set(EVAL_CROPS)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["xqgan_crops"])
def test_golden_training_crops(case):
    data = golden(case)
    size = data.config["image_size"]
    for key, image in data.input.items():
        number = key.rpartition("_")[2]
        assert equal(transforms.center_crop_adm(pil(image), size), data.output[f"center_{number}"])
        rng = ForcedDraws(data.output[f"random_{number}_draws"])
        assert equal(transforms.random_crop_adm(pil(image), size, rng), data.output[f"random_{number}"])
        assert next(rng.draws, None) is None, "fewer draws than the published code"


@pytest.mark.golden
@pytest.mark.parametrize("case", ["rar_tencrop"])
def test_golden_ten_crop(case):
    data = golden(case)
    size = data.config["img_size"]
    for number in range(data.config["n"]):
        image = pil(data.input[f"image_{number}"])
        assert equal(transforms.center_crop_adm(image, size), data.output[f"center_crop_{number}"])
        crops = transforms.ten_crop(image, size)
        expected = data.output[f"ten_crop_{number}"].permute(0, 2, 3, 1)
        assert len(crops) == len(expected)
        assert all(equal(crop, wanted) for crop, wanted in zip(crops, expected, strict=True))


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(200, 40), (40, 200), (32, 32), (10, 7), (63, 65)])
@pytest.mark.parametrize("crop", sorted(transforms.CENTER_CROPS))
def test_crops_have_the_size_asked_for(crop, size):
    assert transforms.center_crop(crop)(noise(*size), 16).size == (16, 16)
    assert transforms.random_crop_adm(noise(*size), 16, random.Random(0)).size == (16, 16)
    assert {view.size for view in transforms.ten_crop(noise(*size), 16)} == {(16, 16)}


def test_crop_at_its_own_size_is_the_identity():
    image = noise(24, 24)
    assert np.array_equal(np.array(transforms.center_crop_adm(image, 24)), np.array(image))


def test_random_crop_covers_the_fractions():
    sides = set()

    class Recording(random.Random):
        def randrange(self, start, stop=None):
            if stop is not None:
                sides.update((start, stop - 1))
            return super().randrange(start, stop) if stop is not None else super().randrange(start)

    transforms.random_crop_adm(noise(90, 60), 32, Recording(0), min_fraction=0.7, max_fraction=0.9)
    assert sides == {36, 46}  # ceil(32 / 0.9), ceil(32 / 0.7)


def test_unknown_crop_is_refused():
    with pytest.raises(ConfigError, match=r"data\.dataset\.crop='centre'.*adm"):
        transforms.center_crop("centre")


def test_sample_generator_is_a_function_of_seed_epoch_and_index():
    keys = [(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(20)]
    first = [transforms.sample_random(*key).random() for key in keys]
    assert first == [transforms.sample_random(*key).random() for key in keys]
    assert len(set(first)) == len(keys)
    # neighbours that a joined-up number would confuse
    assert transforms.sample_random(1, 11, 1).random() != transforms.sample_random(11, 1, 1).random()
