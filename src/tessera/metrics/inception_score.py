"""Inception Score, from sums that merge over batches and processes in any order."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.errors import ConfigError, DataError
from tessera.metrics.sums import SumMetric, usable_rows

SPLIT_SIZE = 5000


def split_scores(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """exp(mean KL(p(y|x) || p(y))) of consecutive splits, p(y) being the mean of p(y|x) inside a split.

    Args:
        logits: (N, C) float.
        sizes: of the splits, which sum to N.

    Returns:
        (S,) float64. ADM and torch-fidelity report their mean.

    Raises:
        DataError: sizes that don't sum to N.
    """
    if sum(sizes) != len(logits):
        raise DataError(f"splits of {sum(sizes)} samples do not divide {len(logits)}")
    part = torch.repeat_interleave(torch.arange(len(sizes)), torch.as_tensor(sizes)).to(logits.device)
    return _scores(*_sums(logits, part, len(sizes)))


def _sums(logits: Tensor, part: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Per split: samples, sum of p(y|x), and sum of p(y|x) log p(y|x) over samples and classes."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    belongs = F.one_hot(part, parts).double().T
    return belongs.sum(1).long(), belongs @ p, belongs @ (p * log_p).sum(1)


def _scores(n: Tensor, probability: Tensor, negative_entropy: Tensor) -> Tensor:
    mean = probability / n[:, None]
    return (negative_entropy / n - torch.xlogy(mean, mean).sum(1)).exp()


class InceptionScore(SumMetric):
    """Mean over splits of the Inception Score.

    As in ADM, splits are consecutive chunks of 5 000 samples, the last one being shorter where they don't divide.
    Chunks of samples sorted by class would hold few classes each and depress the score, so a sample's place follows
    from a fixed permutation of the sample numbers; the score doesn't depend on the order in which they are measured.

    Args:
        num_classes: C.
        num_samples: N, to assign samples to splits. None: one split of whatever comes, which is reported as
            `IS[splits=1]`.
        split_size: of the splits.
        shuffle_seed: of the permutation; None: splits follow the sample numbers.

    Raises:
        ConfigError: a size below 1.

    Source: Salimans et al. 2016 (arXiv:1606.03498); openai/guided-diffusion, evaluations, for the splits.
    """

    higher_is_better = True

    def __init__(
        self,
        num_classes: int,
        num_samples: int | None = None,
        split_size: int = SPLIT_SIZE,
        shuffle_seed: int | None = 0,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if split_size < 1 or (num_samples is not None and num_samples < 1):
            raise ConfigError(f"split_size={split_size} and num_samples={num_samples} of the IS must be at least 1")
        self.num_classes, self.num_samples, self.split_size = num_classes, num_samples, split_size
        parts = 1 if num_samples is None else -(-num_samples // split_size)
        self._part: Tensor | None = None
        if num_samples is not None:
            place = torch.arange(num_samples)
            if shuffle_seed is not None:
                place = torch.randperm(num_samples, generator=torch.Generator().manual_seed(shuffle_seed))
            self._part = place // split_size
        self.add_sum("n", parts, dtype=torch.int64)
        self.add_sum("probability", parts, num_classes)
        self.add_sum("negative_entropy", parts)

    @property
    def flavour(self) -> str:
        """What distinguishes the figure from ADM's: "" or e.g. "splits=1"."""
        if self.num_samples is None:
            return "splits=1"
        return "" if self.split_size == SPLIT_SIZE else f"split_size={self.split_size}"

    def update(self, logits: Tensor, mask: Tensor | None = None, index: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: (B, C) float.
            mask: (B,) bool; rows that are False are left out.
            index: (B,) int64 numbers of the samples in [0, N); needed where there are splits.

        Raises:
            DataError: another number of classes; NaN or infinite logits; numbers missing or out of range.
        """
        logits, index_ = usable_rows(logits, self.num_classes, mask, index, "logits")
        if self._part is None:
            part = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        else:
            if index is None:
                raise DataError("the Inception Score needs the numbers of the samples to assign them to splits")
            numbers = index_.cpu()
            if len(numbers) and not (int(numbers.min()) >= 0 and int(numbers.max()) < self.num_samples):
                raise DataError(
                    f"sample numbers reach from {int(numbers.min())} to {int(numbers.max())}, but the Inception Score "
                    f"was told of {self.num_samples} samples"
                )
            part = self._part[numbers].to(logits.device)
        n, probability, negative_entropy = _sums(logits, part, len(self.probability))
        self.n = self.n + n.to(self.n.device)
        self.probability = self.probability + probability.to(self.n.device)
        self.negative_entropy = self.negative_entropy + negative_entropy.to(self.n.device)

    def compute(self) -> Tensor:
        """The score, a float64 scalar.

        Raises:
            DataError: no sample, or another number than announced.
        """
        found = int(self.n.sum())
        if found == 0 or (self.num_samples is not None and found != self.num_samples):
            raise DataError(
                f"the Inception Score has seen {found} samples of {self.num_samples or 'any number'}; measure every "
                "sample exactly once"
            )
        return _scores(self.n, self.probability, self.negative_entropy).mean()
