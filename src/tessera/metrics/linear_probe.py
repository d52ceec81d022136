"""Linear probing: how well a linear classifier tells classes apart by a tokenizer's latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError, DataError
from tessera.metrics.sums import SumMetric, usable_rows


def pooled(latent: Tensor) -> Tensor:
    """Mean over tokens: (B, C, h, w) -> (B, C)."""
    return latent.flatten(2).mean(2)


class LinearProbe(nn.Module):
    """Mean over tokens -> batch norm without affine -> linear layer.

    Args:
        dim: C.
        num_classes: outputs.

    Source: `LinearClassifier` of lxa9867/ImageFolder, tokenizer/tokenizer_image/linear_probing.py.
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(dim, eps=1e-6, momentum=0.1, affine=False)
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, classes) of latents (B, C, h, w), or of features (B, C) that are means over tokens already."""
        return self.linear(self.bn(features if features.ndim == 2 else pooled(features)))


class TopKAccuracy(SumMetric):
    """Shares of samples, in percent, whose label is among the k largest logits.

    Args:
        ks: numbers of logits; those above the number of classes count all of them.

    Raises:
        ConfigError: a k below 1.
    """

    higher_is_better = True

    def __init__(self, ks: Sequence[int] = (1, 5), **kwargs: Any):
        super().__init__(**kwargs)
        if not ks or min(ks) < 1:
            raise ConfigError(f"ks={list(ks)} of the accuracy must be numbers from 1 up")
        self.ks = tuple(ks)
        self.add_sum("hits", len(self.ks), dtype=torch.int64)
        self.add_sum("n", dtype=torch.int64)

    def update(self, logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: (N, C) float.
            labels: (N,) int64 in [0, C).
            mask: (N,) bool; rows that are False are left out.

        Raises:
            DataError: shapes that don't belong together, labels out of range, or logits that are not finite.
        """
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise DataError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not belong together")
        logits, rows = usable_rows(logits, logits.shape[1], mask, what="logits")
        labels = labels.to(logits.device)[rows]
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < logits.shape[1]):
            raise DataError(
                f"labels reach from {int(labels.min())} to {int(labels.max())}, "
                f"of {logits.shape[1]} classes; they belong to other data"
            )
        order = logits.topk(min(max(self.ks), logits.shape[1]), dim=1).indices == labels[:, None]
        hits = torch.stack([order[:, :k].any(1).sum() for k in self.ks])
        self.hits = self.hits + hits.to(self.hits.device)
        self.n = self.n + len(labels)

    def compute(self) -> Tensor:
        """(len(ks),) float64 in percent."""
        if self.n == 0:
            raise DataError("the accuracy has seen no sample; check data and limit_val_batches")
        return 100 * self.hits.double() / self.n


@dataclass
class ProbeResult:
    """Accuracies on the validation features, in percent, after each epoch.

    Attributes:
        top1, top5: per epoch.
        probe: the classifier after the last epoch.
    """

    probe: LinearProbe
    top1: list[float] = field(default_factory=list)
    top5: list[float] = field(default_factory=list)


@dataclass
class ProbeTraining:
    """How a probe is trained: AdamW on cross-entropy, first epochs at a lower rate, float32.

    Attributes:
        epochs: at least 1.
        batch_size: at least 2 (batch norm), all processes together.
        lr: after the warm-up.
        weight_decay: of all parameters.
        warmup_epochs: whole epochs at `warmup_lr`.
        warmup_lr: of the warm-up.
        milestones: fractions of `epochs`, increasing, after each of which the rate is a tenth of what it was.

    Raises:
        ConfigError: a value out of range.

    Source: as `LinearProbe`; its milestones (30, 60, 90 %) are passed to a schedule that ignores them, so that the rate
        never drops, which is the default here. Batches there are of 4 per process under bfloat16.
    """

    epochs: int = 10
    batch_size: int = 4
    lr: float = 1e-4
    weight_decay: float = 1e-4
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    milestones: Sequence[float] = ()

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("warmup_epochs", 0), ("weight_decay", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"task.{name}={getattr(self, name)} must be at least {least}")
        for name in ("lr", "warmup_lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"task.{name}={getattr(self, name)} must be above 0")
        self.milestones = list(self.milestones)
        if self.milestones != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise ConfigError(f"task.milestones={self.milestones} must be increasing fractions between 0 and 1")

    def rate(self, epoch: int) -> float:
        """Learning rate of an epoch, from 0."""
        if epoch < self.warmup_epochs:
            return self.warmup_lr
        return self.lr * 0.1 ** sum(epoch >= milestone * self.epochs for milestone in self.milestones)


def fit_linear_probe(
    training: ProbeTraining,
    train: Callable[[int], tuple[Tensor, Tensor]],
    val: tuple[Tensor, Tensor],
    num_classes: int,
    seed: int = 0,
) -> ProbeResult:
    """Train a probe on features and measure it after each epoch.

    The result depends on arguments and seed alone; torch's global generator is neither read nor advanced.

    Args:
        training: rates, epochs, batch size.
        train: epoch from 0 -> (features (N, C) float, labels (N,) int64), on the device to train on.
        val: features (M, C) and labels (M,).
        num_classes: labels are in [0, num_classes).
        seed: of the initial weights and the order of the samples.

    Raises:
        DataError: fewer than two training samples or no validation sample.
    """
    result = None
    for epoch in range(training.epochs):
        features, labels = train(epoch)
        if len(features) < 2 or len(val[0]) < 1:
            raise DataError(
                f"a probe needs at least 2 training and 1 validation samples, not {len(features)} and {len(val[0])}"
            )
        if result is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                probe = LinearProbe(features.shape[1], num_classes)
            result = ProbeResult(probe.to(features.device))
            optimizer = torch.optim.AdamW(
                probe.parameters(), training.lr, weight_decay=training.weight_decay, fused=True
            )
            order_of = torch.Generator().manual_seed(seed)
        for group in optimizer.param_groups:
            group["lr"] = training.rate(epoch)
        order = torch.randperm(len(features), generator=order_of).to(features.device)
        probe.train()
        for batch in order.split(training.batch_size):
            if len(batch) < 2:  # batch norm has no statistics of a single sample
                continue
            loss = F.cross_entropy(probe(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        probe.eval()
        # every process has all features: nothing to add up over them
        accuracy = TopKAccuracy((1, 5), sync_on_compute=False).to(features.device)
        with torch.no_grad():
            for part, labels_of in zip(val[0].split(8192), val[1].split(8192), strict=True):
                accuracy.update(probe(part), labels_of)
        for values, value in zip((result.top1, result.top5), accuracy.compute().tolist(), strict=True):
            values.append(value)
    return result
