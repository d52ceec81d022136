import gzip
import struct
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.data import DigitsImages, FashionMNISTImages, FolderImages
from tessera.errors import ConfigError, DataError, MissingFileError


def picture(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for number in range(6):
            picture(tmp_path / split / f"class{number % 2}" / f"{number}.png", number)
    return tmp_path


def test_digits():
    train, val = (partial(DigitsImages, resolution=16)(split=split) for split in ("train", "val"))
    assert len(train) + len(val) == 1797 and train.num_classes == 10
    sample = val[3]
    assert sample["image"].shape == (3, 16, 16) and sample["image"].min() >= -1 and sample["image"].max() <= 1
    assert torch.equal(sample["image"][0], sample["image"][2]) and sample["index"] == 3
    assert set(train.labels.tolist()) == set(range(10))
    assert train.fingerprint() != val.fingerprint()
    assert DigitsImages("val", 8).fingerprint() != val.fingerprint()
    assert DigitsImages("val", 16).fingerprint() == val.fingerprint()


def idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + array.tobytes())


def test_fashion_mnist_from_raw_files(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (5, 28, 28), dtype=np.uint8)
    idx(tmp_path / "t10k-images-idx3-ubyte.gz", pixels)
    idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.arange(5, dtype=np.uint8))
    images = FashionMNISTImages("val", tmp_path, resolution=28)
    assert len(images) == 5 and [images.label(i) for i in range(5)] == [0, 1, 2, 3, 4]
    assert np.array_equal(np.asarray(images.pil(2))[..., 1], pixels[2])
    with pytest.raises(MissingFileError, match=r"train-images.*data\.dataset\.root.*TESSERA_FASHION_MNIST"):
        FashionMNISTImages("train", tmp_path)


def test_labels_out_of_range_are_refused(tmp_path):
    idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((2, 28, 28), np.uint8))
    idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([3, 12], np.uint8))
    with pytest.raises(DataError, match=r"label 12, outside \[0, 10\)"):
        FashionMNISTImages("val", tmp_path)


def test_folder_layout_and_augmentation(folder):
    train = FolderImages("train", folder, resolution=16, seed=3)
    assert train.classes == ["class0", "class1"] and len(train) == 6 and train.num_classes == 2
    assert train[0, 4]["label"] == 1 and train[0, 4]["image"].shape == (3, 16, 16)
    assert torch.equal(train[2, 4]["image"], train[2, 4]["image"])
    assert len({train[epoch, 4]["image"].numpy().tobytes() for epoch in range(5)}) > 1
    val = FolderImages("val", folder, resolution=16)
    assert torch.equal(val[0, 1]["image"], val[7, 1]["image"])
    assert val.views(0, "ten_crop").shape == (10, 3, 16, 16)
    flipped = val.views(0, "flip")
    assert torch.equal(flipped[0].flip(-1), flipped[1])


def test_missing_folder_and_empty_folder(tmp_path):
    with pytest.raises(MissingFileError, match=r"val does not exist; set data\.dataset\.root"):
        FolderImages("val", tmp_path)
    (tmp_path / "val" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match="no images"):
        FolderImages("val", tmp_path)


def test_too_many_classes(folder):
    with pytest.raises(DataError, match=r"2 class folders but data\.dataset\.num_classes=1"):
        FolderImages("val", folder, num_classes=1)


def test_corrupt_image_is_named_or_skipped(folder):
    bad = folder / "val" / "class0" / "2.png"
    bad.write_bytes(bad.read_bytes()[:100])
    images = FolderImages("val", folder, resolution=16)
    number = images.files.index(bad)
    with pytest.raises(DataError, match=r"class0/2\.png can't be read .*data\.dataset\.on_error=skip"):
        images[number]
    skipping = FolderImages("val", folder, resolution=16, on_error="skip")
    sample = skipping[number]
    assert skipping.skipped == 1 and sample["label"] == skipping.label(number)
    assert skipping.views(number, "none").shape == (1, 3, 16, 16) and skipping.skipped == 2
    with pytest.raises(ConfigError, match=r"data\.dataset\.on_error='ignore'"):
        FolderImages("val", folder, on_error="ignore")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_eight_bit_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "val" / "a" / ("x.tif" if mode == "CMYK" else "x.png")
    path.parent.mkdir(parents=True)
    Image.new("RGB", (20, 20), (10, 200, 30)).convert(mode).save(path)
    assert FolderImages("val", tmp_path, resolution=16)[0]["image"].shape == (3, 16, 16)


def test_deep_images_are_refused(tmp_path):
    path = tmp_path / "val" / "a" / "x.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(path)
    with pytest.raises(DataError, match=r"x\.png has mode I;16.*8-bit"):
        FolderImages("val", tmp_path, resolution=16)[0]
