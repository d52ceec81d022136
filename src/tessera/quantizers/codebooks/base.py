"""What every codebook (quantizer of single vectors) offers to the structures built on it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from tessera.quantizers.output import CodebookOutput


class Codebook(nn.Module, ABC):
    """K vectors of dimension D, held or implied.

    A structure of one grid calls `forward`. One that sums codes over scales calls the parts: `project` once for the
    latent, then at each scale `assign` and `lookup` on the residual, and `penalties` and `observe` beside them.

    Attributes:
        codebook_size: K.
        dim: D.
        carries_gradient: whether the decoder's gradient reaches the codes and the latent through `forward`'s vectors
            themselves, so that no straight-through may be laid around a sum of them.
    """

    carries_gradient: ClassVar[bool] = False

    def __init__(self, dim: int, codebook_size: int):
        super().__init__()
        self.dim, self.codebook_size = dim, codebook_size

    def project(self, x: Tensor) -> Tensor:
        """Latents (N, D) of any precision -> float32 points of the space that the codes lie in; differentiable."""
        return x.float()

    @abstractmethod
    def assign(self, x: Tensor) -> Tensor:
        """Indices (N,) int64 in [0, K) of the codes nearest to points x (N, D); no gradient."""

    def assigner(self) -> Callable[[Tensor], Tensor]:
        """`assign` for several calls between which the codes do not change; may prepare them once."""
        return self.assign

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors (N, D) float of indices (N,) int64 in [0, K)."""

    @abstractmethod
    def forward(self, x: Tensor) -> CodebookOutput:
        """Quantise latents x (N, D) with straight-through gradient and unweighted losses."""

    @torch.no_grad()
    def neighbors(self, query: Tensor, k: int) -> Tensor:
        """The k codes nearest to points or to codes.

        Args:
            query: (N, D) float points, or (N,) int64 code indices.
            k: 1 <= k <= K.

        Returns:
            (N, k) int64, nearest first. A code's nearest neighbour is itself (or an equal code of lower index).
        """
        if query.is_floating_point():
            return self.neighbors_of_points(query, k)
        # Equal codes have equal neighbours: search once per code in use, then gather
        used, position = query.unique(return_inverse=True)
        return self.neighbors_of_codes(used, k)[position]

    @abstractmethod
    def neighbors_of_points(self, x: Tensor, k: int) -> Tensor:
        """(N, k) int64: the codes nearest to points x (N, D) float, nearest first."""

    def neighbors_of_codes(self, indices: Tensor, k: int) -> Tensor:
        """(N, k) int64: the codes nearest to codes (N,) int64, nearest first; by default as those of points."""
        return self.neighbors_of_points(self.lookup(indices), k)

    def penalties(self, x: Tensor, mask: Tensor | None = None, gain: float = 1.0) -> dict[str, Tensor]:
        """Named losses of points beyond those of the distance to their codes, e.g. entropies; none by default.

        Args:
            x: (N, D) float points, with gradient.
            mask: (N,) bool; rows that are False are left out.
            gain: factor by which the structure multiplies the codes at this scale.
        """
        return {}

    def observe(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Update what is not learned by gradient from points x (N, D) and their codes (N,); training only.

        Rows where `mask` (N,) bool is False are left out, as in `penalties`; where it leaves none on any rank, nothing
        changes.

        Called once per training forward pass, after all lookups. All ranks must call it.
        """
