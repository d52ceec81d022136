"""What every codebook (quantizer of single vectors) offers to the structures built on it."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from tessera.quantizers.output import CodebookOutput


class Codebook(nn.Module, ABC):
    """K vectors of dimension D, held or implied.

    Attributes:
        codebook_size: K.
        dim: D.
    """

    def __init__(self, dim: int, codebook_size: int):
        super().__init__()
        self.dim, self.codebook_size = dim, codebook_size

    @abstractmethod
    def assign(self, x: Tensor) -> Tensor:
        """Indices (N,) int64 in [0, K) of the codes that x (N, D) is quantised to; no gradient."""

    @abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors (N, D) float of indices (N,) int64 in [0, K)."""

    @abstractmethod
    def forward(self, x: Tensor) -> CodebookOutput:
        """Quantise x (N, D) with straight-through gradient and unweighted losses."""

    @abstractmethod
    def neighbors(self, query: Tensor, k: int) -> Tensor:
        """Nearest codes of vectors (float (N, D)) or of codes (int64 (N,)); (N, k) int64, nearest first."""
