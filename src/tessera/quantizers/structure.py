"""Structures: how the codes of one branch lie over a latent grid. The simplest: one code per cell."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.quantizers.codebooks.base import Codebook
from tessera.quantizers.output import QuantizerOutput

Grid = tuple[int, int]


def as_grid(grid: int | Sequence[int], key: str) -> Grid:
    """(height, width) from a pair or from one number for a square; `key` names the config value in errors."""
    pair = (grid, grid) if isinstance(grid, int) else tuple(int(side) for side in grid)
    if len(pair) != 2 or min(pair) < 1:
        raise ConfigError(f"{key}={grid!r} is no grid; give (height, width), both at least 1, or one number")
    return pair


class Structure(nn.Module, ABC):
    """Quantizer of one branch: grids of codes, from one or more codebooks, for a latent (B, D, h, w).

    Attributes:
        dim: D.
        codebooks: ModuleList.
        codebook_size: K; tokens lie in [0, K).
    """

    dim: int
    codebooks: nn.ModuleList

    @property
    def codebook_size(self) -> int:
        return self.codebooks[0].codebook_size

    @property
    @abstractmethod
    def grids(self) -> list[Grid]:
        """One (height, width) per scale, coarse to fine; the last is the latent's."""

    @abstractmethod
    def bind_grid(self, grid: Grid) -> None:
        """Tell the structure the latent grid; refuses one that contradicts its own."""

    @abstractmethod
    def forward(self, z: Tensor, depths: Tensor | None = None) -> QuantizerOutput:
        """Quantise z (B, D, h, w); tokens are (B, 1, L). With depths (B,) int64, z_q sums only so many scales."""

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """Tokens (B, L) int64 of z (B, D, h, w); no gradient."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> Tensor:
        """Quantised latent (B, D, h, w) float of tokens (B, L)."""

    @abstractmethod
    def neighbors(self, query: Tensor, k: int) -> Tensor:
        """(B, L, k) int64: the k codes nearest to z (B, D, h, w) float, or to tokens (B, L) int64."""


class SingleGridQuantizer(Structure):
    """One code per cell of the latent grid, row by row.

    Args:
        dim: channels of the latent.
        codebook: factory called with `dim`.
        grid: (height, width), one number for a square, or None: given later by `bind_grid`.

    Raises:
        ConfigError: impossible grid.
    """

    def __init__(self, dim: int, codebook: Callable[..., Codebook], grid: Sequence[int] | int | None = None):
        super().__init__()
        self.dim = dim
        self.codebooks = nn.ModuleList([codebook(dim=dim)])
        self._grid = None if grid is None else as_grid(grid, "quantizer.branch.grid")

    @property
    def grids(self) -> list[Grid]:
        if self._grid is None:
            raise ConfigError(
                "the quantizer's grid is not known; build it into a Tokenizer or set quantizer.branch.grid"
            )
        return [self._grid]

    def bind_grid(self, grid: Grid) -> None:
        grid = as_grid(grid, "grid")
        if self._grid is not None and self._grid != grid:
            raise ConfigError(
                f"quantizer.branch.grid={self._grid} contradicts the latent grid {grid} of the encoder; "
                "leave quantizer.branch.grid out, or change data.dataset.resolution"
            )
        self._grid = grid

    def _rows(self, z: Tensor) -> Tensor:
        """(B, D, h, w) -> (B h w, D), raster order."""
        if z.ndim != 4 or z.shape[1] != self.dim or (self._grid is not None and z.shape[2:] != self._grid):
            expected = ("h", "w") if self._grid is None else self._grid
            raise ValueError(
                f"latent of shape {tuple(z.shape)} does not fit a quantizer of {self.dim} channels on the "
                f"grid {expected[0]} x {expected[1]}"
            )
        return z.permute(0, 2, 3, 1).reshape(-1, self.dim)

    def _map(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """(B h w, D) -> (B, D, h, w) of `shape` (B, h, w)."""
        return rows.view(*shape, self.dim).permute(0, 3, 1, 2).contiguous()

    def forward(self, z: Tensor, depths: Tensor | None = None) -> QuantizerOutput:
        """Quantise z; a single grid has nothing to drop, so `depths` is only passed on."""
        out = self.codebooks[0](self._rows(z))
        shape = (z.shape[0], *z.shape[2:])
        return QuantizerOutput(
            z_q=self._map(out.vectors, shape),
            tokens=out.indices.view(z.shape[0], 1, -1),
            latent=self._map(out.latents, shape),
            losses=out.losses,
            depths=depths,
        )

    def encode(self, z: Tensor) -> Tensor:
        return self.codebooks[0].assign(self._rows(z)).view(z.shape[0], -1)

    def decode(self, tokens: Tensor) -> Tensor:
        vectors = self.codebooks[0].lookup(tokens.reshape(-1))
        return self._map(vectors, (tokens.shape[0], *self.grids[0]))

    def neighbors(self, query: Tensor, k: int) -> Tensor:
        rows = self._rows(query) if query.is_floating_point() else query.reshape(-1)
        return self.codebooks[0].neighbors(rows, k).view(query.shape[0], -1, k)
