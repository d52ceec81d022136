"""How a set of tokens uses its codebooks: counts, usage, entropy, perplexity."""

import math
from typing import Any

import torch
from torch import Tensor

from tessera.errors import ConfigError, DataError
from tessera.metrics.sums import SumMetric


def usage(counts: Tensor) -> Tensor:
    """Share of codes that occur: (..., K) counts -> (...) float64 in [0, 1]."""
    return (counts > 0).double().mean(dim=-1)


def entropy(counts: Tensor, base: float = math.e) -> Tensor:
    """-sum p log p with p = counts / sum, empty codes skipped: (..., K) counts -> (...) float64.

    In nats by default; `base=2` gives bits. 0 for a set without tokens.
    """
    p = counts.double() / counts.double().sum(dim=-1, keepdim=True).clamp_min(1)
    return -torch.xlogy(p, p).sum(dim=-1) / math.log(base)


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy in nats: the number of equally used codes with that entropy."""
    return entropy(counts).exp()


class CodebookUsage(SumMetric):
    """Counts of each code per branch and scale, summed over batches and processes.

    Averages of per-batch or per-process figures underestimate usage and perplexity; these come from summed
    counts.

    Args:
        codebook_size: K.
        num_branches: P.
        grids: (h, w) of each scale, in token order; None for one scale of any length.
    """

    def __init__(
        self,
        codebook_size: int,
        num_branches: int = 1,
        grids: list[tuple[int, int]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if codebook_size < 1 or num_branches < 1:
            raise ConfigError(f"codebook_size={codebook_size} and num_branches={num_branches} must be positive")
        self.codebook_size, self.num_branches = codebook_size, num_branches
        self.scale_sizes = [h * w for h, w in grids] if grids else None
        scales = len(self.scale_sizes) if self.scale_sizes else 1
        self.add_sum("counts", num_branches, scales, codebook_size, dtype=torch.int64)

    def update(self, tokens: Tensor, mask: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            tokens: (B, P, L) int64 in [0, K).
            mask: (B,) bool; rows that are False are left out.

        Raises:
            DataError: another number of branches or tokens, or a token outside the codebook.
        """
        if tokens.ndim != 3 or tokens.shape[1] != self.num_branches:
            raise DataError(f"tokens have shape {tuple(tokens.shape)}, expected (B, {self.num_branches}, L)")
        sizes = self.scale_sizes or [tokens.shape[2]]
        if sum(sizes) != tokens.shape[2]:
            raise DataError(f"tokens have {tokens.shape[2]} positions, but the grids sum to {sum(sizes)}")
        tokens = tokens.to(self.counts.device)
        tokens = tokens if mask is None else tokens[mask.to(tokens.device)]
        if tokens.numel() == 0:
            return
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= self.codebook_size:
            raise DataError(
                f"tokens reach from {low} to {high}, outside the codebook of {self.codebook_size}; "
                "they belong to another tokenizer"
            )
        # one bincount for all codebooks: shift each (branch, scale) into its own range
        scale = torch.repeat_interleave(
            torch.arange(len(sizes), device=tokens.device), torch.tensor(sizes, device=tokens.device)
        )
        branch = torch.arange(self.num_branches, device=tokens.device)[:, None]
        shifted = tokens + (branch * len(sizes) + scale) * self.codebook_size
        self.counts = self.counts + torch.bincount(shifted.flatten(), minlength=self.counts.numel()).view_as(
            self.counts
        )

    def compute(self) -> Tensor:
        """(P, S, K) int64 counts over all processes; see `codebook_figures`."""
        return self.counts


def codebook_figures(counts: Tensor, shared: bool = True) -> dict[str, float]:
    """Named figures from (P, S, K) counts.

    Args:
        counts: of each code per branch and scale.
        shared: the scales of a branch have one codebook. False: each has its own, so that counts of equal numbers are
            of different codes.

    Returns:
        usage, entropy_bits, entropy_nats, perplexity and dead_codes for each codebook of a branch (`usage_branch0`,
        its scales summed where they share it) and, where there are several scales, each of them
        (`usage_branch0_scale2`).
    """
    figures: dict[str, float] = {}
    counts = counts.view(1, 1, 1) if counts.ndim == 0 else counts  # torchmetrics squeezes single elements
    for branch, per_scale in enumerate(counts):
        rows = {f"branch{branch}": per_scale.sum(0)} if shared or len(per_scale) == 1 else {}
        if len(per_scale) > 1:
            rows |= {f"branch{branch}_scale{scale}": row for scale, row in enumerate(per_scale)}
        for name, row in rows.items():
            figures[f"usage_{name}"] = float(usage(row))
            figures[f"entropy_bits_{name}"] = float(entropy(row, base=2))
            figures[f"entropy_nats_{name}"] = float(entropy(row))
            figures[f"perplexity_{name}"] = float(perplexity(row))
            figures[f"dead_codes_{name}"] = float((row == 0).sum())
    return figures
