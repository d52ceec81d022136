"""`eval.py task=reconstruction`: the figures that the callbacks measure, each image once, and refusals."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from figure_setup import TinyFeatures, validate
from forked import run_forked
from run.checkpoints import generator_checkpoint, run, tokenizer_checkpoint
from stage_setup import DIGITS, tokenizer
from tessera.callbacks import CodebookReport, ReconstructionFID, ReconstructionQuality
from tessera.data import ImageDataModule
from tessera.errors import ConfigError
from tessera.losses.lpips_network import VGG_CONVS
from tessera.metrics import DigitsFeatures
from tessera.metrics.codebook import CodebookUsage
from tessera.metrics.image_sets import DatasetImageSet
from tessera.metrics.pair_measure import PairMeasure
from tessera.run.reconstruction import Reconstruction
from tessera.stages.evaluation import Evaluation


def by_callbacks(**options) -> dict[str, float]:
    """What a validation measures, by label."""
    callbacks = [
        ReconstructionFID(DigitsFeatures(), **options),
        ReconstructionQuality(ssim_window="gauss11", **options),
        CodebookReport(),
    ]
    validate(callbacks, Evaluation(tokenizer()), ImageDataModule(DIGITS, batch_size=50))
    return {figure.label: figure.value for callback in callbacks for figure in callback.figures}


@pytest.mark.parametrize("count", [None, 40])
def test_figures_are_those_of_the_callbacks(tmp_path, count):
    path = tokenizer_checkpoint(tmp_path)
    chosen = [] if count is None else [f"task.num_samples={count}", "task.figures=[PSNR,SSIM,rFID]"]
    found = run(tmp_path, "task=reconstruction", f"ckpt={path}", "task.ssim_window=gauss11", *chosen)
    figures = {figure["label"]: figure["value"] for figure in found["figures"]}
    expected = by_callbacks(num_samples=count)
    if count is not None:
        assert list(figures) == ["PSNR@N=40", "SSIM[gauss11]@N=40", "rFID[digits-cnn]@N=40"]
        expected = {label: expected[label] for label in figures}
    assert figures == pytest.approx(expected, rel=1e-4)  # images at the edge between two levels
    assert ("usage_branch0@N=359" in figures) == (count is None)


def lpips_weights(folder):
    """Overrides that choose a thin VGG16 of random weights."""
    backbone, width = {}, 3
    for number in VGG_CONVS:
        backbone[f"features.{number}.weight"] = torch.randn(2, width, 3, 3) * 0.3
        backbone[f"features.{number}.bias"] = torch.zeros(2)
        width = 2
    save_file(backbone, folder / "vgg.safetensors")
    save_file({f"lin{n}.model.1.weight": torch.rand(1, 2, 1, 1) for n in range(5)}, folder / "lin.safetensors")
    chosen = {"backbone_weights": "vgg", "linear_weights": "lin"}
    files = [f"metrics.lpips.{key}={folder}/{name}.safetensors" for key, name in chosen.items()]
    return ["metrics=digits", "metrics/lpips=vgg", *files]


def test_lpips_where_its_weights_are_given(tmp_path):
    """By the task, and by the callback in `task=figures`."""
    chosen = [f"ckpt={tokenizer_checkpoint(tmp_path)}", *lpips_weights(tmp_path)]
    (figure,) = run(tmp_path, *chosen, "task=reconstruction", "task.figures=[LPIPS]")["figures"]
    assert figure["name"] == "LPIPS" and figure["label"].startswith("LPIPS[vgg-") and figure["value"] > 0
    assert figure["protocol"]["weights_id"] in figure["label"]
    measured = {each["label"]: each["value"] for each in run(tmp_path, *chosen, "callbacks=quality")["figures"]}
    assert set(measured) == {"PSNR@N=359", "SSIM[uniform7]@N=359", figure["label"]}
    assert measured[figure["label"]] == pytest.approx(figure["value"], rel=1e-4)


class Exact(nn.Module):
    """Reconstructs pixel by pixel, so that nothing depends on an image's batch."""

    def __init__(self):
        super().__init__()
        self.quantizer = tokenizer().quantizer

    def forward(self, images):
        tokens = ((images[:, :1, ::4, ::4] + 1) * 15).long().flatten(2)
        return SimpleNamespace(reconstruction=(images * 0.9).round(decimals=1), tokens=tokens)


def _measured(rank, world, batch_size):
    model, task = Exact(), Reconstruction(batch_size=batch_size)
    images = DatasetImageSet(DIGITS(split="val"), num_samples=41)
    usage = CodebookUsage(32, 1, [(4, 4)])
    figures = task.measure(model, images, PairMeasure(None, TinyFeatures()), usage, torch.device("cpu"))
    return {figure.label: figure.value for figure in figures}


def test_processes_and_batches_do_not_matter():
    expected = _measured(0, 1, 41)
    assert len(expected) == 3 + 4
    for world, batch_size in ((1, 7), (2, 8), (3, 5)):
        for found in run_forked(_measured, batch_size, world=world):
            assert found == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.figures=[LPIPS]"], r"LPIPS needs its network; choose metrics/lpips=alex or vgg"),
        (["task.num_samples=360"], r"task\.num_samples=360 must be between 2 and the 359 images"),
        (["task.num_samples=1"], r"task\.num_samples=1 must be between 2"),
        (["task.split=test"], r"split='test' is unknown"),
    ],
)
def test_refusals(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, "task=reconstruction", f"ckpt={tokenizer_checkpoint(tmp_path)}", *overrides)


def test_impossible_settings():
    with pytest.raises(ConfigError, match=r"task\.figures: 'FID' is unknown; choose from rFID, PSNR"):
        Reconstruction(["FID"])
    with pytest.raises(ConfigError, match=r"task\.batch_size=0"):
        Reconstruction(batch_size=0)


def test_checkpoints_without_what_is_measured(tmp_path):
    with pytest.raises(ConfigError, match="needs a tokenizer's checkpoint"):
        run(tmp_path, "task=reconstruction", f"ckpt={generator_checkpoint(tmp_path)}")
    continuous = SimpleNamespace(quantizer=SimpleNamespace(num_tokens=0))
    with pytest.raises(ConfigError, match="usage needs codebooks"):
        Reconstruction(["usage"]).measures(None, continuous)
