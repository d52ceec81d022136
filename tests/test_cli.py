"""The scripts' shared entry point: one line per user error, exit codes, sweeps, and no torch before it is needed."""

import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from tessera import cli
from tessera.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]

CONF = {
    "train.yaml": """
        defaults: [{hydra: quiet}, {data: small}, {part: none}, {model: null}, _self_, {experiment: null}]
        seed: 0
        num_threads: 3
        folder: ${oc.env:TESSERA_TEST_FOLDER,runs}
        objective: null
        needed: 1
        raises: null
        stopped_by: null
    """,
    "hydra/quiet.yaml": """
        run: {dir: '${folder}'}
        sweep: {dir: '${folder}', subdir: '${hydra.job.num}'}
        output_subdir: null
    """,
    "data/small.yaml": "resolution: 16\nroot: here\n",
    "data/large.yaml": "resolution: 256\nroot: there\n",
    "part/none.yaml": "_target_: null\n",
    "part/some.yaml": "_target_: builtins.dict\nwidth: 3\n",
    "model/rar.yaml": "depth: 2\n",
    "experiment/tiny/row.yaml": "# @package _global_\nseed: 7\n",
    "experiment/tiny/pairs.yaml": "# @package _global_\n# Command: python post_train.py experiment=tiny/pairs\n"
    "defaults: [{override /teacher: small}]\n",
}

SCRIPT = '''
"""A script as the repository's three, whose task does what the configuration says."""
from tessera.cli import hydra_entry


@hydra_entry("train")
def main(cfg):
    import os, pathlib
    from tessera.errors import DataError
    if cfg.raises == "user":
        raise DataError("data.root=x is empty;\\n  give another")
    if cfg.raises == "bug":
        raise ZeroDivisionError("the bug")
    if cfg.raises == "wrapped":
        import hydra
        hydra.utils.instantiate({"_target_": "script_parts.fail"})
    value = cfg.needed * (cfg.seed + 1)
    pathlib.Path(cfg.folder).mkdir(exist_ok=True, parents=True)
    with open(pathlib.Path(cfg.folder) / "seen.txt", "a") as file:
        file.write(f"{cfg.seed} {os.environ['OMP_NUM_THREADS']}\\n")
    return {"stopped_by": cfg.stopped_by, "figures": [{"name": "rFID", "label": "rFID[x]@N=4", "value": value}]}


if __name__ == "__main__":
    main()
'''


@pytest.fixture
def script(tmp_path):
    for name, text in CONF.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "script_parts.py").write_text(
        "from tessera.errors import ConfigError\ndef fail():\n    raise ConfigError('part.width=3 is odd; choose 2')\n"
    )
    return tmp_path / "script.py"


