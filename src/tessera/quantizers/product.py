"""Product of branches: the outermost quantizer, which a tokenizer holds. One branch is the plain case."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from tessera.errors import ConfigError, DataError
from tessera.grids import Grid
from tessera.quantizers.output import QuantizerOutput
from tessera.quantizers.structure import ScaleTokens, Structure
from tessera.rng import SampleRng, as_sample_rng, integers


class ProductQuantizer(nn.Module):
    """Splits the latent's channels into P equal parts and quantises each by its own branch.

    Losses are averaged over branches.

    Args:
        branch: factory of a structure, called with `dim` = dim / branches.
        branches: P.
        dim: C, channels of all branches together; None: as many as the branches' codebooks imply.
        dropout: share of the training images whose decoded latent sums only the first scales.
        dropout_start: least number of scales kept; the depth is uniform in [dropout_start, scales], one draw per image
            for all branches.

    Raises:
        ConfigError: P below 1 or not dividing dim; dropout values out of range, or without scales to drop.

    Source: XQ-GAN (arXiv:2412.01762), product quantisation; channels are split here for every backbone, while
        the public code cuts the height axis of CNN features.
    """

    def __init__(
        self,
        branch: Callable[..., Structure],
        branches: int,
        dim: int | None,
        dropout: float = 0.0,
        dropout_start: int = 1,
    ):
        super().__init__()
        if not 0.0 <= dropout <= 1.0:
            raise ConfigError(f"quantizer.dropout={dropout} is outside [0, 1]; it is a share of the images")
        if dropout_start < 1:
            raise ConfigError(f"quantizer.dropout_start={dropout_start} must be at least 1, the first scale")
        self.dropout, self.dropout_start = dropout, dropout_start
        if branches < 1 or (dim is not None and dim < 1):
            raise ConfigError(f"quantizer.branches={branches} and quantizer.dim={dim} must be at least 1")
        if dim is not None and dim % branches:
            raise ConfigError(
                f"quantizer.branches={branches} does not divide quantizer.dim={dim}; choose quantizer.dim as "
                "branches times the channels of one branch"
            )
        each = None if dim is None else dim // branches
        self.branches = nn.ModuleList([branch(dim=each) for _ in range(branches)])
        self.dim = sum(branch.dim for branch in self.branches)
        if dropout > 0:
            self._check_dropout()

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
        """Tell every branch the latent grid (h, w).

        Raises:
            ConfigError: it contradicts a configured grid.
        """
        for branch in self.branches:
            branch.bind_grid(grid)

    def _check_dropout(self) -> None:
        """Refuse dropout that could never drop anything."""
        scales = self.branches[0].num_scales
        if scales == 1:
            raise ConfigError(
                f"quantizer.dropout={self.dropout} drops scales, but this quantizer has a single one; set it to 0, or "
                "choose quantizer=multiscale or quantizer=residual with more than one"
            )
        if self.dropout_start >= scales:
            raise ConfigError(
                f"quantizer.dropout_start={self.dropout_start} scales are always kept, and there are but {scales}: "
                "nothing is left to drop; lower it, or set quantizer.dropout=0"
            )

    def _split(self, z: Tensor) -> tuple[Tensor, ...]:
        if z.ndim != 4 or z.shape[1] != self.dim:
            raise ValueError(f"latent of shape {tuple(z.shape)} has not the {self.dim} channels of the quantizer")
        return z.chunk(self.num_branches, dim=1)

    def _draw_depths(self, z: Tensor, rng: SampleRng | torch.Generator | None) -> Tensor | None:
        """Scales kept per image, (B,) int64; None where nothing is dropped."""
        if not (self.training and self.dropout > 0):
            return None
        scales = len(self.grids)
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

    def encode(self, z: Tensor, edit: Callable[[int, ScaleTokens], Tensor] | None = None) -> Tensor:
        """Tokens (B, P, L) int64 of z (B, C, h, w); no gradient.

        Args:
            edit: (branch, tokens of a scale) -> (B, n) tokens to take instead; later scales encode what these leave.
        """
        edits = [None if edit is None else partial(edit, p) for p in range(self.num_branches)]
        parts = zip(self.branches, self._split(z), edits, strict=True)
        return torch.stack([branch.encode(part, own) for branch, part, own in parts], dim=1)

    def decode(self, tokens: Tensor, depths: Tensor | None = None) -> Tensor:
        """Quantised latent of tokens.

        Args:
            tokens: (B, P, L) integer in [0, K).
            depths: (B,) int64, scales to sum; None: all.

        Returns:
            (B, C, h, w) float32; differentiable in the codebooks only.

        Raises:
            DataError: wrong shape or type, or a token outside [0, K).
        """
        self._check_tokens(tokens)
        tokens = tokens.long()
        return self._joined(lambda branch, p: branch.decode(tokens[:, p], depths))

    def _joined(self, part: Callable[[Structure, int], Tensor], dim: int = 1) -> Tensor:
        """Results of the branches side by side on the channel axis."""
        return torch.cat([part(branch, p) for p, branch in enumerate(self.branches)], dim=dim)

    def partial_decode(self, tokens: Tensor, scales: int) -> Tensor:
        """Quantised latent (B, C, h, w) of the first `scales` scales of tokens (B, P, L)."""
        self._check_tokens(tokens)
        tokens = tokens.long()
        return self._joined(lambda branch, p: branch.partial_decode(tokens[:, p], scales))

    def next_scale_input(self, tokens: Tensor) -> Tensor:
        """Teacher-forcing input of a next-scale generator.

        Position by position the sum of all earlier scales, shrunk to the size of the scale that is to be predicted.

        Args:
            tokens: (B, P, L) integer in [0, K).

        Returns:
            (B, L - l_0, C) float32, channels of branch 0 first; l_0: tokens of the first scale, which has no input.

        Raises:
            ConfigError: the structure has a single grid.
            DataError: see `decode`.

        Source: VAR (arXiv:2404.02905); for P branches, `idxBl_to_var_input` of lxa9867/ImageFolder.
        """
        self._check_tokens(tokens, wait=False)
        tokens = tokens.long()
        return self._joined(lambda branch, p: branch.next_scale_input(tokens[:, p]), dim=2)

    def embed(self, tokens: Tensor, scale: int) -> Tensor:
        """Code vectors (B, n, C) float32 of the tokens (B, P, n) of one scale, channels of branch 0 first."""
        return self._joined(lambda branch, p: branch.embed(tokens[:, p], scale), dim=2)

    def advance(self, latent: Tensor, vectors: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """One step of next-scale generation; over all scales it gives what `next_scale_input` and `decode` give.

        Args:
            latent: (B, C, h, w) float, sum of the earlier scales; zeros before the first. Not modified.
            vectors: (B, n, C) float, `embed` of the scale's tokens (or a mixture of codes).
            scale: from 0.

        Returns:
            The new sum (B, C, h, w) float32, and the generator's input (B, n', C) for the next scale; None after the
            last.
        """
        parts = zip(self.branches, self._split(latent), vectors.chunk(self.num_branches, dim=2), strict=True)
        sums, inputs = zip(*(branch.advance(old, new, scale) for branch, old, new in parts), strict=True)
        return torch.cat(sums, dim=1), None if inputs[0] is None else torch.cat(inputs, dim=2)

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

    def _check_tokens(self, tokens: Tensor, wait: bool = True) -> None:
        """Refuse other tokens than this quantizer's; their range on an accelerator only if it may be waited for."""
        expected = (self.num_branches, self.num_tokens)
        if tokens.ndim != 3 or tokens.shape[1:] != expected or tokens.is_floating_point():
            raise DataError(
                f"tokens of shape {tuple(tokens.shape)} and type {tokens.dtype} do not fit this tokenizer, "
                f"which needs integers of shape (batch, {expected[0]} branches, {expected[1]} tokens); "
                "were they made by another one?"
            )
        if tokens.numel() and (wait or tokens.device.type == "cpu"):
            low, high = (int(value) for value in torch.aminmax(tokens))
            if low < 0 or high >= self.codebook_size:
                culprit = low if low < 0 else high
                raise DataError(
                    f"token {culprit} is outside [0, {self.codebook_size}), the codes of this tokenizer; "
                    "were the tokens made by one with another quantizer.branch.codebook.codebook_size?"
                )
