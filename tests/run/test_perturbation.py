"""`eval.py task=perturbation` on tokenizers of digits."""

import json
import logging
from functools import partial

import pytest
import torch

from figure_setup import TinyFeatures, tiny_tokenizer, validate
from forked import run_forked
from run.checkpoints import generator_checkpoint, run, tokenizer_checkpoint
from tessera.callbacks import PerturbedFID
from tessera.data import DigitsImages, ImageDataModule
from tessera.errors import ConfigError
from tessera.quantizers import MultiScaleQuantizer, ProductQuantizer, VQCodebook
from tessera.run.perturbation import PerturbedReconstruction
from tessera.stages.evaluation import Evaluation
from tessera.tokenizers import Tokenizer

QUICK = {"alphas": [0.9, 0.5], "deltas": [2, 8]}


def multiscale_tokenizer() -> Tokenizer:
    """Two branches of three scales."""
    plain = tiny_tokenizer()
    torch.manual_seed(1)
    codebook = partial(VQCodebook, codebook_size=16, l2_normalize=False)
    branch = partial(MultiScaleQuantizer, codebook=codebook, grids=[1, 2, 4])
    quantizer = ProductQuantizer(branch, branches=2, dim=8)
    with torch.no_grad():
        for part in quantizer.branches:
            part.codebooks[0].embedding.normal_()
    return Tokenizer(plain.encoder, quantizer, plain.decoder, 16).eval()


def data() -> ImageDataModule:
    return ImageDataModule(partial(DigitsImages, resolution=16), batch_size=200)


def measure(tokenizer, **options):
    task = PerturbedReconstruction(**{**QUICK, "num_samples": 60, **options})
    return list(task.measure(tokenizer, TinyFeatures(), data().images("val"), task.grids(tokenizer.quantizer)))


def test_gives_what_the_callback_gives():
    tokenizer = tiny_tokenizer()
    for options in (
        {"seeds": [0, 3], "alphas": [0.7]},
        {"neighbors_of": "code"},
        {"num_samples": None, "alphas": [0.7]},
    ):
        settings = {**QUICK, "num_samples": 60, **options}
        callback = PerturbedFID(TinyFeatures(), **settings)
        validate([callback], Evaluation(tokenizer), data())
        (figure,), expected = measure(tokenizer, **options), callback.figures[0]
        assert figure.label == expected.label
        assert figure.value == pytest.approx(expected.value, rel=1e-9)
        assert figure.details["changed_share"] == expected.details["changed_share"]


def test_each_scale_and_branch_has_a_table_of_its_own():
    tokenizer = multiscale_tokenizer()
    figures = {f.label: f for f in measure(tokenizer, each_scale=True, each_branch=True)}
    whole = "pFID[tiny]@N=60,K=16,alpha={0.9,0.5},delta={2,8}"
    parts = [f",scales={{{scale}}}" for scale in range(3)] + [f",branches={{{branch}}}" for branch in range(2)]
    assert list(figures) == [whole, *(whole + part for part in parts)]
    changed = {label: figure.details["changed_share"]["a=0.9,d=8"] for label, figure in figures.items()}
    for names in (parts[:3], parts[3:]):
        assert sum(changed[whole + name] for name in names) == pytest.approx(changed[whole])
    assert len({figure.details["control_rfid"] for figure in figures.values()}) == 1
    assert len({figure.value for figure in figures.values()}) == 6
    callback = PerturbedFID(TinyFeatures(), **QUICK, num_samples=60, scales=[1])  # is told the scale
    validate([callback], Evaluation(tokenizer), data())
    assert figures[callback.figures[0].label].value == pytest.approx(callback.figures[0].value, rel=1e-9)


def test_batch_size_does_not_matter():
    values = [measure(multiscale_tokenizer(), batch_size=size)[0].value for size in (7, 60)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def _ranks(rank, world):
    options = {"alphas": [0.7], "deltas": [4], "each_branch": True, "num_samples": 51, "batch_size": 20}
    figures = measure(multiscale_tokenizer(), **options)
    return {figure.label: (figure.value, figure.details["changed_share"]) for figure in figures}


def test_two_processes_equal_one():
    single = _ranks(0, 1)
    assert len(single) == 3
    for answer in run_forked(_ranks):
        assert answer.keys() == single.keys()
        for label, (value, shares) in single.items():
            assert answer[label][0] == pytest.approx(value, rel=1e-5) and answer[label][1] == pytest.approx(shares)


def test_command_writes_results_and_shows_the_table(tmp_path, caplog):
    path = tokenizer_checkpoint(tmp_path)
    with caplog.at_level(logging.INFO, logger="tessera.run.perturbation"):
        chosen = ["task.num_samples=100", "task.alphas=[0.8]", "task.deltas=[2,4]"]
        results = run(tmp_path, "name=pfid", "task=perturbation", f"ckpt={path}", *chosen)
    content = json.loads((tmp_path / "pfid" / "results.json").read_text())
    assert content["figures"] == json.loads(json.dumps(results["figures"]))
    (figure,) = content["figures"]
    assert figure["label"] == "pFID[digits-cnn]@N=100,K=32,alpha={0.8},delta={2,4}"
    assert figure["value"] == pytest.approx(sum(figure["details"]["table"].values()) / 2)
    assert figure["protocol"]["extra"]["neighbors_of"] == "latent" and figure["protocol"]["extra"]["seeds"] == [0]
    assert f"{figure['details']['table']['a=0.8,d=4']:.4f}" in caplog.text and "tokens changed" in caplog.text


def test_what_cannot_be_measured_is_refused(tmp_path):
    chosen = ["name=refused", "task=perturbation"]
    with pytest.raises(ConfigError, match="needs a tokenizer's checkpoint"):
        run(tmp_path, *chosen, f"ckpt={generator_checkpoint(tmp_path)}")
    tokenizer = f"ckpt={tokenizer_checkpoint(tmp_path)}"
    for settings, message in (
        (["task.deltas=[33]"], r"task\.deltas=\[33\] exceed the codebook size 32"),
        (["task.each_scale=true"], r"task\.each_scale=true .* one of scales"),
        (["task.each_branch=true"], r"task\.each_branch=true .* one of branches"),
        (["task.num_samples=1000"], r"task\.num_samples=1000 must be between 2 and the 359 images"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, *chosen, tokenizer, *settings)


@pytest.mark.parametrize(
    "options",
    [{"alphas": [2]}, {"deltas": [0]}, {"seeds": []}, {"neighbors_of": "near"}, {"batch_size": 0}],
)
def test_bad_settings(options):
    with pytest.raises(ConfigError, match=rf"task\.{next(iter(options))}="):
        PerturbedReconstruction(**options)
