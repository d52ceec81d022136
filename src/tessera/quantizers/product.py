"""Product of branches: the outermost quantizer, which a tokenizer holds. One branch is the plain case."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tessera.errors import ConfigError, DataError
from tessera.quantizers.output import QuantizerOutput
from tessera.quantizers.structure import Grid, Structure
from tessera.rng import SampleRng, as_sample_rng, integers


class ProductQuantizer(nn.Module):
    """Splits the latent's channels into P equal parts and quantises each by its own branch.

    Losses are averaged over branches.

    Args:
        branch: factory of a structure, called with `dim` = dim / branches.
        branches: P.
        dim: C, channels of all branches together.
        dropout: share of the training images whose decoded latent sums only the first scales.
        dropout_start: least number of scales kept; the depth is uniform in [dropout_start, scales], one draw per image
            for all branches.

    Raises:
        ConfigError: P below 1 or not dividing dim; dropout values out of range.

    Source: XQ-GAN (arXiv:2412.01762), product quantisation; channels are split here for every backbone, while
        the public code cuts the height axis of CNN features.
    """

    def __init__(
        self,
        branch: Callable[..., Structure],
        branches: int,
        dim: int,
        dropout: float = 0.0,
        dropout_start: int = 1,
    ):
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ConfigError(f"quantizer.dropout={dropout} is outside [0, 1]; it is a share of the images")
        if dropout_start < 1:
            raise ConfigError(f"quantizer.dropout_start={dropout_start} must be at least 1, the first scale")
        self.dropout, self.dropout_start = dropout, dropout_start
        if branches < 1 or dim < 1:
            raise ConfigError(f"quantizer.branches={branches} and quantizer.dim={dim} must be at least 1")
        if dim % branches:
            raise ConfigError(
                f"quantizer.branches={branches} does not divide quantizer.dim={dim}; choose quantizer.dim as "
                "branches times the channels of one branch"
            )
        self.dim = dim
        self.branches = nn.ModuleList([branch(dim=dim // branches) for _ in range(branches)])

    @property
    def num_branches(self) -> int:
        """P."""
        return len(self.branches)

    @property
    def in_channels(self) -> int:
        """Channels of the latent it takes; those of the result are `dim`."""
        return self.dim

    @property
    def codebook_size(self) -> int:
        """K of each branch."""
        return self.branches[0].codebook_size

    @property
    def grids(self) -> list[Grid]:
        """One (height, width) per scale."""
        return self.branches[0].grids

    @property
    def num_tokens(self) -> int:
        """L, tokens of an image in one branch."""
        return sum(height * width for height, width in self.grids)

    def bind_grid(self, grid: Grid) -> None:
        """Tell every branch the latent grid (h, w); refuses one that contradicts a configured grid."""
        for branch in self.branches:
            branch.bind_grid(grid)

    def _split(self, z: Tensor) -> tuple[Tensor, ...]:
        if z.ndim != 4 or z.shape[1] != self.dim:
            raise ValueError(f"latent of shape {tuple(z.shape)} has not the {self.dim} channels of the quantizer")
        return z.chunk(self.num_branches, dim=1)

    def _draw_depths(self, z: Tensor, rng: SampleRng | torch.Generator | None) -> Tensor | None:
        """Scales kept per image, (B,) int64; None where nothing is dropped."""
        if not (self.training and self.dropout > 0):
            return None
        scales = len(self.grids)
        if self.dropout_start > scales:
            raise ConfigError(f"quantizer.dropout_start={self.dropout_start} exceeds the {scales} scales (grids)")
        draws = as_sample_rng(rng, len(z), z.device)
        depths = self.dropout_start + integers(draws.uniform("quantizer/depth"), scales - self.dropout_start + 1)
        return torch.where(draws.uniform("quantizer/drop") < self.dropout, depths, scales)

    def forward(self, z: Tensor, rng: SampleRng | torch.Generator | None = None) -> QuantizerOutput:
        """Quantise with straight-through gradient.

        Args:
            z: (B, C, h, w) float.
            rng: draws of the dropout by sample, streams "quantizer/drop" and "quantizer/depth".

        Returns:
            z_q and latent (B, C, h, w) float32, tokens (B, P, L) int64 of all scales, losses averaged over branches.

        Raises:
            ConfigError: dropout_start exceeds the number of scales.
        """
        depths = self._draw_depths(z, rng)
        outputs = [branch(part, depths) for branch, part in zip(self.branches, self._split(z), strict=True)]
        losses = {name: torch.stack([output.losses[name] for output in outputs]).mean() for name in outputs[0].losses}
        return QuantizerOutput(
            z_q=torch.cat([output.z_q for output in outputs], dim=1),
            tokens=torch.cat([output.tokens for output in outputs], dim=1),
            latent=torch.cat([output.latent for output in outputs], dim=1),
            losses=losses,
            depths=depths,
        )

    def encode(self, z: Tensor) -> Tensor:
        """Tokens (B, P, L) int64 of z (B, C, h, w); no gradient."""
        parts = zip(self.branches, self._split(z), strict=True)
        return torch.stack([branch.encode(part) for branch, part in parts], dim=1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Quantised latent of tokens.

        Args:
            tokens: (B, P, L) integer in [0, K).

        Returns:
            (B, C, h, w) float32; differentiable in the codebooks only.

        Raises:
            DataError: wrong shape or type, or a token outside [0, K).
        """
        self._check_tokens(tokens)
        tokens = tokens.long()
        return torch.cat([branch.decode(tokens[:, p]) for p, branch in enumerate(self.branches)], dim=1)

    def neighbors(self, query: Tensor, k: int) -> Tensor:
        """Nearest codes of every token site.

        Args:
            query: latent z (B, C, h, w) float: neighbours of the latent; or tokens (B, P, L) int64: of
                the code.
            k: 1 <= k <= K.

        Returns:
            (B, P, L, k) int64, nearest first.
        """
        if query.is_floating_point():
            parts = self._split(query)
        else:
            self._check_tokens(query)
            parts = query.unbind(dim=1)
        found = [branch.neighbors(part, k) for branch, part in zip(self.branches, parts, strict=True)]
        return torch.stack(found, dim=1)

    def _check_tokens(self, tokens: Tensor) -> None:
        expected = (self.num_branches, self.num_tokens)
        if tokens.ndim != 3 or tokens.shape[1:] != expected or tokens.is_floating_point():
            raise DataError(
                f"tokens of shape {tuple(tokens.shape)} and type {tokens.dtype} do not fit this tokenizer, "
                f"which needs integers of shape (batch, {expected[0]} branches, {expected[1]} tokens); "
                "were they made by another one?"
            )
        if tokens.numel():
            low, high = (int(value) for value in torch.aminmax(tokens))
            if low < 0 or high >= self.codebook_size:
                culprit = low if low < 0 else high
                raise DataError(
                    f"token {culprit} is outside [0, {self.codebook_size}), the codes of this tokenizer; "
                    "were the tokens made by one with another quantizer.branch.codebook.codebook_size?"
                )
