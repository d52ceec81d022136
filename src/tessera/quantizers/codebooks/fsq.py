"""Finite scalar quantisation: a few levels per channel, every combination a code."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.quantizers.codebooks.base import Codebook
from tessera.quantizers.enumeration import nearest_products
from tessera.quantizers.output import CodebookOutput

# Widens the bound so that the outermost levels are reached by finite latents, and two levels are possible at all
_MARGIN = 1e-3


class FSQCodebook(Codebook):
    """Each channel is bounded and rounded to one of L_d levels; K = prod L_d implied codes, nothing learned.

    bound(z) = h tanh(z + shift) - offset,  h = (L - 1)(1 + 1e-3) / 2,  offset = 1/2 for even L, else 0,
    shift = artanh(offset / h);  code = round(bound(z)) / floor(L / 2);
    index = sum_d letter_d prod_{e < d} L_e, letters counted from the lowest level

    So bound(0) = 0 is a level, and codes lie in [-1, 1]. There are no losses: the rounding needs none.

    Args:
        dim: D, channels of one vector; None: as many as levels.
        levels: L_d of each channel, at least 2.

    Raises:
        ConfigError: no level, one below 2, or as many as dim is not; K beyond int64.

    Source: Mentzer et al. 2023 (arXiv:2309.15505), sec. 3.1 and app. A. There the shift is tan(offset / h), which
        leaves 0 between two levels, and h is narrowed, which forbids L = 2.
    """

    def __init__(self, dim: int | None = None, levels: Sequence[int] = (8, 5, 5, 5)):
        prefix = "quantizer.branch.codebook"
        levels = [int(level) for level in levels]
        if not levels or min(levels) < 2:
            raise ConfigError(f"{prefix}.levels={levels} must be one or more whole numbers of at least 2")
        if dim is not None and dim != len(levels):
            raise ConfigError(
                f"{prefix}.levels={levels} needs {len(levels)} channels, but quantizer.dim / quantizer.branches = "
                f"{dim}; set quantizer.dim={len(levels)} times quantizer.branches (or null), or give {dim} levels"
            )
        size = math.prod(levels)
        if size >= 2**63:
            raise ConfigError(f"{prefix}.levels={levels} make {size} codes, more than int64 tokens can count")
        super().__init__(len(levels), size)
        self.levels = levels
        half = [(level - 1) * (1 + _MARGIN) / 2 for level in levels]
        offset = [0.5 * (level % 2 == 0) for level in levels]
        shift = [math.atanh(o / h) for o, h in zip(offset, half, strict=True)]
        strides = [math.prod(levels[:d]) for d in range(len(levels))]
        for name, values in (("half", half), ("offset", offset), ("shift", shift)):
            self.register_buffer(f"_{name}", torch.tensor(values, dtype=torch.float32), persistent=False)
        for name, values in (("size", levels), ("zero", [level // 2 for level in levels]), ("stride", strides)):
            self.register_buffer(f"_{name}", torch.tensor(values, dtype=torch.int64), persistent=False)

    def extra_repr(self) -> str:
        """What decides the tokens (the tokenizer's fingerprint hashes it)."""
        return f"levels={self.levels}"

    def project(self, x: Tensor) -> Tensor:
        """bound(x) / floor(L / 2) of latents (N, D), float32."""
        return (torch.tanh(x.float() + self._shift) * self._half - self._offset) / self._zero

    def assign(self, x: Tensor) -> Tensor:
        """Indices (N,) int64 of the codes nearest to points x (N, D)."""
        letters = (x.detach().float() * self._zero).round().long() + self._zero
        return (torch.minimum(letters.clamp_min_(0), self._size - 1) * self._stride).sum(-1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (N, D) float32 in [-1, 1] of indices (N,) int64."""
        letters = indices[:, None] // self._stride % self._size
        return (letters - self._zero).float() / self._zero

    def neighbors_of_points(self, x: Tensor, k: int) -> Tensor:
        """(N, k) int64 by Euclidean distance."""
        costs = []
        for part, level in zip(x.float().unbind(1), self.levels, strict=True):
            zero = level // 2
            values = torch.arange(-zero, level - zero, device=x.device) / zero
            costs.append((part[:, None] - values).square_())
        return nearest_products(costs, k)

    def forward(self, x: Tensor) -> CodebookOutput:
        """Quantise x (N, D) float; the gradient passes straight through the rounding and through the bound."""
        with torch.autocast(x.device.type, enabled=False):
            latents = self.project(x)
            indices = self.assign(latents)
            vectors = latents + (self.lookup(indices) - latents).detach()
        return CodebookOutput(vectors=vectors, indices=indices, latents=latents)
