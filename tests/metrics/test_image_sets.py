import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tessera.data import DigitsImages
from tessera.errors import DataError, MissingFileError
from tessera.metrics.image_sets import DatasetImageSet, TensorImageSet, image_hashes, open_images


def pixels(n: int = 11, size: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size + 1, 3), dtype=np.uint8)


def collect(images, start=0, stop=None, batch=4):
    parts = list(images.batches(start, len(images) if stop is None else stop, batch))
    return torch.cat([index for index, _ in parts]), torch.cat([x for _, x in parts])


@pytest.mark.parametrize("kind", ["npz", "compressed", "named", "npy", "folder"])
def test_every_kind_gives_the_same_images_in_any_share(kind, tmp_path):
    array = pixels()
    path = tmp_path / {"npy": "set.npy", "folder": "set"}.get(kind, "set.npz")
    if kind == "npy":
        np.save(path, array)
    elif kind == "folder":
        (path / "a").mkdir(parents=True)
        for number, image in enumerate(array):
            Image.fromarray(image).save(path / "a" / f"{number:03d}.png")
    else:
        save = np.savez_compressed if kind == "compressed" else np.savez
        save(path, **{"samples" if kind == "named" else "arr_0": array})
    images = open_images(path)
    assert (len(images), images.size, images.name) == (11, (6, 7), "set")
    expected = torch.from_numpy(array).permute(0, 3, 1, 2)
    index, found = collect(images)
    assert torch.equal(found, expected) and index.tolist() == list(range(11))
    index, found = collect(images, 3, 10, 3)
    assert torch.equal(found, expected[3:10]) and index.tolist() == list(range(3, 10))
    fingerprint = images.fingerprint()
    assert fingerprint == open_images(path).fingerprint() and len(fingerprint) == 16


def test_fingerprint_follows_content(tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        np.save(tmp_path / f"{name}.npy", pixels(seed=seed))
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(seed=seed)[0]).save(tmp_path / name / "0.png")
    for a, b in (("a.npy", "b.npy"), ("a", "b")):
        assert open_images(tmp_path / a).fingerprint() != open_images(tmp_path / b).fingerprint()


def test_labels(tmp_path):
    np.savez(tmp_path / "labelled.npz", pixels(4), np.array([3, 1, 1, 0]))
    assert open_images(tmp_path / "labelled.npz").labels.tolist() == [3, 1, 1, 0]
    for number, folder in enumerate("bab"):
        (tmp_path / "classes" / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels()[number]).save(tmp_path / "classes" / folder / f"{number}.png")
    assert open_images(tmp_path / "classes").labels.tolist() == [0, 1, 1]
    Image.fromarray(pixels()[0]).save(tmp_path / "classes" / "0.png")
    assert open_images(tmp_path / "classes").labels is None


def test_grey_files_become_rgb_and_jpeg_is_warned_about(tmp_path, caplog):
    Image.fromarray(pixels()[0][..., 0]).save(tmp_path / "0.png")
    Image.fromarray(pixels()[0]).save(tmp_path / "1.jpg")
    _, found = collect(open_images(tmp_path))
    assert found.shape == (2, 3, 6, 7) and torch.equal(found[0, 0], found[0, 2])
    assert "1 of 2 images" in caplog.text and "save samples as PNG" in caplog.text


def test_data_set():
    images = DatasetImageSet(DigitsImages("val", resolution=8))
    index, found = collect(images, 5, 12)
    expected = images.dataset[list(range(5, 12))]
    assert torch.equal(found, ((expected["image"] + 1) * 127.5).round().to(torch.uint8))
    assert index.tolist() == list(range(5, 12)) and images.labels[5:12].tolist() == expected["label"].tolist()
    assert images.name == "digits-val" and images.crop == "resize-8"


def test_images_in_memory():
    levels = torch.from_numpy(pixels()).permute(0, 3, 1, 2)
    labels = torch.arange(11)
    images = TensorImageSet(levels, name="made", labels=labels, crop="resize-6")
    assert (len(images), images.size, images.name, images.crop) == (11, (6, 7), "made", "resize-6")
    assert torch.equal(images.labels, labels)
    index, found = collect(images, 3, 10, 3)
    assert torch.equal(found, levels[3:10]) and index.tolist() == list(range(3, 10))
    as_floats = TensorImageSet(levels / 127.5 - 1)
    assert torch.equal(collect(as_floats)[1], levels) and as_floats.fingerprint() == images.fingerprint()
    assert TensorImageSet(levels.flip(0)).fingerprint() != images.fingerprint()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 6, 7, 3), None, r"\(B, 3, H, W\), not \(2, 6, 7, 3\)"),
        (torch.full((2, 3, 6, 7), 1.5), None, r"outside \[-1, 1\]"),
        (torch.zeros(2, 3, 6, 7), torch.zeros(3), r"2 images but labels of shape \(3,\)"),
    ],
)
def test_unusable_images_in_memory(images, labels, message):
    with pytest.raises(DataError, match=message):
        TensorImageSet(images, labels=labels)


def test_hashes_tell_images_apart():
    images = torch.from_numpy(pixels()).permute(0, 3, 1, 2)
    hashes = image_hashes(torch.cat([images, images[:2]]))
    assert hashes.dtype == torch.int64 and len(hashes.unique()) == 11 and torch.equal(hashes[:2], hashes[11:])


def damaged(kind: str, path):
    """Writes an unusable set and returns its path."""
    file = path / "set.npz"
    if kind == "float":
        np.savez(file, pixels().astype(np.float32))
    elif kind == "channels first":
        np.savez(file, pixels().transpose(0, 3, 1, 2))
    elif kind == "keys":
        np.savez(file, images=pixels(), labels=np.zeros(11))
    elif kind == "text":
        file.write_text("nothing")
    elif kind == "pickle":
        np.savez(file, np.array([{}], dtype=object))
    elif kind == "cut":
        stream = io.BytesIO()
        np.save(stream, pixels())
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("arr_0.npy", stream.getvalue()[:-10])
    elif kind == "empty":
        return path
    elif kind == "sizes":
        for number, image in enumerate((pixels()[0], pixels(size=7)[0])):
            Image.fromarray(image).save(path / f"{number}.png")
        return path
    elif kind == "unreadable":
        Image.fromarray(pixels()[0]).save(path / "0.png")
        (path / "1.png").write_bytes(b"no image")
        return path
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("float", r"float32, but images to be measured are uint8.*to_uint8"),
        ("channels first", r"\(11, 3, 6, 7\); images are \(N, H, W, 3\)"),
        ("keys", "keys images, labels; images are expected under arr_0"),
        ("text", r"not an \.npz"),
        ("pickle", "has shape"),
        ("cut", "ends after 10 of 11"),
        ("empty", "holds no images"),
        ("sizes", r"1\.png has 7 x 8 pixels, but .*0\.png 6 x 7"),
        ("unreadable", r"1\.png is not a readable image"),
    ],
)
def test_unusable_sets(kind, message, tmp_path):
    with pytest.raises(DataError, match=message):
        collect(open_images(damaged(kind, tmp_path)))


def test_missing(tmp_path):
    with pytest.raises(MissingFileError, match=r"none\.npz does not exist"):
        open_images(tmp_path / "none.npz")
