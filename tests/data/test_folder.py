"""Data sets in ImageNet's layout, and what can be wrong with the files."""

import logging
import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.pictures import image_folder, picture
from tessera.data import FolderImages
from tessera.data.transforms import RESIZES
from tessera.errors import ConfigError, DataError, MissingFileError


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path)


def test_classes_and_numbering_follow_torchvision(folder):
    from torchvision.datasets import ImageFolder

    picture(folder / "train" / "class0" / "deeper" / "0.PNG")
    picture(folder / "train" / "class0" / "10.jpg")
    (folder / "train" / "class0" / "notes.txt").write_text("no image")
    (folder / "train" / "stray.png").write_bytes(b"not in a class folder")
    images, theirs = FolderImages("train", folder, resolution=16), ImageFolder(folder / "train")
    assert images.classes == theirs.classes and images.num_classes == 2
    assert list(zip(images.files, images.labels.tolist(), strict=True)) == theirs.samples


def test_augmentation_is_a_function_of_seed_epoch_and_number(folder):
    train = FolderImages("train", folder, resolution=16, seed=3)
    views = {(epoch, n): train[epoch, n]["image"] for epoch in range(3) for n in range(len(train))}
    assert len({view.numpy().tobytes() for view in views.values()}) == len(views)
    again = FolderImages("train", folder, resolution=16, seed=3)
    for key in reversed(views):
        assert torch.equal(again[key]["image"], views[key])
    other = FolderImages("train", folder, resolution=16, seed=4)
    assert not torch.equal(other[1, 0]["image"], views[1, 0])


def test_flips_alone_leave_the_fixed_crop(folder):
    train = FolderImages("train", folder, resolution=16, random_crop=False)
    fixed = train.views(0, "flip")["image"]
    seen = [next(i for i in range(2) if torch.equal(train[e, 0]["image"], fixed[i])) for e in range(20)]
    assert 4 < sum(seen) < 16
    still = FolderImages("train", folder, resolution=16, random_crop=False, flip=False)
    assert not still.augment and torch.equal(still[9, 0]["image"], fixed[0])


