"""The record of a run: what is written, what goes into checkpoints, and when there is no git."""

import subprocess
import sys

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from tessera.run.record import git_state, package_versions, save_record


@pytest.fixture
def cfg():
    return OmegaConf.create(
        {
            "seed": 3,
            "paths": {"data": "somewhere", "root": "${paths.data}/images"},
            "stage": {"_target_": "tessera.stages.TokenizerTraining", "betas": [0.9, 0.95]},
            "name": None,
        }
    )


def test_record_is_written_and_returned(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=3", "name=two words"])
    record = save_record(cfg, tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config == record["config"] and config["paths"]["root"] == "somewhere/images"
    assert OmegaConf.load(tmp_path / "config.yaml") == OmegaConf.create(config)
    [written] = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written == {key: value for key, value in record.items() if key != "config"}
    assert record["seed"] == 3 and record["stage"].endswith("TokenizerTraining")
    assert record["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert record["command"].endswith("train.py seed=3 'name=two words'")


def test_a_continued_run_keeps_its_history(cfg, tmp_path):
    save_record(cfg, tmp_path)
    cfg.seed = 4
    save_record(cfg, tmp_path)
    assert [start["seed"] for start in yaml.safe_load((tmp_path / "run.yaml").read_text())] == [3, 4]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 4


def test_the_record_is_plain_enough_for_a_checkpoint(cfg, tmp_path):
    record = save_record(cfg, tmp_path)
    torch.save({"tessera": record}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["tessera"] == record


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_only_the_first_process_writes(cfg, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert save_record(cfg, tmp_path)["seed"] == 3
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(name, "0")
    save_record(cfg, tmp_path)
    assert (tmp_path / "run.yaml").exists()


def test_a_missing_value_is_refused(cfg, tmp_path):
    cfg.name = "???"
    with pytest.raises(MissingMandatoryValue, match="name"):
        save_record(cfg, tmp_path)
    assert not list(tmp_path.iterdir())


def test_overrides_of_a_hydra_run(cfg, tmp_path):
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig

    (tmp_path / "train.yaml").write_text("seed: 1\nvalue: 2\n")
    with initialize_config_dir(str(tmp_path), version_base=None):
        full = compose("train", ["seed=5", "value=9"], return_hydra_config=True)
    previous = HydraConfig.instance().cfg
    try:
        HydraConfig.instance().set_config(full)
        assert save_record(cfg, tmp_path)["overrides"] == ["seed=5", "value=9"]
    finally:
        HydraConfig.instance().cfg = previous


def git(folder, *arguments):
    command = ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_git_state(tmp_path, monkeypatch):
    source = tmp_path / "code.py"
    source.write_text("1")
    assert git_state(source) is None  # no repository
    git(tmp_path, "init", "-q")
    assert git_state(source) is None  # not this repository's file
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    assert git_state(source) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "new.py").write_text("2")
    assert git_state(source)["dirty"] is True
    monkeypatch.setenv("PATH", "")
    assert git_state(source) is None  # no git


def test_package_versions():
    versions = package_versions()
    assert {"python", "torch", "lightning", "hydra-core"} <= versions.keys()
    assert all(isinstance(value, str) for value in versions.values())
