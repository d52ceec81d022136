"""Continuous bottleneck of a variational autoencoder, in the place of a quantizer."""

from typing import NoReturn

import torch
from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.grids import Grid, as_grid
from tessera.quantizers.output import QuantizerOutput
from tessera.rng import SampleRng, as_sample_rng, normal

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class GaussianBottleneck(nn.Module):
    """z = mean + exp(log variance / 2) noise in training, z = mean in evaluation; there are no tokens.

    It takes the place of a `ProductQuantizer` in a tokenizer for training, reconstruction and rFID. Whatever needs
    tokens (`tokenize`, generators, perturbation, pFID, codebook reports) is refused with a `ConfigError`.

    Loss, unweighted: `kl` = sum over tokens and channels of (mean^2 + variance - 1 - log variance) / 2, mean over
    images.

    Args:
        dim: C, channels of z. The latent it takes has 2 C: means, then log variances, the latter clamped to [-30, 20].

    Raises:
        ConfigError: dim below 1.

    Source: Kingma and Welling 2014 (arXiv:1312.6114); clamping and reduction as in bytedance/1d-tokenizer,
        quantizer.py, whose noise comes from the CPU's generator instead of the samples' own.
    """

    num_branches, num_tokens = 1, 0

    def __init__(self, dim: int):
        super().__init__()
        if dim < 1:
            raise ConfigError(f"quantizer.dim={dim} must be at least 1")
        self.dim = dim
        self._grid: Grid | None = None

    def extra_repr(self) -> str:
        """The channels."""
        return f"dim={self.dim}"

    @property
    def in_channels(self) -> int:
        """Channels of the latent it takes: means and log variances."""
        return 2 * self.dim

    @property
    def grids(self) -> list[Grid]:
        """The latent grid, as one scale."""
        if self._grid is None:
            raise ConfigError("the bottleneck's grid is not known; build it into a Tokenizer")
        return [self._grid]

    def bind_grid(self, grid: Grid) -> None:
        """Tell it the latent grid (h, w)."""
        self._grid = as_grid(grid, "grid")

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Means and clamped log variances, each (B, C, h, w) float32, of z (B, 2 C, h, w)."""
        if z.ndim != 4 or z.shape[1] != self.in_channels:
            raise ValueError(f"latent of shape {tuple(z.shape)} has not the {self.in_channels} channels of moments")
        mean, log_variance = z.float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    @staticmethod
    def kl(mean: Tensor, log_variance: Tensor) -> Tensor:
        """Divergence from the standard normal per token: (B, h w) from moments (B, C, h, w)."""
        terms = mean.square() + log_variance.exp() - 1 - log_variance
        return 0.5 * terms.sum(1).flatten(1)

    def forward(self, z: Tensor, rng: SampleRng | torch.Generator | None = None) -> QuantizerOutput:
        """Sample in training, take the mean in evaluation.

        Args:
            z: (B, 2 C, h, w) float.
            rng: noise by sample, stream "bottleneck/noise".

        Returns:
            z_q = latent (B, C, h, w) float32 with the gradient of both moments; tokens (B, 1, 0); loss `kl`.
        """
        with torch.autocast(z.device.type, enabled=False):
            mean, log_variance = self.moments(z)
            sample = mean
            if self.training:
                draws = as_sample_rng(rng, len(z), z.device).uniform("bottleneck/noise", *mean.shape[1:])
                sample = mean + (0.5 * log_variance).exp() * normal(draws)
            losses = {"kl": self.kl(mean, log_variance).sum(1).mean()}
        tokens = torch.zeros(len(z), 1, 0, dtype=torch.int64, device=z.device)
        return QuantizerOutput(z_q=sample, tokens=tokens, latent=sample, losses=losses)

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            f"{what} is not possible: this tokenizer has a continuous bottleneck (quantizer=gaussian) and no tokens; "
            "choose a quantizer with a codebook, e.g. quantizer=single, or leave out what needs codes "
            "(callbacks=continuous, perturbation=none)"
        )

    @property
    def codebook_size(self) -> NoReturn:
        """Refused: there are no codes."""
        self._refuse("counting codes")

    def encode(self, z: Tensor) -> Tensor:
        """Refused: there are no tokens."""
        self._refuse("tokenizing")

    def decode(self, tokens: Tensor) -> Tensor:
        """Refused: there are no tokens."""
        self._refuse("detokenizing")

    def neighbors(self, query: Tensor, k: int) -> Tensor:
        """Refused: there are no codes."""
        self._refuse("looking for neighbours of codes")
