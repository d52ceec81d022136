"""`eval.py task=generation`: one set of samples measured in several ways, the names of the figures, and refusals."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from figure_setup import TinyImages
from forked import run_forked
from metrics.test_comparison import TinyFeatures
from run.checkpoints import generator_checkpoint, run, tokenizer_checkpoint
from tessera import distributed
from tessera.errors import CheckpointError, ConfigError, DataError, MissingFileError
from tessera.metrics.comparison import FIGURES
from tessera.metrics.generated import Draws, TokenFile, generated_figures, measure_generated
from tessera.metrics.image_sets import DatasetImageSet
from tessera.metrics.reference import load_reference
from tessera.rng import IndexedRng
from tessera.run.generation import Generation

CPU = torch.device("cpu")


def labelled(found):
    return {figure["label"]: figure["value"] for figure in found["figures"]}


def test_samples_tokens_images_and_the_callback_agree(tmp_path):
    """On the samples of one seed; the figures have the same names, as they measure the same."""
    ckpt = generator_checkpoint(tmp_path)
    chosen = [f"ckpt={ckpt}", "seed=3"]
    sampled = run(tmp_path, *chosen, "task=sample", "task.num_samples=30", "name=samples")["samples"]
    found = run(tmp_path, *chosen, "task=generation", "task.num_samples=30", "task.batch_size=7")
    values = labelled(found)
    real = "N=30/ref=digits-train"
    names = [f"gFID[digits-cnn]@{real}", "IS[digits-cnn]@N=30"]
    assert list(values) == [*names, *(f"{name}[digits-cnn]@{real}/real=1438" for name in ("precision", "recall"))]
    gfid = found["figures"][0]
    about = gfid["protocol"]["extra"]
    assert (about["seed"], about["classes"], about["per_class"]) == (3, 10, [3])
    assert "temperature" in about["sampling"]
    assert gfid["protocol"]["reference_samples"] == 1438 and gfid["details"]["expected_bias"] > 0
    assert any("fewer" in warning or "do not determine" in warning for warning in gfid["warnings"])
    from_tokens = run(tmp_path, *chosen, "task=generation", f"task.tokens={sampled['tokens']}")
    # a decoder alone is enough, and so are the images
    decoder = [f"ckpt={tmp_path}/tokenizer0.ckpt", "task=generation", f"task.tokens={sampled['tokens']}"]
    images = ["metrics=digits", "data=digits", "data.dataset.resolution=16", "task=generation"]
    again = [from_tokens, run(tmp_path, *decoder), run(tmp_path, *images, f"task.images={sampled['npz']}")]
    for other in again:
        assert labelled(other) == pytest.approx(values, rel=1e-4)
        assert other["figures"][0]["protocol"]["extra"]["per_class"] == [3]
    callback = ["callbacks=gfid", "callbacks.gfid.figures=[recall,FID]", "callbacks.gfid.num_samples=30"]
    measured = labelled(run(tmp_path, *chosen, "metrics=digits", *callback, "+trainer.limit_val_batches=1"))
    assert list(measured) == [list(values)[3], gfid["label"]]
    assert measured == pytest.approx({label: values[label] for label in measured}, rel=1e-4)


def test_chosen_classes_and_a_reference_of_files(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "real.npz", levels)
    chosen = [f"ckpt={generator_checkpoint(tmp_path)}", "task=generation", "task.num_samples=6", "task.classes=[2,5]"]
    found = run(tmp_path, *chosen, f"task.reference={tmp_path}/real.npz", "task.figures=[KID,FID]")
    assert [figure["label"] for figure in found["figures"]] == [
        "KID[digits-cnn,subset=6]@N=6,classes=2/ref=real",
        "gFID[digits-cnn]@N=6,classes=2/ref=real",
    ]
    assert found["figures"][1]["protocol"]["extra"]["chosen"] == [2, 5]


def decode(tokens):
    """Images pixel by pixel of tokens (B, 1, 16)."""
    grid = tokens.view(-1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (torch.cat([grid, grid + 3, 2 * grid], 1) % 16) / 7.5 - 1


def draw(labels, index):
    return (IndexedRng(0, index).uniform("t", 1, 16) * 15).long() + (labels % 2)[:, None, None]


def _measured(rank, world, folder, batch_size):
    extractor = TinyFeatures()
    reference = load_reference(DatasetImageSet(TinyImages(50)), extractor, batch_size=batch_size)
    samples, path = Draws(draw, 31, 3), folder / f"{world}.safetensors"
    measured = measure_generated(samples, decode, extractor, FIGURES, batch_size, CPU, path)
    distributed.barrier()
    again = measure_generated(TokenFile(path, None, "task"), decode, extractor, FIGURES, batch_size + 1, CPU)
    figures = [generated_figures(each, reference, extractor, FIGURES, samples.labels) for each in (measured, again)]
    assert [figure.value for figure in figures[0]] == pytest.approx([figure.value for figure in figures[1]], rel=1e-9)
    return {figure.label: figure.value for figure in figures[0]}


def test_processes_and_batches_do_not_matter(tmp_path):
    expected = _measured(0, 1, tmp_path, 31)
    assert len(expected) == 6
    for world, batch_size in ((1, 4), (2, 8), (3, 5)):
        for found in run_forked(_measured, tmp_path, batch_size, world=world):
            assert found == pytest.approx(expected, rel=1e-9)
    stored = [load_file(tmp_path / f"{world}.safetensors") for world in (1, 3)]
    for key in ("tokens", "labels"):
        assert stored[0][key].equal(stored[1][key])


def test_what_is_warned_about():
    extractor = TinyFeatures()
    reference = load_reference(DatasetImageSet(TinyImages(40, split="val")), extractor)
    samples = Draws(lambda labels, index: draw(labels, index % 5), 20, 3)
    samples.labels[:9] = 0
    measured = measure_generated(samples, decode, extractor, ["FID"], 8, CPU)
    (figure,) = generated_figures(
        measured, reference, extractor, ["FID"], samples.labels, size=(8, 8), num_classes=4, settings={"seed": 1}
    )
    assert figure.label == "gFID[tiny]@N=20/ref=tiny-val"  # each was drawn, so each counts
    text = figure.describe()
    for part in (
        "tiny-val is not what a generator learns",
        "of 20 samples are exact repeats",
        "1 of 4 classes have no",
    ):
        assert part in text
    assert "8 x 8 pixels are compared with ones of 16 x 16" in text and "fewer than 2048" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": "a", "images": "b"}, "exclude each other"),
        ({"tokens": "a", "classes": [1]}, "no use with task.tokens"),
        ({"classes": []}, "must list classes"),
        ({"images": "a", "num_samples": 3}, "of which all are measured"),
        ({"num_samples": 1}, r"task\.num_samples=1 must be at least 2"),
        ({"batch_size": 0}, r"task\.batch_size=0"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        Generation(**options)


def test_refusals(tmp_path):
    ckpt = generator_checkpoint(tmp_path)
    chosen = [f"ckpt={ckpt}", "task=generation"]
    for overrides, error, message in (
        (["task.figures=[sFID]"], ConfigError, "sFID can't be measured with digits-cnn, as it needs spatial features"),
        (["task.classes=[10]"], ConfigError, r"task\.classes has 10, outside of the generator's classes \[0, 10\)"),
        (["task.tokens=/none"], MissingFileError, r"task\.tokens=/none does not exist"),
        (["task.reference=/none.npz"], MissingFileError, r"/none\.npz does not exist"),
        ([f"tokenizer_ckpt={tokenizer_checkpoint(tmp_path, 5)}"], CheckpointError, "trained on the tokens of"),
    ):
        with pytest.raises(error, match=message):
            run(tmp_path, *chosen, *overrides)
    with pytest.raises(ConfigError, match="needs a generator's checkpoint"):
        run(tmp_path, f"ckpt={tmp_path}/tokenizer0.ckpt", "task=generation")
    with pytest.raises(ConfigError, match=r"set ckpt=\.\.\. or tokenizer_ckpt=\.\.\."):
        save_file({"tokens": torch.zeros(3, 1, 16).long(), "labels": torch.zeros(3).long()}, tmp_path / "t.safetensors")
        run(tmp_path, "data=digits", "metrics=digits", "task=generation", f"task.tokens={tmp_path}/t.safetensors")


def test_token_files_of_another_kind(tmp_path):
    (tmp_path / "text").write_text("nothing")
    save_file({"tokens": torch.zeros(3, 1, 16).long()}, tmp_path / "part")
    save_file({"tokens": torch.full((3, 1, 16), 99), "labels": torch.zeros(3).long()}, tmp_path / "far")
    for name, message in (("text", "not a safetensors file"), ("part", "lacks `tokens` or `labels`")):
        with pytest.raises(DataError, match=message):
            TokenFile(tmp_path / name, None, "task")
    with pytest.raises(DataError, match=r"task\.num_samples=4 but .*far holds 3"):
        TokenFile(tmp_path / "far", 4, "task")
    with pytest.raises(DataError, match="99"):
        run(tmp_path, f"ckpt={tokenizer_checkpoint(tmp_path)}", "task=generation", f"task.tokens={tmp_path}/far")
    np.savez(tmp_path / "samples.npz", np.zeros((4, 16, 16, 3), np.uint8))
    save_file({"labels": torch.zeros(3).long()}, tmp_path / "tokens.safetensors")
    with pytest.raises(DataError, match=r"holds 4 images but .* 3 labels"):
        run(tmp_path, "data=digits", "metrics=digits", "task=generation", f"task.images={tmp_path}/samples.npz")
