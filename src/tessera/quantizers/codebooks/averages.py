"""Codes as moving averages of the vectors assigned to them, instead of learned by gradient."""

import torch
from torch import Tensor, nn

from tessera.distributed import all_reduce_sum
from tessera.errors import ConfigError

# Laplace smoothing: a cluster counts as this many vectors at least
_SMOOTHING = 1e-5


class ClusterAverages(nn.Module):
    """Moving counts n_k and sums s_k of the clusters, over all ranks.

    n <- d n + (1 - d) count,  s <- d s + (1 - d) sum of assigned vectors,
    e_k = s_k / n'_k,  n'_k = (n_k + 1e-5) / (sum n + K 1e-5) * sum n

    They start as if each code had been assigned one vector equal to itself.

    Args:
        codes: (K, D) initial codes.
        decay: d, in [0, 1).

    Raises:
        ConfigError: decay out of range.

    Source: van den Oord et al. 2017 (arXiv:1711.00937), app. A.1; smoothing as in the authors' public code.
    """

    def __init__(self, codes: Tensor, decay: float):
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"quantizer.branch.codebook.ema_decay={decay} is outside [0, 1)")
        self.decay = decay
        self.register_buffer("counts", torch.ones_like(codes[:, 0]))
        self.register_buffer("sums", codes.detach().clone())

    def update(self, x: Tensor, indices: Tensor, codes: Tensor) -> None:
        """Take in vectors x (N, D) with codes (N,), and move `codes` (K, D) in place, equally on all ranks.

        N may be 0; where it is on all ranks, nothing changes.
        """
        fresh = x.new_zeros(len(self.counts), x.shape[1] + 1)
        fresh.index_add_(0, indices, torch.cat([torch.ones_like(x[:, :1]), x], dim=1))
        fresh = all_reduce_sum(fresh)  # counts and sums in one message
        seen = fresh[:, 0].any()
        weight = (1 - self.decay) * seen
        self.counts.lerp_(fresh[:, 0], weight)
        self.sums.lerp_(fresh[:, 1:], weight)
        total = self.counts.sum()
        smooth = (self.counts + _SMOOTHING) / (total + len(self.counts) * _SMOOTHING) * total
        codes.copy_(torch.where(seen, self.sums / smooth[:, None], codes))

    def restart(self, moved: Tensor, codes: Tensor) -> None:
        """Let the codes (K, D) selected by moved (K,) bool begin again where they now are."""
        self.counts.copy_(torch.where(moved, torch.ones_like(self.counts), self.counts))
        self.sums.copy_(torch.where(moved[:, None], codes.detach(), self.sums))
