"""Checkpoints by name: names, downloads, files of other models, and the models that come with the package."""

import hashlib
import re
import sys
from dataclasses import replace
from importlib.resources import files
from types import ModuleType

import pytest
import torch

from conf_commands import ROOT
from golden_cases import golden
from tessera import zoo
from tessera.data import to_uint8
from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.metrics import DigitsFeatures
from tessera.zoo import registry
from tessera.zoo.card import card_text
from zoo.published_rows import meta_state

pytestmark = pytest.mark.usefixtures("shipped_files")
NAME = "rar/tiny"


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A registered checkpoint of the size of the golden RAR, and its file."""
    file = golden("rar_generate")
    options = file.config["rar"]
    entry = replace(zoo.info("rar/b"), name=NAME, config=options, params_millions=None, filename="tiny.bin")
    monkeypatch.setitem(registry._table(), NAME, entry)
    torch.save(file.weights, tmp_path / "tiny.bin")
    return tmp_path / "tiny.bin", file


def change(monkeypatch, **fields):
    monkeypatch.setitem(registry._table(), NAME, replace(zoo.info(NAME), **fields))


def test_names():
    assert {"rar/b", "robustok/main_train", "tessera/digits_rar", "eval/inception"} <= set(zoo.names())
    assert set(zoo.names()) == {*zoo.names("tokenizer"), *zoo.names("generator"), *zoo.names("extractor")}
    assert not set(zoo.names()) & set(zoo.names("file"))
    with pytest.raises(ConfigError, match="kind='model' is unknown"):
        zoo.names("model")


@pytest.mark.parametrize(
    ("wrong", "suggested"),
    [("robustok/maintrain", "robustok/main_train"), ("VAR-d16", "var/d16"), ("rar_xl", "rar/xl"), ("rar/bb", "rar/b")],
)
def test_unknown_names_lead_to_the_nearest(wrong, suggested):
    with pytest.raises(ConfigError, match=f"no '{wrong}'; did you mean .*{suggested}"):
        zoo.load(wrong)


def test_a_name_like_no_other_leads_to_the_list():
    with pytest.raises(ConfigError, match=r"zoo\.names\(\) lists all"):
        zoo.info("?")


def test_a_file_is_loaded_with_the_published_sampling(tiny):
    path, file = tiny
    model = zoo.load(NAME, path)
    assert model.sampling.guidance_scale == 16.0 and model.sampling.guidance_power == 2.75
    assert all(torch.equal(value, file.weights[key]) for key, value in model.state_dict().items())


def test_a_downloaded_repository_is_loaded(tiny):
    """Also one with a config.json of the publisher's, as TiTok's."""
    path, file = tiny
    (path.parent / "config.json").write_text('{"model": {}}')
    model = zoo.load(NAME, path.parent)
    assert all(torch.equal(value, file.weights[key]) for key, value in model.state_dict().items())
    path.unlink()
    with pytest.raises(MissingFileError, match=r"model\.safetensors does not exist"):
        zoo.load(NAME, path.parent)


def test_an_export_of_it_is_loaded_too(tiny, tmp_path, monkeypatch):
    model = zoo.load(NAME, tiny[0])
    folder = zoo.export(model, tmp_path / "exported")
    again = zoo.load(NAME, folder)
    assert again.sampling == model.sampling
    text = (folder / "README.md").read_text()
    assert "| gFID | 1.95 | 50 000 samples, 50 per class, ADM evaluator |" in text
    assert "Converted from tiny.bin in yucornetto/RAR, of bytedance/1d-tokenizer." in text
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    change(monkeypatch, params_millions=260.924)
    with pytest.raises(CheckpointError, match=r"holds a generator of 0\.\d+ M parameters, but rar/tiny is .* 260\.924"):
        zoo.load(NAME, folder)


def test_a_file_is_downloaded(tiny, monkeypatch):
    asked = {}

    def hf_hub_download(**arguments):
        asked.update(arguments)
        return str(tiny[0])

    fake = ModuleType("huggingface_hub")
    fake.hf_hub_download = hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert zoo.load(NAME).num_tokens == zoo.load(NAME, tiny[0]).num_tokens
    assert asked == {"repo_id": "yucornetto/RAR", "filename": "tiny.bin"}

    def offline(**arguments):
        raise ConnectionError("no route to host\nmore lines")

    fake.hf_hub_download = offline
    with pytest.raises(
        MissingFileError, match=r"tiny\.bin of yucornetto/RAR .*failed \(ConnectionError: no route"
    ) as e:
        zoo.load(NAME)
    assert 'zoo.load("rar/tiny", path=...)' in str(e.value) and "more lines" not in str(e.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingFileError, match=r"pip install tessera\[hub\]"):
        zoo.load(NAME)
    change(monkeypatch, repository=None)
    with pytest.raises(ConfigError, match="in no repository; give its path"):
        zoo.load(NAME)


def test_the_hash_is_checked_where_it_is_known(tiny, monkeypatch):
    path, _ = tiny
    change(monkeypatch, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    assert zoo.load(NAME, path)
    change(monkeypatch, sha256="0" * 64)
    with pytest.raises(CheckpointError, match=r"tiny\.bin has the sha256"):
        zoo.load(NAME, path)
    assert zoo.load(NAME, path, check_hash=False)


def test_another_models_file_is_named(tmp_path):
    """The file of RAR-B with 1 024 codes, where that of RobusTok with 4 096 is due; they have the same name."""
    path = tmp_path / "rar_b.bin"
    torch.save(meta_state("rar", "rar_b"), path)
    with pytest.raises(CheckpointError) as error:
        zoo.load("robustok/generator_b", path)
    message = str(error.value)
    assert "is not robustok/generator_b" in message and message.endswith("; it fits rar/b")
    assert "embeddings.weight is (2026, 768), not (5098, 768)" in message


def test_long_lists_of_problems_are_shortened(tiny):
    path, file = tiny
    torch.save({f"other.{key}": value for key, value in file.weights.items()}, path)
    with pytest.raises(CheckpointError, match=r"rar_?\w*/?\w*.*missing .*; and \d+ more$") as error:
        zoo.load(NAME, path)
    assert len(str(error.value)) < 1000


def test_files_that_are_no_models_say_what_takes_them(tmp_path):
    for name in zoo.names("file"):
        with pytest.raises(ConfigError, match="is no model of its own: "):
            zoo.load(name, tmp_path)


def test_the_inception_is_an_extractor(tmp_path):
    with pytest.raises(MissingFileError, match=r"none\.pth"):
        zoo.load("eval/inception", tmp_path / "none.pth")


def test_the_digits_models_make_digits():
    """The models that come with the package, without Hydra, network or files."""
    tokenizer, generator = zoo.load("tessera/digits_tokenizer"), zoo.load("tessera/digits_rar")
    generator.bind(tokenizer.quantizer)
    assert generator.tokenizer_fingerprint == tokenizer.fingerprint()
    labels = torch.arange(10).repeat(20)
    with torch.no_grad():
        tokens = generator.generate(labels, generator.sampling, rng=torch.Generator().manual_seed(0))
        images = tokenizer.detokenize(tokens)
        features = DigitsFeatures().all_features(to_uint8(images))
    assert images.shape == (200, 3, 16, 16) and images.abs().max() <= 1
    assert (features.logits.argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("name", ["tessera/digits_tokenizer", "tessera/digits_rar"])
def test_the_digits_models_have_cards(name):
    model, entry = zoo.load(name), zoo.info(name)
    assert model.card.licence == entry.licence == "Apache-2.0"
    assert any("FID[digits-cnn]" in figure["label"] for figure in model.card.figures)
    assert "experiment=digits/tiny_" in model.card.command
    folder = files("tessera.zoo") / "tiny" / entry.folder
    assert folder.joinpath("README.md").read_text() == card_text(model, model.card)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 0.75e6  # 1.5 MB for both


def test_the_lines_in_the_readme_run():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    [lines] = [block for block in blocks if "tessera/digits_rar" in block]
    scope = {}
    exec(lines, scope)
    assert scope["images"].shape == (10, 3, 16, 16)