@pytest.mark.parametrize("crop", ["adm", "bicubic", "bilinear", "var"])
def test_crops_at_random_positions_of_the_fixed_size(folder, crop):
    """Each view is a part of the image that the fixed crop cuts from, in several places."""
    train = FolderImages("train", folder, resolution=16, crop=crop, random_crop="position", flip=False)
    train = pickle.loads(pickle.dumps(train))
    image, _ = train.read(0)
    resized = np.asarray(RESIZES[crop](image, 16))
    found = set()
    for epoch in range(12):
        view = ((train[epoch, 0]["image"].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
        windows = np.lib.stride_tricks.sliding_window_view(resized, (16, 16), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
        places = np.argwhere((windows == view).all((2, 3, 4)))
        assert len(places), "the view is no part of the resized image"
        found.add(tuple(places[0]))
    assert len(found) > 1


def test_validation_is_not_augmented(folder):
    val = FolderImages("val", folder, resolution=16)
    assert torch.equal(val[0, 1]["image"], val[7, 1]["image"])
    plain = FolderImages("train", folder, resolution=16).without_augmentation()
    assert torch.equal(plain[5, 1]["image"], plain.views(1, "none")["image"][0])


def test_crop_is_configurable_and_part_of_the_identity(folder):
    crops = {crop: FolderImages("val", folder, 16, crop=crop) for crop in ("adm", "bicubic", "var")}
    assert crops["var"].crop_id == "var-16"
    assert len({images.fingerprint() for images in crops.values()}) == 3
    assert not torch.equal(crops["adm"][0]["image"], crops["var"][0]["image"])
    with pytest.raises(ConfigError, match=r"data\.dataset\.crop='middle'"):
        FolderImages("val", folder, crop="middle")


def test_fingerprint_sees_other_files(folder):
    before = FolderImages("train", folder, 16).fingerprint()
    assert FolderImages("train", folder, 16, seed=5, flip=False).fingerprint() == before, (
        "augmentation is no part of it"
    )
    picture(folder / "train" / "class0" / "0.png", seed=9, size=(41, 30))
    assert FolderImages("train", folder, 16).fingerprint() != before


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(MissingFileError, match=r"val does not exist; set data\.dataset\.root .*TESSERA_DATA"):
        FolderImages("val", tmp_path)
    (tmp_path / "val" / "empty").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no images; data\.dataset\.root needs"):
        FolderImages("val", tmp_path)


@pytest.mark.parametrize("expected", [1, 1000])
def test_another_number_of_classes_is_refused(folder, expected):
    with pytest.raises(DataError, match=rf"2 class folders, but data\.dataset\.num_classes={expected}"):
        FolderImages("train", folder, num_classes=expected)
    assert FolderImages("train", folder, num_classes=2).num_classes == 2


def test_validation_classes_are_those_of_training(folder):
    shutil.rmtree(folder / "val" / "class0")
    val = FolderImages("val", folder, 16)
    assert val.num_classes == 2 and set(val.labels.tolist()) == {1}, "class1 keeps its number"
    picture(folder / "val" / "another" / "0.png")
    with pytest.raises(DataError, match=r"another is a class that .*train doesn't have"):
        FolderImages("val", folder, 16)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "damage", [truncate, lambda p: p.write_bytes(b""), lambda p: p.write_text("no image"), lambda p: p.unlink()]
)
def test_unreadable_image_is_named(folder, damage):
    images = FolderImages("train", folder, resolution=16)
    damage(folder / "train" / "class0" / "2.png")
    with pytest.raises(DataError, match=r"class0/2\.png can't be read .*data\.dataset\.on_error=skip"):
        images[1]
    with pytest.raises(DataError, match=r"2\.png"):
        images.views(1, "none")
    assert images[0]["index"] == 0


def test_unreadable_images_are_skipped_and_counted(folder, caplog):
    for name in ("0", "4"):
        truncate(folder / "train" / "class0" / f"{name}.png")
    images = FolderImages("train", folder, resolution=16, on_error="skip")
    assert images.skipped == 0
    with caplog.at_level(logging.WARNING):
        samples = [images[0, number] for number in range(6)]
    assert [sample["index"] for sample in samples] == [1, 1, 1, 3, 4, 5], "the next of the class, under its own number"
    assert [sample["label"] for sample in samples] == [0, 0, 0, 1, 1, 1]
    assert images.skipped == 2 and sum("0.png" in record.message for record in caplog.records) == 1
    assert images.views(0, "none")["index"] == 1
    images[1, 0]
    assert images.skipped == 2, "each image counts once"


def test_skipped_images_of_loader_processes_are_counted_here(folder):
    truncate(folder / "train" / "class1" / "3.png")
    images = FolderImages("train", folder, resolution=16, on_error="skip")
    batches = list(DataLoader(images, batch_size=2, num_workers=2))
    assert images.skipped == 1 and sum(len(batch["index"]) for batch in batches) == 6


def test_a_class_without_readable_images_is_an_error(folder):
    for path in (folder / "train" / "class1").iterdir():
        truncate(path)
    images = FolderImages("train", folder, resolution=16, on_error="skip")
    with pytest.raises(DataError, match=r"none of the 3 images in .*class1 is readable"):
        images[4]
    with pytest.raises(ConfigError, match=r"data\.dataset\.on_error='ignore'"):
        FolderImages("train", folder, on_error="ignore")
    with pytest.raises(ConfigError, match=r"data\.dataset\.random_crop='centre'.*position"):
        FolderImages("train", folder, random_crop="centre")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "RGB"])
def test_eight_bit_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "val" / "a" / ("x.tif" if mode == "CMYK" else "x.png")
    path.parent.mkdir(parents=True)
    colour = (10, 10, 10) if mode in ("L", "LA") else (0, 0, 0) if mode == "1" else (10, 200, 30)
    Image.new("RGB", (20, 20), colour).convert(mode).save(path)
    image = FolderImages("val", tmp_path, resolution=16)[0]["image"]
    expected = torch.tensor(colour).float() / 127.5 - 1
    tolerance = 0.4 if mode == "P" else 0.01  # a web palette rounds colours
    assert image.shape == (3, 16, 16) and (image.mean((1, 2)) - expected).abs().max() < tolerance


@pytest.mark.parametrize(("array", "name"), [(np.uint16, "x.png"), (np.int32, "x.tif"), (np.float32, "x.tif")])
def test_deep_images_are_refused(tmp_path, array, name):
    path = tmp_path / "val" / "a" / name
    path.parent.mkdir(parents=True)
    Image.fromarray(np.full((20, 20), 40_000, array)).save(path)
    with pytest.raises(DataError, match=rf"{name} has more than 8 bits per channel \(mode .*8-bit RGB"):
        FolderImages("val", tmp_path, resolution=16)[0]
