"""Chains of commands for published rows: what they are, that they would work, and how they are run."""

import shlex
import shutil
import subprocess

import pytest

from conf_commands import ROOT
from tessera import zoo
from tessera.errors import ConfigError
from tessera.run import reproduce
from tessera.run.chain import checkpoint_of, evaluation
from tessera.run.dry_run import DryRun
from tessera.run.rows import SYSTEMS, Step, row, rows

CHAINS = {
    "xqgan-msvr10p2_4096": ["train xqgan/msvr10p2_4096", "reconstruction", "perturbation", "linear_probe"],
    "rar-b": ["pretokenize", "train rar/b", "sample", "generation"],
    "titok/generator_s128": [
        "train titok/s128_stage1",
        "train titok/s128_stage2",
        "pretokenize",
        "train titok/generator_s128",
        "sample",
        "generation",
    ],
    "robustok-b": [
        "train robustok/main_train",
        "pretokenize",
        "train robustok/generator_b",
        "eval robustok/pairs_b",
        "post_train robustok/post_train_b",
        "sample",
        "generation",
    ],
}


def short(step):
    return f"{step.script} {step.value('experiment')}" if step.value("task") is None else step.value("task")


@pytest.mark.parametrize("name", CHAINS)
def test_chain(name, capsys):
    """All of its commands pass the checks, in this order."""
    assert [short(step) for step in reproduce.chain_of(name, checkpoint=False).steps] == CHAINS[name]
    assert reproduce.main([name, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines[1:-2]] == ["$"] * len(CHAINS[name])
    assert lines[-2] == f"{len(CHAINS[name])} commands checked; none was run"
    assert lines[-1].startswith("published: ") and any(digit in lines[-1] for digit in "0123456789")


def test_every_row_has_figures_and_a_command():
    assert {name.split("/")[0] for name in rows()} == set(SYSTEMS) and len(rows()) > 50
    for name in rows():
        found = row(name)
        assert found.title and found.figures
        assert all(needed in rows() for needed in found.needs)
        assert reproduce.find(name.replace("/", "-"), rows()) == name


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_every_published_checkpoint_has_its_evaluation(kind):
    for name in zoo.names(kind):
        steps = evaluation(name).steps
        assert all(step.value("zoo") == name for step in steps)
        assert short(steps[-1]) == ("generation" if kind == "generator" else short(steps[-1]))
        reported = zoo.info(name).reported
        assert ("perturbation" in map(short, steps)) == ("pFID" in reported and kind == "tokenizer")
        assert len({step.value("name") for step in steps}) == len(steps)


def test_a_checkpoint_is_checked_without_its_file(capsys):
    assert reproduce.main(["robustok-main_train", "--checkpoint", "--dry-run"]) == 0
    assert "zoo=robustok/main_train" in capsys.readouterr().out


def test_recipes_and_checkpoints_meet():
    assert checkpoint_of("titok/l32_stage2") == "titok/l32" and checkpoint_of("rar/xl") == "rar/xl"
    assert checkpoint_of("titok/l32_stage1") is None and checkpoint_of("robustok/l") == "robustok/generator_l"
    with_checkpoint = {checkpoint_of(name) for name in rows()} - {None}
    published = {name for name in zoo.names() if zoo.info(name).repository is not None}
    # others are earlier or second releases of the same weights
    assert len(with_checkpoint) >= 45 and with_checkpoint <= published


@pytest.mark.parametrize(
    ("name", "checkpoint", "message"),
    [
        ("rar-c", False, r"there is no published row 'rar-c'; did you mean rar-\w+"),
        ("nothing-like-it-at-all", False, "make reproduce-list lists them"),
        ("titok-l32_stage1", True, "no checkpoint of titok/l32_stage1 is published"),
        ("robustok-robusttok_zero", False, "no recipe trains robustok/robusttok_zero; CHECKPOINT=1"),
    ],
)
def test_refused_rows(name, checkpoint, message, capsys):
    with pytest.raises(ConfigError, match=message):
        reproduce.chain_of(name, checkpoint)
    assert reproduce.main([name, "--dry-run", *(["--checkpoint"] if checkpoint else [])]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_dry_run_refuses_what_a_run_would(capsys):
    assert reproduce.main(["ibq-tokenizer_1024", "--dry-run", "--", "data.batch_sise=3"]) == 2
    assert "error: Could not override 'data.batch_sise'." in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no command before makes this checkpoint"):
        DryRun()(Step.parse("python eval.py task=reconstruction ckpt=outputs/rar/b/checkpoints/last.ckpt"))
    with pytest.raises(ConfigError, match="no command before makes this tokenizer"):
        DryRun()(Step.parse("python train.py experiment=rar/b tokenizer.path=elsewhere"))


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """Scripts that note their arguments, and fail where one of them is seed=13."""
    for name in ("train", "eval"):
        (tmp_path / f"{name}.py").write_text(
            "import pathlib, sys\n"
            f"with open({str(tmp_path / 'seen.txt')!r}, 'a') as file: print({name!r}, *sys.argv[1:], file=file)\n"
            "sys.exit(7 * ('seed=13' in sys.argv))\n"
        )
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setenv("TESSERA_OUTPUTS", str(tmp_path / "out"))
    return tmp_path


def test_commands_are_shown_and_run(scripts, capfd):
    figures = scripts / "out/ibq/tokenizer_1024/reconstruction/results.json"
    figures.parent.mkdir(parents=True)
    figures.write_text('{"figures": [{"name": "rFID", "label": "rFID", "value": 2.5}]}')
    assert reproduce.main(["ibq-tokenizer_1024", "--", "seed=1"]) == 0
    out = capfd.readouterr().out
    seen = (scripts / "seen.txt").read_text().splitlines()
    assert seen == [
        "train experiment=ibq/tokenizer_1024 ckpt=auto seed=1",
        f"eval task=reconstruction ckpt={scripts}/out/ibq/tokenizer_1024/checkpoints/last.ckpt "
        "name=ibq/tokenizer_1024/reconstruction trainer=gpu seed=1",
    ]
    assert "$ python train.py experiment=ibq/tokenizer_1024 ckpt=auto seed=1\n" in out
    assert "rFID = 2.5000\n" in out and "published: rFID 2.24" in out


def test_the_whole_of_robustok_shares_its_tokenizer():
    """RAR-L's samples are decoded by the tokenizer that was post-trained on RAR-B's."""
    steps = reproduce.chain_of("robustok-l", checkpoint=False).steps
    assert len(steps) == len(set(steps)) == 9
    assert steps[-1].value("tokenizer_ckpt") == "outputs/robustok/post_train_b/checkpoints/last.ckpt"
    assert steps[-1].value("ckpt") == steps[-2].value("ckpt") == "outputs/robustok/generator_l/checkpoints/last.ckpt"


def test_a_failing_command_ends_the_chain(scripts, capfd):
    assert reproduce.main(["ibq-tokenizer_1024", "--", "seed=13"]) == 7
    assert len((scripts / "seen.txt").read_text().splitlines()) == 1
    assert "exit code 7" in capfd.readouterr().err


def test_the_list(capsys):
    assert reproduce.main([]) == 0
    out = capsys.readouterr().out
    assert "rar-b" in out and "gFID 1.95" in out and "robustok/robusttok_zero (only)" in out


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("options", [{}, {"DRY": "1", "CHECKPOINT": "1", "ARGS": "seed=1 trainer.devices=2"}])
def test_make_targets(options):
    """What `make` would run is what this module's parser takes."""
    given = [f"{key}={value}" for key, value in options.items()]
    command = ["make", "--dry-run", "--no-print-directory", "-o", ".venv/.setup-done", "reproduce-rar-b", *given]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    python, *arguments = shlex.split(shown)
    assert python.endswith("python") and arguments[:3] == ["-m", "tessera.run.reproduce", "rar-b"]
    wanted = ["--checkpoint", "--dry-run", "--", "seed=1", "trainer.devices=2"] if options else ["--"]
    assert arguments[3:] == wanted
