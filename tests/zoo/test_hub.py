"""Exports to and from the Hugging Face hub, with a stand-in for its client."""

import shutil
import sys
from types import ModuleType

import pytest
import torch

from tessera import zoo
from tessera.errors import CheckpointError, MissingFileError

NAME = "tessera/digits_rar"


class Hub(ModuleType):
    """`huggingface_hub` with repositories in a folder."""

    def __init__(self, folder, token=True):
        super().__init__("huggingface_hub")
        self.folder, self.token, self.asked = folder, token, {}

    def HfApi(self):
        return self

    def create_repo(self, repo_id, private, exist_ok):
        if not self.token:
            raise PermissionError("401 unauthorised")
        self.asked = {"private": private, "exist_ok": exist_ok}
        (self.folder / repo_id).mkdir(parents=True)

    def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
        self.asked["message"] = commit_message
        for name in allow_patterns:
            shutil.copy(f"{folder_path}/{name}", self.folder / repo_id)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(self, repo_id, allow_patterns):
        if not (self.folder / repo_id).is_dir():
            raise FileNotFoundError(f"404 {repo_id}")
        return str(self.folder / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    client = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", client)
    return client


def test_push_and_pull(hub, tmp_path):
    model = zoo.load(NAME)
    folder = zoo.export(model, tmp_path / "exported")
    (folder / "notes.txt").write_text("mine")
    assert zoo.push_to_hub(folder, "me/digits", private=True, message="First") == "https://hub/me/digits/commit/1"
    assert hub.asked == {"private": True, "exist_ok": True, "message": "First"}
    assert not (hub.folder / "me/digits/notes.txt").exists()
    pulled = zoo.from_pretrained("me/digits")
    assert pulled.sampling == model.sampling and pulled.card == model.card
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in pulled.state_dict().items())


def test_refusals(hub, tmp_path):
    with pytest.raises(MissingFileError, match=r"lacks model\.safetensors, config\.json, README\.md"):
        zoo.push_to_hub(tmp_path, "me/digits")
    folder = zoo.export(zoo.load(NAME), tmp_path / "exported")
    hub.token = False
    with pytest.raises(CheckpointError, match=r"hub refused me/digits \(PermissionError: 401.*hf auth login"):
        zoo.push_to_hub(folder, "me/digits")
    with pytest.raises(MissingFileError, match=r"me/none is no folder here; .*404 me/none"):
        zoo.from_pretrained("me/none")
    with pytest.raises(MissingFileError, match=r"/no/such/folder/config\.json does not exist"):
        zoo.from_pretrained("/no/such/folder")


def test_without_the_client(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    folder = zoo.export(zoo.load(NAME), tmp_path)
    for call in (lambda: zoo.push_to_hub(folder, "me/digits"), lambda: zoo.from_pretrained("me/digits")):
        with pytest.raises(MissingFileError, match=r"pip install tessera\[hub\]"):
            call()
