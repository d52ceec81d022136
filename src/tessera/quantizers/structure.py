"""Structures: how the codes of one branch lie over a latent grid. The simplest: one code per cell."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.grids import Grid, as_grid
from tessera.quantizers.codebooks.base import Codebook
from tessera.quantizers.output import QuantizerOutput


@dataclass
class ScaleTokens:
    """Tokens of one scale while a latent is being encoded.

    Attributes:
        sites: where the scale lies among the L tokens.
        tokens: (B, n) int64 assigned codes.
        codebook: that assigned them.
        points: (B n, D) float; what was compared with the codes.
    """

    sites: slice
    tokens: Tensor
    codebook: Codebook
    points: Tensor

    def neighbors(self, of: Literal["latent", "code"], k: int) -> Tensor:
        """(B, n, k) int64: the codes nearest to the points, or to the assigned codes."""
        query = self.points if of == "latent" else self.tokens.reshape(-1)
        return self.codebook.neighbors(query, k).view(*self.tokens.shape, k)


# Replaces tokens of a scale before the next one is encoded: ScaleTokens -> (B, n) int64
Edit = Callable[[ScaleTokens], Tensor]


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

    @property
    @abstractmethod
    def num_scales(self) -> int:
        """Number of grids, known before they are."""

    @abstractmethod
    def bind_grid(self, grid: Grid) -> None:
        """Tell the structure the latent grid; refuses one that contradicts its own."""

    @abstractmethod
    def forward(self, z: Tensor, depths: Tensor | None = None) -> QuantizerOutput:
        """Quantise z (B, D, h, w); tokens are (B, 1, L). With depths (B,) int64, z_q sums only so many scales."""

    @abstractmethod
    def encode(self, z: Tensor, edit: Edit | None = None) -> Tensor:
        """Tokens (B, L) int64 of z (B, D, h, w); no gradient. Later scales see what `edit` made of earlier ones."""

    @abstractmethod
    def decode(self, tokens: Tensor, depths: Tensor | None = None) -> Tensor:
        """Quantised latent (B, D, h, w) float of tokens (B, L), summed over the first `depths` (B,) int64 scales."""

    @abstractmethod
    def neighbors(self, query: Tensor, k: int) -> Tensor:
        """(B, L, k) int64: the k codes nearest to z (B, D, h, w) float, or to tokens (B, L) int64."""

    def partial_decode(self, tokens: Tensor, scales: int) -> Tensor:
        """Quantised latent (B, D, h, w) of the first `scales` scales of tokens (B, L)."""
        raise self._no_scales()

    def next_scale_input(self, tokens: Tensor) -> Tensor:
        """What a next-scale generator reads: the sum of all earlier scales at the size of each scale but the first.

        Returns:
            (B, L - l_0, D) float; l_0: tokens of the first scale.
        """
        raise self._no_scales()

    def embed(self, tokens: Tensor, scale: int) -> Tensor:
        """Code vectors (B, n, D) float of the tokens (B, n) of one scale."""
        raise self._no_scales()

    def advance(self, latent: Tensor, vectors: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """One step of next-scale generation: add a scale's codes to the running sum.

        Args:
            latent: (B, D, h, w) float, sum of the earlier scales; zeros before the first. Not modified.
            vectors: (B, n, D) float, `embed` of the scale's tokens (or a mixture of codes).
            scale: from 0.

        Returns:
            The new sum (B, D, h, w), and the generator's input (B, n', D) for the next scale; None after the last.
        """
        raise self._no_scales()

    def _no_scales(self) -> ConfigError:
        return ConfigError(
            f"{type(self).__name__} has a single grid, but next-scale generation needs several; choose "
            "quantizer=multiscale or another generator"
        )


class SingleGridQuantizer(Structure):
    """One code per cell of the latent grid, row by row.

    Args:
        dim: channels of the latent; None: those that the codebook implies.
        codebook: factory called with `dim`.
        grid: (height, width), one number for a square, or None: given later by `bind_grid`.

    Raises:
        ConfigError: impossible grid.
    """

    def __init__(self, dim: int | None, codebook: Callable[..., Codebook], grid: Sequence[int] | int | None = None):
        super().__init__()
        self.codebooks = nn.ModuleList([codebook(dim=dim)])
        self.dim = self.codebooks[0].dim
        self._grid = None if grid is None else as_grid(grid, "quantizer.branch.grid")

    @property
    def grids(self) -> list[Grid]:
        if self._grid is None:
            raise ConfigError(
                "the quantizer's grid is not known; build it into a Tokenizer or set quantizer.branch.grid"
            )
        return [self._grid]

    @property
    def num_scales(self) -> int:
        return 1

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

    def encode(self, z: Tensor, edit: Edit | None = None) -> Tensor:
        codebook, rows = self.codebooks[0], self._points(z)
        tokens = codebook.assign(rows).view(z.shape[0], -1)
        return tokens if edit is None else edit(ScaleTokens(slice(None), tokens, codebook, rows))

    def decode(self, tokens: Tensor, depths: Tensor | None = None) -> Tensor:
        vectors = self.codebooks[0].lookup(tokens.reshape(-1))
        return self._map(vectors, (tokens.shape[0], *self.grids[0]))

    def neighbors(self, query: Tensor, k: int) -> Tensor:
        rows = self._points(query) if query.is_floating_point() else query.reshape(-1)
        return self.codebooks[0].neighbors(rows, k).view(query.shape[0], -1, k)

    def _points(self, z: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            return self.codebooks[0].project(self._rows(z))