@pytest.fixture
def run(script, monkeypatch, capsys, tmp_path):
    """Runs the script in this process: (exit code, stderr)."""
    source = compile(script.read_text(), str(script), "exec")
    monkeypatch.setenv("TESSERA_TEST_FOLDER", str(tmp_path / "runs"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    for name in cli.THREAD_VARIABLES:
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    monkeypatch.syspath_prepend(str(tmp_path))

    def call(*arguments):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        code = 0
        try:
            exec(source, {"__name__": "__main__"})
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    handlers = list(logging.getLogger().handlers)
    yield call
    logging.getLogger().handlers[:] = handlers  # Hydra has put its own there
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.resolutoin=3"], ["unknown config key 'data.resolutoin'", "did you mean 'data.resolution'?"]),
        (["sed=3"], ["unknown config key 'sed'", "did you mean 'seed'?"]),
        (["seed=1", "data=large", "data.rot=3"], ["unknown config key 'data.rot'", "'data.root'"]),
        (["resolution=8"], ["unknown config key 'resolution'"]),
        (["~data.nothing"], ["unknown config key 'data.nothing'"]),
        (["data=smal"], ["data=smal does not exist", "did you mean 'small'?", "large, small"]),
        (["experiment=tiny/rwo"], ["experiment=tiny/rwo does not exist", "did you mean 'tiny/row'?"]),
        (["dat/x=small"], ["unknown config group 'dat/x'", "groups: ", "data"]),
        (["model.depth=3"], ["'model.depth' can't be set, as no model is chosen", "model=rar"]),
        (["part=some", "part.zoom=3"], ["unknown config key 'part.zoom'", "add it by +part.zoom=..."]),
        (["part=null"], ["part=null is no choice; leave the group out by part=none", "part=some"]),
        (["data=null"], ["data=null is no choice; leave the group out by ~data", "data=large"]),
        (["part.width=3"], ["'part.width' can't be set, as part is switched off", "part=some"]),
        (["data.root=[1,"], ["can't read 'data.root=[1,'"]),
        (["experiment=tiny/pairs"], ["is a recipe of post_train.py; run: python post_train.py experiment=tiny/pairs"]),
        (["tiny/row"], ["'tiny/row' is no setting", "did you mean experiment=tiny/row?"]),
        (["nothing"], ["'nothing' is no setting; settings are written key=value, such as"]),
        (["--experiment", "tiny/row"], ["--experiment is no option", "experiment=..., without dashes"]),
        (["--seed=3"], ["--seed is no option", "seed=..., without dashes"]),
        (["needed=???"], ["needed is required; set needed=..."]),
        (["needed=${oc.env:TESSERA_NO_SUCH_VARIABLE}"], ["needed can't be resolved", "TESSERA_NO_SUCH_VARIABLE"]),
        (["needed=${data.rot}"], ["needed can't be resolved", "data.rot"]),
        (["raises=user"], ["data.root=x is empty; give another"]),
        (["raises=wrapped"], ["part.width=3 is odd; choose 2"]),
        (["objective=gFID"], ["objective=gFID names 0 figures", "rFID[x]@N=4"]),
        (["-m", "seed=0,1", "data.rot=3"], ["unknown config key 'data.rot'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_user_errors_are_one_line(run, arguments, expected):
    code, err = run(*arguments)
    assert code == cli.USER_ERROR
    assert err.startswith("error: ") and err.count("\n") == 1
    for text in expected:
        assert text in err


def test_bugs_keep_their_traceback(run):
    with pytest.raises(ZeroDivisionError, match="the bug"):
        run("raises=bug")


def test_a_wanted_traceback_is_shown(run, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(Exception, match="Could not override 'sed'"):
        run("sed=3")


def test_runs_with_the_configured_threads(run, tmp_path):
    assert run("seed=5")[0] == 0
    assert run("experiment=tiny/row", "num_threads=2")[0] == 0
    assert (tmp_path / "runs" / "seen.txt").read_text() == "5 3\n7 2\n"


def test_a_sweep_runs_every_job(run, tmp_path):
    assert run("-m", "seed=1,2")[0] == 0
    assert (tmp_path / "runs" / "seen.txt").read_text() == "1 3\n2 3\n"


def test_a_sweep_names_the_job_that_failed(run):
    code, err = run("-m", "raises=null,user")
    assert code == cli.USER_ERROR
    assert "['raises=user']" in err and err.endswith("error: data.root=x is empty; give another\n")


def test_a_failed_run_leaves_the_reason_in_its_folder(run, tmp_path):
    run("-m", "raises=null,user")
    content = yaml.safe_load((tmp_path / "runs/1/failed.yaml").read_text())
    assert content["error"] == "data.root=x is empty; give another"
    assert content["overrides"] == ["raises=user"] and content["command"] == "python train.py raises=user"
    assert not (tmp_path / "runs/0/failed.yaml").exists()


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_run_exits_with_its_signal(run, name, code):
    assert run(f"stopped_by={name}")[0] == code


def figure(name, value):
    return {"name": name, "label": f"{name}[x]@N=4", "value": value}


def test_objective_value():
    results = {"figures": [figure("rFID", 3), figure("PSNR", 20.5)]}
    assert cli.objective_value(results, None) is results
    assert cli.objective_value(results, "rFID") == 3.0
    assert cli.objective_value(results, "PSNR[x]@N=4") == 20.5
    both = {"figures": {"before": [figure("gFID", 9)], "after_ema": [figure("gFID", 7)]}}
    assert cli.objective_value(both, "after_ema/gFID") == 7
    with pytest.raises(ConfigError, match=r"objective=gFID names 0 figures; .*before/gFID\[x\]@N=4"):
        cli.objective_value(both, "gFID")
    twice = {"figures": [figure("rFID", 3), {**figure("rFID", 4), "label": "rFID[y]@N=4"}]}
    with pytest.raises(ConfigError, match="names 2 figures"):
        cli.objective_value(twice, "rFID")


def imported_modules(*command):
    """Modules a Python command imports, and its standard output."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True, timeout=60, cwd="/"
    )
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}, result.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["--info", "defaults"]], ids=lambda arguments: " ".join(arguments)
)
@pytest.mark.parametrize("name", ["train", "post_train", "eval"])
def test_scripts_answer_without_torch(name, arguments):
    """From another working directory, as the configuration lies beside the script."""
    modules, out = imported_modules(str(ROOT / f"{name}.py"), *arguments)
    heavy = {"torch", "lightning", "torchvision", "torchmetrics", "timm", "numpy"}
    assert "hydra" in modules and not modules & heavy
    assert ("num_threads: 1" if arguments != ["--info", "defaults"] else "trainer/cpu") in out


def test_a_script_is_thin():
    for name in ("train", "post_train", "eval"):
        assert len((ROOT / f"{name}.py").read_text().splitlines()) < 40


class _Corrupt(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, number):
        raise DataError("a.png can't be read; remove it")


def test_an_error_in_a_worker_is_one_line_too():
    with pytest.raises(DataError) as caught:
        next(iter(torch.utils.data.DataLoader(_Corrupt(), num_workers=1)))
    assert "Traceback" in str(caught.value)
    assert cli.user_message(caught.value, Path(), "train") == "a.png can't be read; remove it"
