"""post_train.py: pairs made or given, early stopping, kills, and what its checkpoint is."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from forked import run_forked
from run.checkpoints import CONF, generator_checkpoint, run, tokenizer_checkpoint
from stage_setup import tokenizer
from tessera.callbacks import GenerationFID, LastCheckpoint
from tessera.callbacks.ema import ema_weights
from tessera.data import PairStore, token_build
from tessera.errors import CheckpointError, ConfigError
from tessera.metrics.protocol import Figure
from tessera.run.build import read_checkpoint
from tessera.run.load import load_tokenizer
from tessera.run.post_train import Measurement, post_train, refuse_ignored_settings
from tessera.zoo import export, from_pretrained

QUICK = [
    "discriminator=none",
    "logger=none",
    "callbacks@figures=gfid",
    "~callbacks.rfid",
    "~callbacks.image_grid",
    "callbacks.progress.every_seconds=1000",
    "callbacks.checkpoint.every_n_steps=2",
    "trainer.max_steps=6",
    "trainer.val_check_interval=2",
    "+trainer.limit_val_batches=1",
    "metrics.num_samples=20",
    "pairs.num_images=64",
    "optimizer.lr=0.003",
    "data.batch_size=16",
    "name=p",
]


@pytest.fixture(scope="module", autouse=True)
def reference_cache(tmp_path_factory):
    """Statistics of the training images, computed once."""
    folder = tmp_path_factory.mktemp("reference")
    QUICK.extend(f"{node}.gfid.cache={folder}" for node in ("callbacks", "figures"))
    yield
    del QUICK[-2:]


def post(outputs, *overrides, generated=True):
    """post_train.py on the tiny models of `outputs`."""
    paths = [f"tokenizer.path={tokenizer_checkpoint(outputs)}"]
    paths += [f"generator.path={generator_checkpoint(outputs)}"] if generated else []
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose("post_train", overrides=[*QUICK, f"paths.outputs={outputs}", *paths, *overrides])
    return post_train(cfg)


def weights(results, kind="ema"):
    return load_tokenizer(results["checkpoint"], kind).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def test_a_checkpoint_is_an_ordinary_tokenizers(tmp_path):
    """Same keys; encoder and codebook bit-identical, the decoder not; exported and read again all the same."""
    switched_off = "+figures.pfid=null"
    results = post(tmp_path, "stage.source=reencode", "stage.clean_share=0.2", switched_off)
    start = tokenizer().state_dict()
    for kind in ("raw", "ema"):
        loaded = load_tokenizer(results["checkpoint"], kind)
        state = loaded.state_dict()
        assert list(state) == list(start) and loaded.fingerprint() == tokenizer().fingerprint()
        changed = {key.split(".")[0] for key, value in state.items() if not torch.equal(value, start[key])}
        assert changed == {"post_quant_conv", "decoder"}
        assert same(from_pretrained(export(loaded, tmp_path / kind)).state_dict(), state)
    assert not same(weights(results, "raw"), weights(results, "ema"))
    figures = results["figures"]
    assert set(figures) == {"before", "after_raw", "after_ema"}
    assert all([figure["name"] for figure in found] == ["gFID"] for found in figures.values())
    assert "published" not in results and results["steps"] == 6
    assert 0 < results["reencoded_agreement"] < 1 and results["source"] == "reencode" and results["seconds"] > 0
    assert results["pairs"]["rows"] == 64 and results["pairs"]["manifest"]["sigmas"] == [0.7]


def test_pairs_made_before_are_found_and_can_be_given(tmp_path):
    chosen = ["sampling=default", "sampling.temperature=1.2"]
    task = ["task=pairs", f"ckpt={generator_checkpoint(tmp_path)}", "task.sigma=[0.7,0.9]", "task.num_images=64"]
    made = run(tmp_path, *task, *chosen)["pairs"]
    stamp = os.stat(f"{made['path']}/manifest.json").st_mtime_ns
    found = post(tmp_path, "pairs.sigma=[0.7,0.9]", *chosen)
    assert found["pairs"] == made and len(list((tmp_path / "tokens").iterdir())) == 1
    given = post(tmp_path, f"pairs.path={made['path']}", "name=given", generated=False)
    assert os.stat(f"{made['path']}/manifest.json").st_mtime_ns == stamp
    assert same(weights(given), weights(found)) and given["figures"] == {"before": [], "after_raw": [], "after_ema": []}
    # a file of tokens gives the figures without the generator
    tokens = f"{tmp_path}/p/samples.safetensors"
    more = post(
        tmp_path,
        f"pairs.path={made['path']}",
        f"+figures.gfid.tokens={tokens}",
        "name=more",
        "trainer.max_steps=2",
        generated=False,
    )
    before, expected = more["figures"]["before"][0], found["figures"]["before"][0]
    assert before["value"] == pytest.approx(expected["value"], rel=1e-6) and before["label"] == expected["label"]


class Scripted:
    """gFID by step, so that what early stopping must do is known."""

    def __init__(self, monkeypatch, *values):
        measure, self.steps = GenerationFID.finish, []

        def finish(callback, trainer, pl_module):
            (figure,) = measure(callback, trainer, pl_module)
            if not trainer.training:
                return [figure]
            self.steps.append(trainer.global_step)
            assert not any(module.training for module in pl_module.modules())
            return [Figure(figure.name, values[trainer.global_step // 2], figure.protocol)]

        monkeypatch.setattr(GenerationFID, "finish", finish)


LOWEST_AT_4 = (5.0, 4.0, 3.0, 3.5, 3.0, 1.0, 0.0)
STOPPING = ["early_stopping.patience=2", "trainer.max_steps=12", "pairs.num_images=32", "ckpt=auto"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Results of a training that early stopping has ended, and the steps at which it measured."""
    with pytest.MonkeyPatch.context() as patch:
        script = Scripted(patch, *LOWEST_AT_4)
        return post(tmp_path_factory.mktemp("stopped"), *STOPPING), script.steps


