"""Launching: a SLURM-like job of two processes that is stopped and requeued, and what is submitted to SLURM."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException

from conf_commands import CONF, ROOT
from forked import run_forked
from tessera import cli
from tessera.errors import ConfigError
from tessera.run.launch import SubmititEnvironment
from tessera.run.train import train

TRAINING = [
    "experiment=digits/tokenizer",
    "trainer.devices=2",
    "+trainer.strategy=ddp_find_unused_parameters_true",
    "trainer.max_steps=14",
    "+trainer.limit_val_batches=0",
    "data.batch_size=8",
    "callbacks=training",
    "+callbacks.ema._target_=tessera.callbacks.EMA",
    "logger=none",
    "ckpt=auto",
]


def submitted_task(rank, world, folder):
    """Trains as task `rank` of a job, without submitting one."""
    os.environ |= {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": str(world)}
    os.environ |= {f"SUBMITIT_LOCAL_{name}": str(rank) for name in ("GLOBALID", "LOCALID")}
    with initialize_config_dir(str(CONF), version_base=None):
        train(compose("train", [*TRAINING, f"paths.outputs={folder}"]))


def run_script(tmp_path, *arguments, **environment):
    variables = {**os.environ, "TESSERA_OUTPUTS": str(tmp_path), "PYTHONPATH": str(ROOT / "tests"), **environment}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)


def test_a_requeued_job_ends_as_an_uninterrupted_one(tmp_path):
    marker = tmp_path / "sent"
    # to the process that started the tasks, which tells them, as SLURM does
    at = f"+callbacks.best={{_target_:signals.SignalAt,step:2,name:SIGTERM,marker:'{marker}',to_parent:true}}"
    command = ["-m", "hydra/launcher=local", *TRAINING, at]
    stopped = run_script(tmp_path, *command)
    run = tmp_path / "digits/tokenizer"  # of both processes, and as without a launcher
    assert stopped.returncode == cli.USER_ERROR and "continues it" in stopped.stderr.splitlines()[-1], stopped.stderr
    cut = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert cut["global_step"] == 10 and marker.exists()  # where both agreed to stop
    requeued = run_script(tmp_path, *command)
    assert requeued.returncode == 0, requeued.stderr
    found = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert sorted(path.name for path in (tmp_path / "digits").iterdir()) == ["tokenizer"]

    run_forked(submitted_task, tmp_path / "whole")
    expected = torch.load(tmp_path / "whole/digits/tokenizer/checkpoints/last.ckpt", weights_only=True)
    assert found["global_step"] == expected["global_step"] == 14
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(found["ema"], expected["ema"], rtol=0, atol=0)
    assert any(not torch.equal(value, cut["state_dict"][key]) for key, value in found["state_dict"].items())


@pytest.mark.parametrize("submitted", [True, False])
@pytest.mark.parametrize("received", [signal.SIGUSR2, signal.SIGTERM])
def test_submitit_requeues_at_the_time_limit_only(monkeypatch, submitted, received):
    seen = []
    previous = signal.signal(signal.SIGUSR2, lambda *_: seen.append("requeued"))
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    if submitted:
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    try:
        with pytest.raises(SystemExit) as stop:
            cli.hand_on(received)
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert stop.value.code == 128 + received
    assert seen == (["requeued"] if submitted and received == signal.SIGUSR2 else [])


def test_another_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_NTASKS", "4")
    environment = SubmititEnvironment()
    environment.validate_settings(2, 2)
    with pytest.raises(ConfigError, match=r"trainer\.devices=8 on trainer\.num_nodes=1 need 8 processes, .* has 4"):
        environment.validate_settings(8, 1)


def test_what_slurm_is_given(tmp_path):
    """One task per device and node, the signal before the time limit, and a refusal as one line."""
    tools = tmp_path / "bin"
    tools.mkdir()
    refuse = f'cp "$1" {tmp_path}/script\necho "Invalid account" >&2\nexit 1\n'
    for name, body in {"srun": "", "sbatch": refuse}.items():
        (tools / name).write_text("#!/bin/sh\n" + body)
        (tools / name).chmod(0o755)
    chosen = ["experiment=rar/b", "tokenizer.path=x", "ckpt=auto", "hydra.launcher.partition=gpus"]
    result = run_script(tmp_path, "-m", "hydra/launcher=slurm", *chosen, PATH=f"{tools}:{os.environ['PATH']}")
    assert result.returncode == cli.USER_ERROR
    assert result.stderr.splitlines()[-1] == "error: hydra.launcher: Invalid account"
    script = (tmp_path / "script").read_text()
    for option in ("nodes=4", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpus", "requeue", "signal=USR2@180"):
        assert f"#SBATCH --{option}\n" in script


@pytest.mark.parametrize("path", cli.PLUGINS)
def test_a_missing_plug_in_is_named(path, tmp_path):
    extra, package = cli.PLUGINS[path]
    message = cli.user_message(MissingConfigException("not found", missing_cfg_file=path), CONF, "train")
    assert f"{package}, which is not installed" in message and f"tessera[{extra}]" in message


@pytest.mark.parametrize(
    ("arguments", "excluded"),
    [
        (["seed=1"], None),
        (["-m", "seed=1,2", "experiment=a/b"], ["ckpt", "experiment", "name"]),
        (["-m", "experiment=a,b", "data.x=1"], ["ckpt", "data.x", "experiment", "name"]),
        (["-m", "experiment=a,b", "name=x", "+c=3"], ["c", "ckpt", "name"]),
        (["--multirun", "name=x,y", "quantizer/codebook=vq,ibq", "~d"], ["ckpt", "d", "experiment", "name"]),
        (["-m", "a=[1,"], None),
    ],
)
def test_job_folders_are_named_after_what_is_swept(arguments, excluded):
    options = cli.job_folder_options(arguments)
    assert options == ([f"{cli.EXCLUDE_KEYS}={excluded}".replace(" ", "")] if excluded else [])
    assert cli.job_folder_options([*arguments, *options]) == []  # once is enough
