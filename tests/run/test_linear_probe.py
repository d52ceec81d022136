"""`eval.py task=linear_probe` on a tokenizer of digits."""

import json
import os
from functools import partial

import lightning
import pytest
import torch

from forked import run_forked
from run.checkpoints import generator_checkpoint, run, tokenizer_checkpoint
from stage_setup import tokenizer
from tessera import distributed
from tessera.backbones import CNNDecoder, CNNEncoder
from tessera.data import DigitsImages, ImageDataModule
from tessera.errors import ConfigError
from tessera.metrics.linear_probe import pooled
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.run.linear_probe import LinearProbing
from tessera.tokenizers import Tokenizer

QUICK = {"epochs": 6, "batch_size": 32, "lr": 0.02, "warmup_lr": 0.02}


def product_tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    size = {"channels": 8, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "z_channels": 8, "norm_groups": 4}
    codebook = partial(VQCodebook, codebook_size=32)
    quantizer = ProductQuantizer(partial(SingleGridQuantizer, codebook=codebook), branches=2, dim=24)
    return Tokenizer(CNNEncoder(**size), quantizer, CNNDecoder(**size), 16)


class ShuffledDigits(DigitsImages):
    """The control: labels of other training images."""

    def __init__(self, split, **options):
        super().__init__(split, **options)
        if split == "train":
            self.labels = self.labels[torch.randperm(len(self), generator=torch.Generator().manual_seed(3)).numpy()]


def data(dataset=DigitsImages, **options):
    return ImageDataModule(partial(dataset, resolution=16, **options), batch_size=64)


def trainer(**changes):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return lightning.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **changes)


def top1(figures):
    return next(figure.value for figure in figures if figure.name == "linear_probe_top1")


def test_digits_are_told_apart_and_shuffled_labels_are_not():
    probing, model = LinearProbing(**QUICK), product_tokenizer()
    figures = probing.measure(model, data(), trainer(), seed=0)
    control = probing.measure(model, data(ShuffledDigits), trainer(), seed=0)
    assert top1(figures) > 35  # chance: 10
    assert top1(control) < 20
    figure = figures[0]
    assert figure.label == "linear_probe_top1@N=359,feature=pre,branches={0,1},C=24,pooling=mean,epochs=6"
    assert figure.details["best_over_epochs"] == max(figure.details["per_epoch"])
    assert len(figure.details["per_epoch"]) == 6 and figure.details["per_epoch"][-1] == figure.value
    assert figure.protocol.extra["lr"] == 0.02 and figure.protocol.reference_samples == 1438
    assert figures[1].name == "linear_probe_top5" and figures[1].value > figure.value
    assert top1(probing.measure(model, data(), trainer(), seed=0)) == figure.value


@pytest.mark.parametrize("feature", ["pre", "post"])
@pytest.mark.parametrize("branches", [None, [0], [1], [1, 0]])
def test_features_are_those_of_the_chosen_branches(monkeypatch, feature, branches):
    model, seen = product_tokenizer().eval(), {}

    def record(training, train, val, num_classes, seed):
        seen["val"], seen["train"] = val, train(0)
        raise StopIteration

    monkeypatch.setattr("tessera.run.linear_probe.fit_linear_probe", record)
    with pytest.raises(StopIteration):
        LinearProbing(feature=feature, branches=branches).measure(model, data(), trainer(), seed=0)
    dataset = DigitsImages("val", 16)
    batch = dataset[list(range(359))]
    with torch.no_grad():
        z = model.encode(batch["image"])
        z = z if feature == "pre" else model.quantizer.decode(model.tokenize(batch["image"]))
    parts = {None: [0, 1], **{tuple(b): b for b in ([0], [1], [1, 0])}}[None if branches is None else tuple(branches)]
    expected = torch.cat([pooled(z[:, 12 * p : 12 * p + 12]) for p in parts], dim=1)
    torch.testing.assert_close(seen["val"][0], expected)
    assert torch.equal(seen["val"][1], batch["label"])
    assert len(seen["train"][0]) == 1438 and not seen["train"][0].is_inference()