def test_early_stopping_publishes_the_best_averaged_weights(tmp_path, stopped, monkeypatch):
    results, steps = stopped
    assert steps == [0, 2, 4, 6, 8] and results["steps"] == 8, "3.0 is not below 3.0"
    assert results["published"] == {"step": 4, "gFID": 3.0}
    checkpoint = read_checkpoint(results["checkpoint"])
    assert not same(ema_weights(checkpoint)["tokenizer.decoder"], checkpoint["ema"]["tokenizer.decoder"])
    # the averages of step 4, whenever training stops after it
    Scripted(monkeypatch, *LOWEST_AT_4)
    earlier = post(tmp_path, *STOPPING, "early_stopping.patience=1")
    assert earlier["steps"] == 6 and same(weights(earlier), weights(results))
    assert not same(weights(earlier, "raw"), weights(results, "raw"))


def test_a_training_that_only_harms_publishes_what_it_began_with(tmp_path, monkeypatch):
    Scripted(monkeypatch, *range(7))
    results = post(tmp_path, *STOPPING)
    assert results["steps"] == 4 and results["published"] == {"step": 0, "gFID": 0}
    assert same(weights(results), tokenizer().state_dict())
    assert not same(weights(results, "raw"), tokenizer().state_dict())
    before, after = (results["figures"][when][0]["value"] for when in ("before", "after_ema"))
    assert after == pytest.approx(before, rel=1e-6)


def killed(function):
    """Run a function in a process that is killed by it."""
    process = os.fork()
    if process == 0:
        try:
            function()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


def values(results):
    return {
        when: [(figure["label"], figure["value"]) for figure in found] for when, found in results["figures"].items()
    }


@pytest.mark.parametrize(("step", "saved", "remaining"), [(3, False, [4, 6, 8]), (4, False, [4, 6, 8]), (8, True, [])])
def test_the_same_command_after_a_kill(tmp_path, stopped, monkeypatch, step, saved, remaining):
    """Killed some steps after a checkpoint, just before one is written, and just after training's last."""
    whole, _ = stopped
    script, save = Scripted(monkeypatch, *LOWEST_AT_4), LastCheckpoint.on_train_batch_end

    def interrupted():
        def die(callback, trainer, *rest):
            if saved or trainer.global_step < step:
                save(callback, trainer, *rest)
            if trainer.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(LastCheckpoint, "on_train_batch_end", die)
        post(tmp_path, *STOPPING)

    killed(interrupted)
    call, measured = Measurement.__call__, []
    monkeypatch.setattr(Measurement, "__call__", lambda *arguments: measured.append(arguments[2]) or call(*arguments))
    again = post(tmp_path, *STOPPING)
    assert script.steps == remaining and sorted(measured) == ["after_ema", "after_raw"]
    for kind in ("raw", "ema"):
        assert same(weights(again, kind), weights(whole, kind))
    assert again["published"] == whole["published"] and values(again) == values(whole)
    assert post(tmp_path, *STOPPING) == again  # finished


