"""eval.py zoo=...: what of a published checkpoint is adopted, its published figures beside ours, and refusals."""

import dataclasses
import logging
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from run.checkpoints import CONF, run
from stage_setup import tokenizer
from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.run.load import check_token_space, load_generator, load_tokenizer
from tessera.run.published import adopt_published, beside
from tessera.zoo import registry

TINY = Path(registry.__file__).parent / "tiny/digits"


def config(*overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("eval", overrides=list(overrides))


def test_a_published_generator_is_measured_beside_its_figures(tmp_path, monkeypatch, caplog):
    entry = registry.info("tessera/digits_rar")
    reported = dataclasses.replace(entry, reported={"gFID": 1.5, "IS_paper": 9.0}, protocol="of a test")
    monkeypatch.setitem(registry._table(), entry.name, reported)
    with caplog.at_level(logging.INFO):
        results = run(tmp_path, "zoo=tessera/digits_rar", "task=generation", "task.num_samples=20")
    assert results["checkpoint"] == "zoo:tessera/digits_rar"
    assert results["tokenizer_checkpoint"] == "zoo:tessera/digits_tokenizer"
    assert results["published"] == {
        "name": "tessera/digits_rar",
        "figures": {"gFID": 1.5, "IS_paper": 9.0},
        "protocol": "of a test",
    }
    [gfid] = [figure for figure in results["figures"] if figure["name"] == "gFID"]
    assert gfid["label"].startswith("gFID[digits-cnn]@N=20")
    assert f"{gfid['label']} = {gfid['value']:.4f}, published 1.5" in caplog.messages
    assert "published, not measured here: IS_paper 9" in caplog.messages
    assert "published protocol: of a test" in caplog.messages


def test_other_checkpoints_have_no_published_figures():
    assert list(beside({"figures": {}, "protocol": None}, [{"name": "gFID", "label": "gFID", "value": 1.0}])) == []


@pytest.mark.parametrize(("name", "resolution"), [("rar/b", 256), ("var/d36_512", 512)])
def test_the_conditions_of_the_published_figures_are_adopted(name, resolution, tmp_path):
    entry = registry.info(name)
    cfg = config(f"zoo={name}", f"paths.data={tmp_path}", "zoo_path=weights.bin")
    adopt_published(cfg)
    assert cfg.ckpt == f"zoo:{name}@weights.bin" and cfg.tokenizer_ckpt == f"zoo:{entry.tokenizer}"
    assert cfg.data.dataset.root == f"{tmp_path}/imagenet" and cfg.data.dataset.resolution == resolution
    assert cfg.metrics.num_samples == 50_000 and cfg.metrics.reference is None
    for key, value in entry.settings.items():
        assert cfg.sampling[key] == value


def test_adms_reference_is_taken_where_it_lies(tmp_path):
    file = tmp_path / "references/VIRTUAL_imagenet256_labeled.npz"
    file.parent.mkdir()
    file.touch()
    cfg = config("zoo=rar/b", f"paths.data={tmp_path}")
    adopt_published(cfg)
    assert cfg.metrics.reference == str(file)


def test_what_the_command_chooses_stays():
    cfg = config("zoo=rar/b", "data=digits", "metrics=digits", "sampling=rar_l", "tokenizer_ckpt=mine.ckpt")
    adopt_published(cfg)
    assert cfg.data.dataset["_target_"].endswith("DigitsImages")
    assert cfg.sampling.guidance_scale == 15.5 and cfg.tokenizer_ckpt == "mine.ckpt"


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["zoo=rar/bb"], ConfigError, r"the zoo has no 'rar/bb'; did you mean .*rar/b"),
        (["zoo=rar/b", "ckpt=x.ckpt"], ConfigError, "both models; leave one of them out"),
        (["zoo_path=x.bin"], ConfigError, "no effect without zoo=<name>"),
        (["zoo=tessera/digits_rar", "task=reconstruction"], ConfigError, "needs a tokenizer's checkpoint"),
        (["zoo=tessera/digits_tokenizer", "task=sample"], ConfigError, "needs a generator's checkpoint"),
        (["zoo=rar/b", f"zoo_path={TINY}/generator"], CheckpointError, "holds a generator of"),
        (["zoo=rar/b", "zoo_path=/nowhere.bin"], MissingFileError, "nowhere"),
    ],
)
def test_refusals(overrides, error, message, tmp_path):
    task = [] if any(text.startswith("task=") for text in overrides) else ["task=sample"]
    with pytest.raises(error, match=message):
        run(tmp_path, *task, *overrides)


def test_published_models_by_path():
    """As tokenizer.path and generator.path of a training."""
    model = load_tokenizer(f"zoo:tessera/digits_tokenizer@{TINY}/tokenizer")
    assert model.fingerprint() == load_tokenizer("zoo:tessera/digits_tokenizer").fingerprint()
    drawn = load_generator("zoo:tessera/digits_rar")
    check_token_space(drawn, model, "")
    with pytest.raises(CheckpointError):
        check_token_space(drawn, tokenizer(), "another")  # of another size
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer("zoo:tessera/digits_rar")
    with pytest.raises(CheckpointError, match="no generator"):
        load_generator("zoo:tessera/digits_tokenizer")
