"""The three stages on the digits through their recipes, shortened, and evaluation of what they leave."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from tessera.errors import CheckpointError, ConfigError, MissingFileError
from tessera.run.eval import evaluate
from tessera.run.post_train import post_train
from tessera.run.train import train

CONF = Path(__file__).parents[2] / "conf"
RUN = {"train": train, "post_train": post_train, "eval": evaluate}
QUICK = ["logger=none", "callbacks.progress.every_seconds=1000"]


def run(script, outputs, name, *overrides):
    quick = QUICK if script != "eval" else []
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(script, overrides=[f"paths.outputs={outputs}", f"name={name}", *quick, *overrides])
    return RUN[script](cfg)


def values(figures):
    return {figure["label"].split("@")[0]: figure["value"] for figure in figures}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Two tokenizers, a generator on the first, post-training of its decoder."""
    torch.set_num_threads(1)
    outputs = tmp_path_factory.mktemp("outputs")
    short = ["trainer.max_steps=250", "discriminator=none"]
    results = {
        name: run("train", outputs, name, f"experiment=digits/{name}", *short)
        for name in ("tokenizer", "tokenizer_perturbed")
    }
    tokenizer = f"tokenizer.path={outputs}/tokenizer/checkpoints/last.ckpt"
    generator = f"generator.path={outputs}/generator/checkpoints/last.ckpt"
    small = ["trainer.max_steps=150", "generator.depth=2", "generator.hidden_size=64", "metrics.num_samples=300"]
    results["generator"] = run("train", outputs, "generator", "experiment=digits/generator", tokenizer, *small)
    post = ["experiment=digits/post_train", tokenizer, generator, "discriminator=none", "trainer.max_steps=100"]
    results["post_train"] = run("post_train", outputs, "post_train", *post, "metrics.num_samples=300")
    return outputs, results, tokenizer, generator


def test_perturbed_training_makes_the_decoder_robust(chain):
    _, results, *_ = chain
    plain, perturbed = (values(results[name]["figures"]) for name in ("tokenizer", "tokenizer_perturbed"))
    # so short a training leaves the clean reconstructions behind; what perturbation adds to them must shrink
    ratio = {name: found["pFID[digits-cnn]"] / found["rFID[digits-cnn]"] for name, found in
             (("plain", plain), ("perturbed", perturbed))}  # fmt: skip
    assert ratio["perturbed"] < 0.9 * ratio["plain"]
    assert plain["PSNR"] > 18 and perturbed["PSNR"] > 18


def test_post_training_lowers_gfid_on_the_same_tokens(chain):
    _, results, *_ = chain
    figures = results["post_train"]["figures"]
    before, after = values(figures["before"]), values(figures["after_ema"])
    assert after["gFID[digits-cnn]"] < before["gFID[digits-cnn]"]
    assert set(figures) == {"before", "after_raw", "after_ema"}


def test_results_are_on_disk_with_their_protocols(chain):
    outputs, *_ = chain
    content = json.loads((outputs / "tokenizer" / "results.json").read_text())
    figure = next(figure for figure in content["figures"] if figure["name"] == "rFID")
    assert figure["label"] == "rFID[digits-cnn]@N=359" and figure["protocol"]["samples"] == 359
    assert (outputs / "tokenizer" / "config.yaml").exists() and (outputs / "tokenizer" / "run.yaml").exists()
    assert list((outputs / "post_train" / "images").glob("after_ema_samples_*.png"))


def test_evaluation_reproduces_the_figures_of_training(chain):
    outputs, results, *_ = chain
    again = run("eval", outputs, "eval_tokenizer", f"ckpt={outputs}/tokenizer/checkpoints/last.ckpt")
    for name, value in values(results["tokenizer"]["figures"]).items():
        assert values(again["figures"])[name] == pytest.approx(value, rel=1e-4), name


def test_a_generator_is_evaluated_with_a_post_trained_tokenizer(chain):
    outputs, results, *_ = chain
    again = run(
        "eval",
        outputs,
        "eval_generator",
        f"ckpt={outputs}/generator/checkpoints/last.ckpt",
        f"tokenizer_ckpt={outputs}/post_train/checkpoints/last.ckpt",
        "metrics=digits",
        "metrics.num_samples=300",
    )
    expected = values(results["post_train"]["figures"]["after_ema"])["gFID[digits-cnn]"]
    assert values(again["figures"])["gFID[digits-cnn]"] == pytest.approx(expected, rel=1e-4)


def test_a_generator_of_another_tokenizer_is_refused(chain):
    outputs, _, _, generator = chain
    other = f"tokenizer.path={outputs}/tokenizer_perturbed/checkpoints/last.ckpt"
    with pytest.raises(CheckpointError, match="trained on the tokens of tokenizer"):
        run("post_train", outputs, "wrong", "experiment=digits/post_train", other, generator)


def test_bad_input_stops_before_training(chain):
    outputs, _, tokenizer, generator = chain
    not_a_tokenizer = generator.replace("generator.path", "tokenizer.path")
    cases = [
        ("train", ["experiment=digits/tokenizer", "name=tokenizer"], ConfigError, "already holds a run"),
        ("train", ["experiment=digits/generator", "tokenizer.path=/none.ckpt"], MissingFileError, "/none.ckpt"),
        ("train", ["experiment=digits/tokenizer", "+sead=1"], ConfigError, "seed"),
        ("train", ["experiment=digits/tokenizer", "ckpt=/none.ckpt"], MissingFileError, "ckpt=auto"),
        ("post_train", ["experiment=digits/post_train", tokenizer, generator, "pairs.sigma=1.2"], ConfigError, "sigma"),
        ("post_train", ["experiment=digits/post_train", generator, not_a_tokenizer], CheckpointError, "no tokenizer"),
    ]  # fmt: skip
    for script, overrides, error, match in cases:
        name = [text.removeprefix("name=") for text in overrides if text.startswith("name=")] or ["bad"]
        with pytest.raises(Exception, match=match) as caught:
            run(script, outputs, name[0], *[text for text in overrides if not text.startswith("name=")])
        causes = [caught.value, caught.value.__cause__]
        assert any(isinstance(cause, error) for cause in causes), (overrides, caught.value)


def test_a_finished_run_is_not_trained_again(chain):
    outputs, results, *_ = chain
    again = run(
        "train",
        outputs,
        "tokenizer",
        "experiment=digits/tokenizer",
        "ckpt=auto",
        "trainer.max_steps=250",
        "discriminator=none",
    )
    assert again["seconds"] == results["tokenizer"]["seconds"]
