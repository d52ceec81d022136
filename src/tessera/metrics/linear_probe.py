"""Linear probing: how well a linear classifier tells classes apart by a tokenizer's latents."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError, DataError


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


def top_k_percent(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of rows, in percent, whose label (N,) is among the k largest of logits (N, classes)."""
    return 100 * (logits.topk(min(k, logits.shape[1]), dim=1).indices == labels[:, None]).any(1).double().mean().item()


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
        with torch.no_grad():
            logits = torch.cat([probe(part) for part in val[0].split(8192)])
        for k, values in ((1, result.top1), (5, result.top5)):
            values.append(top_k_percent(logits, val[1], k))
    return result
