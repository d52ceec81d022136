"""Pixel heads: the last step of a patch decoder, from one vector per patch to an image.

Each is built as `head(width=D, patch_size=p)`, maps (B, h w, D) and the grid (h, w) to (B, 3, h p, w p), and has
`last_layer`, the weight where the adaptive adversarial weight is measured.
"""

import math

import torch
from torch import Tensor, nn

from tessera.errors import ConfigError


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Images of patches.

    Args:
        patches: (B, h w, p p C), patches row by row; inside one, ordered (y, x, channel).
        grid: (h, w).
        patch_size: p, in pixels.

    Returns:
        (B, C, h p, w p).
    """
    (rows, columns), p = grid, patch_size
    blocks = patches.view(len(patches), rows, columns, p, p, -1)
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * p, columns * p)


def _check(width: int, patch_size: int) -> None:
    for name, value in (("width", width), ("patch_size", patch_size)):
        if value < 1:
            raise ConfigError(f"backbone.decoder.{name}={value} must be at least 1")


class _PixelHead(nn.Module):
    """Base of the heads: the `projection` makes the pixels."""

    projection: nn.Module

    def __init__(self, width: int, patch_size: int):
        super().__init__()
        _check(width, patch_size)
        self.patch_size = patch_size

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the output projection."""
        return self.projection.weight


class LinearPixels(_PixelHead):
    """One linear map from a token to the pixels of its patch.

    Args:
        width: D, channels of a token.
        patch_size: p, in pixels.
        channels: of the image.

    Source: XQ-GAN (lxa9867/ImageFolder, `to_pixel.py`, "linear"), which every published model uses.
    """

    def __init__(self, width: int, patch_size: int, channels: int = 3):
        super().__init__(width, patch_size)
        self.projection = nn.Linear(width, channels * patch_size**2)
        nn.init.trunc_normal_(self.projection.weight, std=0.02)
        nn.init.zeros_(self.projection.bias)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h w, D) -> (B, channels, h p, w p)."""
        return unpatchify(self.projection(tokens), grid, self.patch_size)


class ConvPixels(_PixelHead):
    """One transposed convolution whose kernel and stride are the patch.

    Args:
        width, patch_size, channels: as in `LinearPixels`.

    Source: as `LinearPixels`, "conv".
    """

    def __init__(self, width: int, patch_size: int, channels: int = 3):
        super().__init__(width, patch_size)
        self.projection = nn.ConvTranspose2d(width, channels, patch_size, stride=patch_size)

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h w, D) -> (B, channels, h p, w p)."""
        return self.projection(tokens.transpose(1, 2).unflatten(2, grid))


class SirenPixels(_PixelHead):
    """Two sine layers from a token to the pixels of its patch: y = sin(w (W x + b)), twice; values in [-1, 1].

    Args:
        width, patch_size, channels: as in `LinearPixels`.
        frequency: w.

    Source: Sitzmann et al. 2020 (arXiv:2006.09661), with the widths and the initialisation of XQ-GAN's "siren". The
        public code reads its result as if it were an image already; here the patches are put in their places.
    """

    def __init__(self, width: int, patch_size: int, channels: int = 3, frequency: float = 30.0):
        super().__init__(width, patch_size)
        if frequency <= 0:
            raise ConfigError(f"backbone.decoder.to_pixel.frequency={frequency} must be positive")
        self.frequency = frequency
        self.hidden = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(2 * width, channels * patch_size**2)
        nn.init.uniform_(self.hidden.weight, -1 / width, 1 / width)
        bound = math.sqrt(6 / (2 * width)) / frequency
        nn.init.uniform_(self.projection.weight, -bound, bound)

    def extra_repr(self) -> str:
        """What the weights don't show of the function they make."""
        return f"frequency={self.frequency}"

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, h w, D) -> (B, channels, h p, w p)."""
        # a sine of 30 x turns the rounding of half precision into noise
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = torch.sin(self.frequency * self.hidden(tokens.to(self.hidden.weight.dtype)))
            patches = torch.sin(self.frequency * self.projection(hidden))
        return unpatchify(patches, grid, self.patch_size)
