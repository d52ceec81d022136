"""The data sets held in memory."""

import gzip
import struct
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from tessera.data import DigitsImages, FashionMNISTImages
from tessera.data.images import ArrayImages
from tessera.errors import ConfigError, DataError, MissingFileError


def idx(path, array):
    """Write a raw Fashion-MNIST file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        file.write(header + array.tobytes())


def fashion(folder, suffix="", prefix="t10k", count=5, labels=None):
    pixels = np.random.default_rng(0).integers(0, 255, (count, 28, 28), dtype=np.uint8)
    idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", pixels)
    idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", np.asarray(labels or range(count), dtype=np.uint8))
    return pixels


def test_digits_splits_share_no_image_and_cover_all():
    train, val = (partial(DigitsImages, resolution=8)(split=split) for split in ("train", "val"))
    assert (len(train), len(val)) == (1438, 359)
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert np.array_equal(val.labels, digits.target[4::5])
    assert np.array_equal(val.pixels[0], np.rint(digits.images[4] * 255 / 16).astype(np.uint8))
    assert set(train.labels.tolist()) == set(val.labels.tolist()) == set(range(10))


def test_sample_format():
    val = DigitsImages("val")
    sample = val[3]
    assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.float32
    assert sample["image"].min() == -1 and sample["image"].max() <= 1
    assert torch.equal(sample["image"][0], sample["image"][2])
    assert (sample["label"], sample["index"]) == (val.label(3), 3)
    assert torch.equal(val[7, 3]["image"], sample["image"]), "a key may carry an epoch"
    keys = [(0, 5), 2, (3, 5)]
    batch, one_by_one = val[keys], default_collate([val[key] for key in keys])
    assert batch["image"].shape == (3, 3, 16, 16) and batch["index"].tolist() == [5, 2, 5]
    for name, values in one_by_one.items():
        assert torch.equal(batch[name], values) and batch[name].dtype == values.dtype
    for outside in (-1, len(val)):
        with pytest.raises(IndexError):
            val[outside]


def test_fingerprint_is_the_identity_of_the_images():
    prints = [DigitsImages("val", 16), DigitsImages("val", 16), DigitsImages("val", 8), DigitsImages("train", 16)]
    first, second, other_size, other_split = (images.fingerprint() for images in prints)
    assert first == second and len({first, other_size, other_split}) == 3
    changed = DigitsImages("val", 16)
    changed.pixels = changed.pixels.copy()
    changed.pixels[7, 3, 3] ^= 1
    assert changed.fingerprint() != first


def test_views_are_the_fixed_crops():
    images = DigitsImages("val")
    one, two, ten = (images.views(5, views) for views in ("none", "flip", "ten_crop"))
    assert torch.equal(one["image"][0], images[5]["image"])
    assert torch.equal(two["image"], torch.stack([one["image"][0], one["image"][0].flip(-1)]))
    assert ten["image"].shape == (10, 3, 16, 16) and (ten["label"], ten["index"]) == (images.label(5), 5)
    with pytest.raises(ConfigError, match=r"tokens\.views='five'"):
        images.views(5, "five")


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw"])
def test_fashion_mnist_from_raw_files(tmp_path, suffix, below):
    pixels = fashion(tmp_path / below, suffix)
    images = FashionMNISTImages("val", tmp_path, resolution=28)
    assert len(images) == 5 and [images.label(i) for i in range(5)] == [0, 1, 2, 3, 4]
    assert torch.equal(images[2]["image"][1], torch.from_numpy(pixels[2]).float() / 127.5 - 1)


def test_fashion_mnist_padded_keeps_its_pixels(tmp_path):
    pixels = fashion(tmp_path)
    padded = FashionMNISTImages("val", tmp_path, resolution=33, pad=True)
    assert np.array_equal(padded.pixels[:, 2:30, 2:30], pixels) and padded.pixels.shape[1:] == (33, 33)
    assert padded.pixels.astype(int).sum() == pixels.astype(int).sum()
    assert padded.crop_id == "pad-33" != FashionMNISTImages("val", tmp_path, resolution=33).crop_id
    with pytest.raises(ConfigError, match=r"data\.dataset\.resolution=16.*data\.dataset\.pad=false"):
        FashionMNISTImages("val", tmp_path, resolution=16, pad=True)


def test_missing_fashion_mnist_says_where_to_put_it(tmp_path):
    fashion(tmp_path)
    with pytest.raises(MissingFileError, match=r"train-images.*data\.dataset\.root.*TESSERA_DATA.*download=true"):
        FashionMNISTImages("train", tmp_path)


def test_damaged_fashion_mnist_is_named(tmp_path):
    fashion(tmp_path, ".gz")
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz can't be read"):
        FashionMNISTImages("val", tmp_path)


def test_labels_out_of_range_or_number_are_refused(tmp_path):
    fashion(tmp_path, labels=[3, 12, 0, 0, 0])
    with pytest.raises(DataError, match=r"label 12, outside \[0, 10\)"):
        FashionMNISTImages("val", tmp_path)
    with pytest.raises(DataError, match="label -1"):
        ArrayImages(np.zeros((1, 4, 4), np.uint8), np.array([-1]), "val", 4, "x", 2)
    with pytest.raises(DataError, match="2 images but 1 labels"):
        ArrayImages(np.zeros((2, 4, 4), np.uint8), np.array([0]), "val", 4, "x", 2)


@pytest.mark.parametrize(("split", "resolution", "key"), [("test", 16, "split"), ("val", 0, "resolution")])
def test_wrong_arguments_are_refused(split, resolution, key):
    with pytest.raises(ConfigError, match=key):
        DigitsImages(split, resolution)
