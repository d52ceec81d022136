"""Weight files: what is read of a pickle, and what is refused."""

import argparse
import hashlib
import os
import types
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from tessera.errors import CheckpointError, MissingFileError
from tessera.zoo.files import part_of, read_public, require_hash

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)}
CHECKPOINT = {
    "ema": OrderedDict(WEIGHTS),
    "args": argparse.Namespace(lr=3e-5, name="x", scales=[16], nested={"deep": (1, None)}),
    "steps": 7,
}


class Trap:
    """Leaves a file behind where a pickle of it is read without restriction."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_pickles_are_read(tmp_path, zipped):
    torch.save(CHECKPOINT, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    found = read_public(tmp_path / "a.pt", "")
    assert found["args"] == CHECKPOINT["args"] and found["steps"] == 7
    assert all(torch.equal(found["ema"][key], value) for key, value in WEIGHTS.items())


def test_safetensors_are_told_by_their_content(tmp_path):
    save_file(WEIGHTS, tmp_path / "weights.bin")
    assert torch.equal(read_public(tmp_path / "weights.bin", "")["a.weight"], WEIGHTS["a.weight"])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda folder: Trap(folder / "trapped"), "posix.mkdir"),
        (lambda folder: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (lambda folder: types.SimpleNamespace(), "types.SimpleNamespace"),
    ],
)
def test_pickles_with_foreign_objects_are_refused(tmp_path, zipped, content, named):
    torch.save({"ema": WEIGHTS, "x": content(tmp_path)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=rf"a\.pt is refused: it holds {named}, and reading that could run code"):
        read_public(tmp_path / "a.pt", "")
    assert not (tmp_path / "trapped").exists()


def cut(path, share=0.6):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def test_truncated_files_are_refused(tmp_path):
    torch.save(CHECKPOINT, tmp_path / "zipped.pt")
    torch.save(CHECKPOINT, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    for path in list(tmp_path.iterdir()):
        cut(path)
        with pytest.raises(CheckpointError, match=rf"{path.name} .*truncated.*download it again"):
            read_public(path, "")


@pytest.mark.parametrize(
    "content", [b"", b"<html>no such file</html>", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_what_is_no_weight_file_is_refused(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.bin is no weight file.*download it again"):
        read_public(tmp_path / "a.bin", "")
    with pytest.raises(MissingFileError, match=r"b\.bin does not exist; look there, or give its path"):
        read_public(tmp_path / "b.bin", "look there")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds list"):
        read_public(tmp_path / "list.pt", "")


def test_hash(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"content")
    right = hashlib.sha256(b"content").hexdigest()
    require_hash(path, right, "some/model")
    with pytest.raises(CheckpointError, match=rf"sha256 {right[:16]}.*some/model has 0{{16}}.*download it again"):
        require_hash(path, "0" * 64, "some/model")


def test_the_first_part_that_is_there_is_taken():
    content = {"model": {"x": 1}, "trainer": {"vae": {"y": 2}}, "steps": 3}
    assert part_of(content, ["ema", "model"]) == {"x": 1}
    assert part_of(content, ["trainer.vae"]) == {"y": 2}
    assert part_of(content, ["steps", "trainer.none"]) is content