class BrighterDigits(DigitsImages):
    """Augmentation that can be read off the image: its brightness counts the epochs."""

    def __init__(self, **options):
        super().__init__(**options)
        self.augment = self.split == "train"

    def __getitem__(self, key):
        batch = super().__getitem__(key)
        if self.augment:
            epochs = torch.tensor([float(epoch) for epoch, _ in key])
            batch["image"] = (epochs / 10)[:, None, None, None].expand_as(batch["image"])
        return batch


def test_augmented_features_are_drawn_in_every_epoch(monkeypatch):
    seen = []

    def record(training, train, val, num_classes, seed):
        seen.extend(train(epoch) for epoch in range(3))
        raise StopIteration

    monkeypatch.setattr("tessera.run.linear_probe.fit_linear_probe", record)
    with pytest.raises(StopIteration):
        LinearProbing(augment=True).measure(product_tokenizer(), data(BrighterDigits), trainer(), seed=0)
    for features, _ in seen:
        assert len(features) == 1438
        torch.testing.assert_close(features, features[:1].expand_as(features))  # all images of an epoch are alike
    assert not torch.allclose(seen[0][0], seen[1][0]) and not torch.allclose(seen[1][0], seen[2][0])
    with pytest.raises(ConfigError, match=r"data\.dataset\.augment"):
        LinearProbing(augment=True).measure(product_tokenizer(), data(), trainer(), seed=0)


def test_data_are_shared_out_among_processes_that_run_already():
    """A loader made before they do would give all of the images to each of them."""
    module, fit = data(), trainer()
    original, seen = module.reference_loader, []
    module.reference_loader = lambda split: seen.append((split, fit.predicting)) or original(split)
    LinearProbing(epochs=1, batch_size=256).measure(product_tokenizer(), module, fit, seed=0)
    assert seen == [("val", True), ("train", True)]


@pytest.mark.parametrize("branches", [[], [2], [0, 0], [-1]])
def test_refuses_impossible_branches(branches):
    with pytest.raises(ConfigError, match=r"task\.branches"):
        LinearProbing(branches=branches).chosen_branches(product_tokenizer())


def test_refuses_an_unknown_feature():
    with pytest.raises(ConfigError, match=r"task\.feature='mid'"):
        LinearProbing(feature="mid")


def probe(folder, *overrides):
    return run(folder, "name=probe", "task=linear_probe", *overrides)


def test_command_writes_results(tmp_path):
    path = tokenizer_checkpoint(tmp_path)
    quick = [f"task.{key}={value}" for key, value in QUICK.items()]
    results = probe(tmp_path, f"ckpt={path}", *quick, "task.feature=post")
    content = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert content["figures"] == results["figures"]
    assert [figure["name"] for figure in content["figures"]] == ["linear_probe_top1", "linear_probe_top5"]
    figure = content["figures"][0]
    assert figure["label"] == "linear_probe_top1@N=359,feature=post,branches={0},C=8,pooling=mean,epochs=6"
    assert figure["protocol"]["extra"]["tokenizer"] == tokenizer().fingerprint()
    assert figure["value"] > 15


def test_command_refuses_a_generator(tmp_path):
    path = generator_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="needs a tokenizer's checkpoint"):
        probe(tmp_path, f"ckpt={path}")


def _probe(rank, world):
    settings = {}
    if distributed.is_distributed():
        from lightning.pytorch.strategies import DDPStrategy

        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        settings = {"devices": world, "strategy": DDPStrategy(process_group_backend="gloo")}
    figures = LinearProbing(epochs=2, batch_size=64).measure(product_tokenizer(), data(), trainer(**settings), seed=0)
    return {figure.label: figure.details["per_epoch"] for figure in figures}


def test_two_processes_equal_one():
    single = _probe(0, 1)
    for answer in run_forked(_probe):
        for label, values in single.items():
            assert answer[label] == pytest.approx(values, abs=0.3)  # batches of other sizes round otherwise
