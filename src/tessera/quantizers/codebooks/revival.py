"""What moves codes that nothing is assigned to back to where the vectors are."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tessera.distributed import all_reduce_sum, rank, world_size
from tessera.errors import ConfigError
from tessera.quantizers.search import nearest_codes
from tessera.rng import IndexedRng

if TYPE_CHECKING:
    from tessera.quantizers.codebooks.vq import VQCodebook

_PREFIX = "quantizer.branch.codebook.revival"


def _or_zero(x: Tensor) -> Tensor:
    """Vectors (N, D) and a zero one behind them, to look up where there is none."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


class Revival(nn.Module, ABC):
    """Watches how often codes are used, and moves some in every training step, equally on all ranks.

    Args:
        codebook_size: K.
        initial: share of the vectors that each code is taken to have before any was seen.
        decay: of the moving share, in [0, 1).

    Attributes:
        usage: (K,) float; moving share of the vectors that each code is assigned, over all ranks.

    Raises:
        ConfigError: decay out of range.
    """

    def __init__(self, codebook_size: int, initial: float, decay: float):
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"{_PREFIX}.decay={decay} is outside [0, 1)")
        self.decay = decay
        self.register_buffer("usage", torch.full((codebook_size,), initial))

    def _count(self, indices: Tensor) -> Tensor:
        """Update the shares; whether any rank has a vector, as a scalar bool. Where none has, they stay."""
        ones = torch.ones_like(indices, dtype=self.usage.dtype)
        # no bincount: on a GPU it waits for the largest index
        hits = all_reduce_sum(torch.zeros_like(self.usage).index_add_(0, indices, ones))
        seen = hits.any()
        self.usage.lerp_(hits / hits.sum().clamp_min(1), (1 - self.decay) * seen)
        return seen

    @abstractmethod
    def forward(self, codebook: "VQCodebook", x: Tensor, indices: Tensor) -> Tensor:
        """Take in vectors x (N, D) with codes (N,) and move codes of `codebook` in place; (K,) bool: which moved.

        N may be 0; where it is on all ranks, no code moves.
        """


class RandomRevival(Revival):
    """Replaces codes whose moving share of the vectors is below threshold / K by random vectors of the batch.

    Args:
        codebook_size: K.
        threshold: in (0, 1); a share of the mean usage.
        decay: of the moving share; the slowest death takes ln(threshold) / ln(decay) steps.
        seed: of the draws, which depend on it and on the number of steps taken, and cover the batches of all ranks.

    Raises:
        ConfigError: a value out of range.

    Source: Jukebox (arXiv:2005.00341), random restarts.
    """

    def __init__(self, codebook_size: int, threshold: float = 0.1, decay: float = 0.99, seed: int = 0):
        super().__init__(codebook_size, 1 / codebook_size, decay)
        if not 0 < threshold < 1:
            raise ConfigError(f"{_PREFIX}.threshold={threshold} is outside (0, 1); it is a share of the mean usage")
        self.threshold, self.seed = threshold, seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def _drawn(self, x: Tensor) -> Tensor:
        """(K, D): a random vector of all ranks' for each code, without a read-back to the host."""
        size = len(self.usage)
        number = self.steps * size + torch.arange(size, device=x.device)
        uniform = IndexedRng(self.seed, number).uniform("codebook/revival")
        lengths = torch.zeros(world_size(), dtype=torch.int64, device=x.device)
        lengths[rank()] = len(x)
        ends = all_reduce_sum(lengths).cumsum(0)
        row = (uniform.double() * ends[-1]).long() - (ends[rank()] - len(x))
        mine = (row >= 0) & (row < len(x))
        return all_reduce_sum(_or_zero(x)[torch.where(mine, row, len(x))])

    def forward(self, codebook: "VQCodebook", x: Tensor, indices: Tensor) -> Tensor:
        dead = self._count(indices) & (self.usage < self.threshold / len(self.usage))
        drawn = self._drawn(x)
        codebook.embedding.copy_(torch.where(dead[:, None], drawn, codebook.embedding))
        self.usage.masked_fill_(dead, 1 / len(self.usage))  # a grace period
        self.steps.add_(1)
        return dead


class ClusteringRevival(Revival):
    """Draws every code towards the vector of the batch nearest to it, the more the less it is used.

    a_k = exp(-10 K p_k / (1 - 0.99) - 1e-3), p_k the moving share;  e_k <- (1 - a_k) e_k + a_k f_k

    Args:
        codebook_size: K.
        decay: of the moving share.

    Raises:
        ConfigError: decay out of range.

    Source: CVQ-VAE (arXiv:2307.15139); TiTok's `clustering_vq` (bytedance/1d-tokenizer), from whose gathered batch
        the nearest vector is found rank by rank here.
    """

    def __init__(self, codebook_size: int, decay: float = 0.99):
        super().__init__(codebook_size, 0.0, decay)

    def _nearest(self, codebook: "VQCodebook", x: Tensor) -> Tensor:
        """(K, D): for each code the nearest of all ranks' vectors."""
        codes, points = codebook.compared(codebook.embedding), codebook.compared(x)
        distances = codes.new_zeros(world_size(), len(codes))
        if len(x):
            own = nearest_codes(codes, points)  # Euclidean also for unit vectors, where the order is the same
            distances[rank()] = (codes - points[own]).square().sum(1)
        else:
            own = torch.zeros(len(codes), dtype=torch.int64, device=x.device)
            distances[rank()] = torch.inf
        best = all_reduce_sum(distances).argmin(0) == rank()
        return all_reduce_sum(_or_zero(x)[own] * best[:, None])

    def forward(self, codebook: "VQCodebook", x: Tensor, indices: Tensor) -> Tensor:
        nearest = self._nearest(codebook, x)
        seen = self._count(indices)
        pull = torch.exp(-self.usage * len(self.usage) * 10 / (1 - 0.99) - 1e-3) * seen
        codebook.embedding.lerp_(nearest, pull[:, None])
        return torch.zeros_like(pull, dtype=torch.bool)