def test_pairs_cut_short_are_completed_with_the_generator(tmp_path, monkeypatch):
    write, fill = token_build.write_images, token_build.fill
    monkeypatch.setattr(token_build, "fill", lambda folder, manifest, chunk, *rest: fill(folder, manifest, 16, *rest))

    def interrupted():
        def die(writer, images, *rest, **rows):
            if 40 in images:
                os.kill(os.getpid(), signal.SIGKILL)
            write(writer, images, *rest, **rows)

        monkeypatch.setattr(token_build, "write_images", die)
        post(tmp_path, "pairs.batch_size=8")

    killed(interrupted)
    (folder,) = (tmp_path / "tokens").iterdir()
    path = f"pairs.path={folder}"
    with pytest.raises(CheckpointError, match=r"pairs\.path=.*is not finished; repeat the command that makes it"):
        post(tmp_path, path, "ckpt=auto", generated=False)
    results = post(tmp_path, path, "pairs.batch_size=8", "ckpt=auto")
    assert len(PairStore.open(folder)) == 64
    assert same(weights(results), weights(post(tmp_path / "new", "pairs.batch_size=8")))


@pytest.mark.parametrize(
    ("overrides", "error", "match"),
    [
        (["pairs.sigma=1.2"], ConfigError, r"pairs\.sigma=1\.2 is outside \[0, 1\]"),
        (["generator.path=null"], ConfigError, r"generator\.path is required; set generator\.path=.*, or pairs\.path="),
        (["early_stopping.patience=1", "callbacks.gfid=null"], ConfigError, r"early_stopping\.patience=1 needs gFID"),
        (["sampling=maskgit"], ConfigError, r"RAR is sampled with"),
        (
            ["other"],
            CheckpointError,
            r"trained on the tokens of tokenizer \w+, but .*tokenizer5\.ckpt is \w+; give the",
        ),
    ],
)
def test_commands_that_are_refused(tmp_path, overrides, error, match):
    if overrides == ["other"]:
        overrides = [f"tokenizer.path={tokenizer_checkpoint(tmp_path, seed=5)}"]
    with pytest.raises(error, match=match):
        post(tmp_path, *overrides, "pairs.num_images=16")


def test_settings_of_given_pairs_are_refused(tmp_path, monkeypatch):
    overrides = SimpleNamespace(overrides=SimpleNamespace(task=["pairs.path=x", "pairs.sigma=0.5"]))
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: overrides)
    with pytest.raises(ConfigError, match=r"pairs\.sigma=0\.5 has no effect on pairs\.path=x"):
        refuse_ignored_settings("x")


def _in_two(rank, world, outputs):
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    results = post(outputs, *SHARED, "trainer.devices=2", "+trainer.strategy=ddp", "data.batch_size=8")
    return results["published"], values(results), results["reencoded_agreement"]


# no Adam, which makes steps of the rounding errors of gradients that are zero
SHARED = [
    "early_stopping.patience=1",
    "stage.source=reencode",
    "stage.l2_start=0.01",
    "stage.clean_share=0.3",
    "stage.optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 0.1}",
]


def test_two_processes_equal_one(tmp_path):
    """The whole command: pairs, figures, training, early stopping and the averages that it publishes."""
    alone = post(tmp_path / "one", *SHARED)
    tokenizer_checkpoint(tmp_path / "two"), generator_checkpoint(tmp_path / "two")
    both, other = run_forked(_in_two, tmp_path / "two")
    assert both == other
    published, figures, agreement = both
    assert published["step"] == alone["published"]["step"] and agreement == pytest.approx(alone["reencoded_agreement"])
    for when, found in values(alone).items():
        for (label, value), (their_label, their_value) in zip(found, figures[when], strict=True):
            assert label == their_label and their_value == pytest.approx(value, rel=1e-3)
    (one,), (two,) = ((tmp_path / name / "tokens").iterdir() for name in ("one", "two"))
    assert (one / "tokens.bin").read_bytes() == (two / "tokens.bin").read_bytes() and one.name == two.name
    for kind in ("raw", "ema"):
        together = load_tokenizer(f"{tmp_path}/two/p/checkpoints/last.ckpt", kind).state_dict()
        torch.testing.assert_close(together, dict(weights(alone, kind)), atol=2e-5, rtol=1e-4)
