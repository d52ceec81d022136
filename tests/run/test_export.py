"""eval.py task=export: the models of a run as folders, with the figures of the run in their cards."""

import json

import numpy as np
import pytest
import torch

from run import checkpoints
from run.checkpoints import run, write
from stage_setup import generator, tokenizer
from tessera.errors import CheckpointError, MissingFileError
from tessera.run import export
from tessera.zoo import from_pretrained

RECORD = {
    "overrides": ["experiment=digits/generator"],
    "command": "python /somewhere/train.py experiment=digits/generator seed=1",
    "git": {"commit": "0123abc", "dirty": True},
}
SAMPLING = {"_target_": "tessera.generators.SamplingConfig", "temperature": 0.9}


def results(path, value):
    figure = {"name": "gFID", "label": "gFID[digits-cnn]@N=10", "value": value, "protocol": {"samples": 10}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"figures": [figure]}))
    return path


@pytest.fixture
def trained(tmp_path):
    """Checkpoint of a run of a generator, whose tokenizer's run left no results."""
    made_by = tmp_path / "tokens" / "checkpoints"
    path = write(made_by / "last.ckpt", "tokenizer", tokenizer(), checkpoints.TOKENIZER, **described("tokens"))
    config = described("digits/generator")
    config["config"] |= {"generator": {}, "tokenizer": {"path": str(path)}, "sampling": SAMPLING}
    config["tokenizer_fingerprint"] = tokenizer().fingerprint()
    results(tmp_path / "run" / "results.json", 1.5)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    return write(last, "generator", generator(), checkpoints.GENERATOR, **config)


def described(name):
    return {**RECORD, "config": {**checkpoints.CONFIG, "name": name}}


def test_generator_and_tokenizer_of_a_run(trained, tmp_path):
    found = run(tmp_path, "task=export", f"ckpt={trained}", "name=exported", "task.licence=MIT")
    folders = found["folders"]
    assert list(folders) == ["tokenizer", "generator"]
    assert folders["generator"] == str(tmp_path / "exported" / "export" / "generator")

    decoder, sampler = from_pretrained(folders["tokenizer"]), from_pretrained(folders["generator"])
    sampler.bind(decoder.quantizer)
    labels = torch.arange(3)
    tokens = sampler.generate(labels, sampler.sampling, rng=torch.Generator().manual_seed(0))
    expected = generator().eval().generate(labels, sampler.sampling, rng=torch.Generator().manual_seed(0))
    assert sampler.sampling.temperature == 0.9 and torch.equal(tokens, expected)
    assert torch.equal(decoder.detokenize(tokens), tokenizer().eval().detokenize(tokens))
    assert sampler.tokenizer_fingerprint == decoder.fingerprint() == tokenizer().fingerprint()

    card = sampler.card
    assert [figure["value"] for figure in card.figures] == [1.5]
    assert (card.name, card.licence, card.weights) == ("digits/generator generator", "MIT", "raw")
    assert card.command == "python train.py experiment=digits/generator seed=1"
    assert card.commit == "0123abc (with changes)" and card.dataset == "DigitsImages"
    assert decoder.card.name == "tokens tokenizer" and list(decoder.card.figures) == []


def test_figures_of_other_results(trained, tmp_path):
    files = [str(results(tmp_path / "a" / "results.json", 2.5)), str(results(tmp_path / "b" / "results.json", 3.5))]
    chosen = ["task=export", f"ckpt={trained}", f"task.folder={tmp_path}/out", "task.title=mine"]
    run(tmp_path, *chosen, f"task.results=[{','.join(files)}]")
    model = from_pretrained(tmp_path / "out" / "generator")
    assert [figure["value"] for figure in model.card.figures] == [2.5, 3.5] and model.card.name == "mine generator"
    with pytest.raises(MissingFileError, match=r"task\.results: .*none\.json does not exist"):
        run(tmp_path, *chosen, f"task.results=[{tmp_path}/none.json]")
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"none\.json is not the results\.json of a run"):
        run(tmp_path, *chosen, f"task.results=[{tmp_path}/none.json]")


def test_a_tokenizer_and_its_export(trained, tmp_path):
    """Of a tokenizer's checkpoint there is one folder; an export is exported with the card it has."""
    tokens = tmp_path / "tokens" / "checkpoints" / "last.ckpt"
    found = run(tmp_path, "task=export", f"ckpt={tokens}", "name=first", "task.licence=MIT")
    assert list(found["folders"]) == ["tokenizer"]
    again = run(tmp_path, "task=export", f"ckpt={found['folders']['tokenizer']}", "name=second")
    assert from_pretrained(again["folders"]["tokenizer"]).card == from_pretrained(found["folders"]["tokenizer"]).card


def test_an_exported_generator_is_evaluated(trained, tmp_path):
    """With its own sampling, as the checkpoint with its training's."""
    folders = run(tmp_path, "task=export", f"ckpt={trained}")["folders"]
    chosen = ["task=sample", "task.num_samples=4", "task.batch_size=2"]
    exported = [f"ckpt={folders['generator']}", f"tokenizer_ckpt={folders['tokenizer']}"]
    for name, checkpoint in (("exported", exported), ("trained", [f"ckpt={trained}"])):
        run(tmp_path, *chosen, *checkpoint, f"name={name}")
    images = [np.load(tmp_path / name / "samples" / "samples.npz")["arr_0"] for name in ("exported", "trained")]
    assert images[0].shape == (4, 16, 16, 3) and np.array_equal(*images)


def test_uploads(trained, tmp_path, monkeypatch):
    pushed = {}
    monkeypatch.setattr(export, "push_to_hub", lambda folder, name: pushed.setdefault(name, str(folder)))
    found = run(tmp_path, "task=export", f"ckpt={trained}", "task.push=me/digits")
    assert pushed == {f"me/digits-{kind}": folder for kind, folder in found["folders"].items()}
    assert found["uploads"] == found["folders"]
