"""Samples and gFID while a generator is trained: every generator, averaged weights, cadence, processes."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from figure_setup import NUM_CLASSES, RESOLUTION, TinyData, TinyFeatures, TinyStage, validate
from forked import run_forked
from generators.generator_cases import CASES, quantizer
from stage_setup import ADAM, data, trainer
from stage_setup import generator as tiny_generator
from stage_setup import generator_stage as tiny_stage
from tessera.backbones import CNNDecoder, CNNEncoder
from tessera.callbacks import EMA, GenerationFID, ImageGrid
from tessera.errors import ConfigError
from tessera.optim import CosineSchedule
from tessera.rng import IndexedRng
from tessera.stages import GeneratorTraining
from tessera.tokenizers import Tokenizer

COUNT = 8


def stage_of(name: str, branches: int = 2) -> GeneratorTraining:
    """The training of a generator of `generator_cases`, with a tokenizer around the case's quantizer."""
    case = CASES[name]
    torch.manual_seed(0)
    size = {"channels": 8, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "z_channels": 8, "norm_groups": 4}
    codes = quantizer(case.multiscale, branches, grid=4)
    tokenizer = Tokenizer(CNNEncoder(**size), codes, CNNDecoder(**size), RESOLUTION).eval()
    generator = case.make(**case.options, **case.make.sizes(codes, NUM_CLASSES))
    return GeneratorTraining(generator, tokenizer, ADAM, CosineSchedule(), case.sampling, seed=3)


def measured(name, folder, batch_size=3):
    """(figure, tokens) of a validation, whose pictures go into the folder."""
    path = folder / f"{name}.safetensors"
    gfid = GenerationFID(TinyFeatures(), COUNT, batch_size, classes=[2, 0], save_tokens=path)
    grid = ImageGrid(samples_per_class=2, classes=[2, 0], folder=folder / name)
    stage = stage_of(name)
    validate([gfid, grid], stage, TinyData(val=4, train=12))
    return gfid.figures[0], stage, path


@pytest.mark.parametrize("name", CASES)
def test_each_generator_is_sampled_as_it_says(tmp_path, name):
    figure, stage, path = measured(name, tmp_path)
    labels = torch.tensor([2, 0] * 4)
    saved = load_file(path)
    assert saved["labels"].equal(labels)
    rng = IndexedRng(3, torch.arange(COUNT))
    assert saved["tokens"].equal(stage.generator.generate(labels, stage.sampling, rng=rng))
    assert figure.label == f"gFID[tiny]@N={COUNT},classes=2/ref=tiny-train"
    assert figure.protocol.extra["sampling"] == str(CASES[name].sampling)
    (picture,) = (tmp_path / name).iterdir()
    with Image.open(picture) as file:
        scale = 512 // (2 * (RESOLUTION + 2) + 2)
        assert picture.name.startswith("val_samples") and file.size == (scale * (2 * (RESOLUTION + 2) + 2),) * 2


def _ranks(rank, world, folder):
    return {name: measured(name, folder)[0].value for name in CASES}


def test_two_processes_equal_one(tmp_path):
    expected = _ranks(0, 1, tmp_path / "one")
    for answer in run_forked(_ranks, tmp_path / "two"):
        assert answer == pytest.approx(expected, rel=1e-5)
    for name in CASES:
        one, two = (load_file(tmp_path / part / f"{name}.safetensors") for part in ("one", "two"))
        assert one["tokens"].equal(two["tokens"])


def tokens_after_training(folder, *callbacks):
    gfid = GenerationFID(TinyFeatures(), 6, cache=folder / "reference", save_tokens=folder / "tokens.safetensors")
    stage = tiny_stage(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=10.0))
    options = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer(folder, 3, [*callbacks, gfid], **options).fit(stage, data("tokens", folder, batch_size=16))
    return load_file(folder / "tokens.safetensors")["tokens"], stage


def test_averaged_weights_are_sampled(tmp_path):
    initial = tiny_generator().eval()
    averaged, stage = tokens_after_training(tmp_path / "a", EMA(decay=1 - 1e-12))
    raw, _ = tokens_after_training(tmp_path / "b")
    labels, rng = torch.arange(6), IndexedRng(0, torch.arange(6))
    assert averaged.equal(initial.generate(labels, stage.sampling, rng=rng)) and not averaged.equal(raw)
    # the training goes on with the raw weights
    assert raw.equal(stage.generator.generate(labels, stage.sampling, rng=rng))


def test_cadence(tmp_path, caplog):
    """gFID in every second validation, pictures in every one; the latest figure is said at the end."""
    caplog.set_level("INFO")
    gfid = GenerationFID(TinyFeatures(), 4, cache=tmp_path / "reference", every_n_validations=2)
    grid = ImageGrid(samples_per_class=1, num_classes=2, folder=tmp_path / "images")
    seen = []
    measure = gfid.finish
    gfid.finish = lambda trainer, stage: (seen.append(trainer.global_step), measure(trainer, stage))[1]
    options = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}
    trainer(tmp_path, 4, [gfid, grid], **options).fit(tiny_stage(), data("tokens", tmp_path, batch_size=16))
    assert seen == [1, 3]
    assert caplog.messages[-1].startswith("gFID[tiny]@N=4/ref=digits-train = ")
    assert "is to be expected of 4 samples" in caplog.messages[-1]
    assert [int(path.stem[-8:]) for path in grid.paths] == [1, 2, 3, 4]


@pytest.mark.parametrize("make", [lambda **options: GenerationFID(TinyFeatures(), 4, **options), ImageGrid])
def test_classes_are_checked_before_training(make, tmp_path):
    with pytest.raises(ConfigError, match=r"callbacks\.\w+\.classes has 3, outside of the generator's"):
        validate([make(classes=[0, 3])], TinyStage(), TinyData())
    with pytest.raises(ConfigError, match=r"callbacks\.\w+\.classes"):
        make(classes=[])
