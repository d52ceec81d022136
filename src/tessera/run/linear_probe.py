"""`eval.py task=linear_probe`: a linear classifier on a tokenizer's frozen latents."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from tessera import distributed
from tessera.data import ImageDataModule
from tessera.data.sampler import EvalBatches
from tessera.errors import ConfigError
from tessera.metrics.linear_probe import ProbeTraining, fit_linear_probe, pooled
from tessera.metrics.protocol import Figure, Protocol
from tessera.run.subject import Subject
from tessera.tokenizers import Tokenizer

log = logging.getLogger(__name__)

FEATURES = ("pre", "post")
Features = tuple[Tensor, Tensor]


class ProbeFeatures(lightning.LightningModule):
    """Collects features and labels of a data set over all processes, in the order of its indices.

    Args:
        tokenizer: frozen.
        feature: "pre": latent after quant_conv, before quantisation; "post": the quantised latent.
        branches: whose channels are taken, in this order.

    Attributes:
        collected: (N, C) float32 features, the tokens' means, and (N,) int64 labels; on the CPU.
    """

    def __init__(self, tokenizer: Tokenizer, feature: str, branches: Sequence[int]):
        super().__init__()
        self.tokenizer, self.feature, self.branches = tokenizer.eval(), feature, list(branches)
        self.collected: Features | None = None
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def features(self, images: Tensor) -> Tensor:
        """(B, C) float32 of images (B, 3, H, W)."""
        quantizer = self.tokenizer.quantizer
        latent = self.tokenizer.encode(images)
        if self.feature == "post":
            latent = quantizer.decode(quantizer.encode(latent))
        parts = latent.float().chunk(quantizer.num_branches, dim=1)
        return pooled(torch.cat([parts[branch] for branch in self.branches], dim=1))

    def on_predict_epoch_start(self) -> None:
        self._parts = []

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        features = self.features(batch["image"])
        self._parts.append((batch["index"].cpu(), features.cpu(), batch["label"].cpu()))
        return features

    def on_predict_epoch_end(self) -> None:
        parts = self._parts
        if distributed.is_distributed():
            gathered: list[Any] = [None] * distributed.world_size()
            dist.all_gather_object(gathered, parts)
            parts = [part for share in gathered for part in share]
        index, features, labels = (torch.cat(column) for column in zip(*parts, strict=True))
        order = index.argsort(stable=True)
        self.collected, self._parts = (features[order], labels[order].long()), []


class AugmentedBatches(EvalBatches):
    """Every sample once, as (epoch, number) keys: each epoch has its own crops and flips."""

    def __init__(self, length: int, batch_size: int, epoch: int):
        super().__init__(length, batch_size)
        self.probe_epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for numbers in super().__iter__():
            yield [(self.probe_epoch, number) for number in numbers]


class LinearProbing:
    """Linear probe of a tokenizer's latents: mean over tokens -> BatchNorm (no affine) -> linear layer.

    Features are computed once (with `augment`: once per epoch) and kept, so that an epoch of the classifier costs
    little. The figure is the accuracy after the last epoch; the best one over epochs, which is what the public script
    reports, is chosen on the validation set itself and therefore only a detail.

    Args:
        feature: "pre": latent after quant_conv, before quantisation (as published); "post": the quantised latent.
        branches: numbers of the branches whose channels are taken; None: all.
        augment: features of the data's training crops and flips, drawn anew in every epoch, instead of the fixed crop.
        epochs, batch_size, lr, weight_decay, warmup_epochs, warmup_lr, milestones: see `ProbeTraining`.

    Raises:
        ConfigError: a value out of range, an unknown feature.

    Source: ImageFolder (arXiv:2410.01756), linear probing; settings of `linear_probing.py` of lxa9867/ImageFolder.
        Which branch and feature gave the published figures isn't known, and the number of channels decides much, so all
        are part of the figure's name.
    """

    def __init__(
        self,
        feature: str = "pre",
        branches: Sequence[int] | None = None,
        augment: bool = False,
        epochs: int = 10,
        batch_size: int = 4,
        lr: float = 1e-4,
        weight_decay: float = 1e-4,
        warmup_epochs: int = 1,
        warmup_lr: float = 1e-5,
        milestones: Sequence[float] = (),
    ):
        if feature not in FEATURES:
            raise ConfigError(f"task.feature={feature!r} is unknown; choose one of {', '.join(FEATURES)}")
        self.feature, self.branches, self.augment = feature, branches, augment
        self.training = ProbeTraining(epochs, batch_size, lr, weight_decay, warmup_epochs, warmup_lr, milestones)

    def chosen_branches(self, tokenizer: Tokenizer) -> list[int]:
        """The branches, checked.

        Raises:
            ConfigError: one that the tokenizer doesn't have, none, or one twice.
        """
        count = tokenizer.quantizer.num_branches
        branches = list(range(count)) if self.branches is None else list(self.branches)
        if not branches or len(set(branches)) < len(branches) or not set(branches) <= set(range(count)):
            raise ConfigError(
                f"task.branches={branches} must name different branches of this tokenizer, which are 0 to {count - 1}"
            )
        return branches

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure the tokenizer of a checkpoint; see `measure`."""
        figures = self.measure(subject.tokenizer(), subject.data(), subject.trainer(), subject.cfg.seed)
        return {"figures": figures}

    def measure(
        self, tokenizer: Tokenizer, datamodule: ImageDataModule, trainer: lightning.Trainer, seed: int
    ) -> list[Figure]:
        """Measure a tokenizer.

        Args:
            tokenizer: frozen; not modified.
            datamodule: of images with classes.
            trainer: computes the features; all its processes must call.
            seed: of the classifier's initial weights and order of samples.

        Returns:
            `linear_probe_top1` and `linear_probe_top5`, in percent.

        Raises:
            ConfigError: `augment` with data that have no augmentation; impossible branches.
        """
        branches = self.chosen_branches(tokenizer)
        dataset = datamodule.images("train")
        if self.augment and not dataset.augment:
            raise ConfigError("task.augment=true needs augmented training data; set data.dataset.augment=true")
        module = ProbeFeatures(tokenizer, self.feature, branches)

        def collect(loader: Callable[[], DataLoader]) -> Features:
            module.predict_dataloader = loader  # called when the processes run: samplers look at their number
            trainer.predict(module, return_predictions=False)
            features, labels = module.collected
            return features.to(trainer.strategy.root_device), labels.to(trainer.strategy.root_device)

        val = collect(lambda: datamodule.reference_loader("val"))
        train = self._train_features(datamodule, collect)
        num_classes = dataset.num_classes
        # prediction leaves the inference mode on its tensors, which autograd refuses
        result = fit_linear_probe(self.training, train, (val[0].clone(), val[1].clone()), num_classes, seed)
        protocol = Protocol(
            extractor="",
            crop=dataset.crop_id,
            reference="",
            reference_samples=len(dataset),
            samples=len(val[1]),
            dtype="float32 means and classifier",
            extra={
                "feature": self.feature,
                "branches": branches,
                "C": val[0].shape[1],
                "pooling": "mean",
                **vars(self.training),
                "augment": self.augment,
                "precision": str(trainer.precision),
                "seed": seed,
                "classes": num_classes,
                "tokenizer": tokenizer.fingerprint(),
            },
            in_label=("feature", "branches", "C", "pooling", "epochs"),
        )
        return [
            Figure(name, values[-1], protocol, {"best_over_epochs": max(values), "per_epoch": values})
            for name, values in (("linear_probe_top1", result.top1), ("linear_probe_top5", result.top5))
        ]

    def _train_features(
        self, datamodule: ImageDataModule, collect: Callable[[Callable[[], DataLoader]], Features]
    ) -> Callable[[int], Features]:
        if not self.augment:
            features, labels = collect(lambda: datamodule.reference_loader("train"))
            fixed = features.clone(), labels.clone()
            return lambda epoch: fixed

        def augmented(epoch: int) -> Features:
            dataset = datamodule.images("train")

            def loader() -> DataLoader:
                batches = AugmentedBatches(len(dataset), datamodule.eval_batch_size, epoch)
                return DataLoader(dataset, batch_size=None, sampler=batches, num_workers=datamodule.num_workers)

            features, labels = collect(loader)
            return features.clone(), labels.clone()

        return augmented
