"""Discriminator of StyleGAN: residual blocks down to 4 x 4 pixels, one logit per image."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError, DataError
from tessera.rng import SampleRng

SLOPE = 0.2


class Blur(nn.Module):
    """Depthwise [1, 2, 1] x [1, 2, 1] / 16 filter with reflected edges."""

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", line[:, None] * line[None, :], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) with H, W at least 2 -> the same shape."""
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=x.shape[1])


class ResidualDown(nn.Module):
    """Two convolutions and a blurred stride-2 one beside a 1 x 1 stride-2 shortcut; the sum over sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, out_channels, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(SLOPE),
        )
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H / 2, W / 2)."""
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


class StyleGANDiscriminator(nn.Module):
    """Residual discriminator for images of one size; neither minibatch statistics nor equalised rates.

    Args:
        resolution: side of the images, a power of two of at least 8.
        capacity: channels times side of the fine levels: width(r) = min(max_channels, capacity / r).
        max_channels: of the coarse levels, and of the last hidden layer.
        channels: side -> width, from 4 up to `resolution`; replaces the two above.
        in_channels: of the images.

    Raises:
        ConfigError: a resolution that isn't such a power of two, or widths that are missing or below 1.

    Source: Karras et al. 2020 (arXiv:1912.04958); layout and names as XQ-GAN's `discriminator_stylegan.py`.
    """

    def __init__(
        self,
        resolution: int,
        capacity: int = 16384,
        max_channels: int = 512,
        channels: Mapping[int, int] | None = None,
        in_channels: int = 3,
    ):
        super().__init__()
        if resolution < 8 or resolution & (resolution - 1):
            raise ConfigError(
                f"discriminator.resolution={resolution} must be a power of two of at least 8, as the image is halved "
                "down to 4; set data.dataset.resolution to one or choose discriminator=patchgan"
            )
        sides = [resolution >> level for level in range(resolution.bit_length() - 2)]  # resolution, ..., 8, 4
        width = {int(side): value for side, value in (channels or {}).items()} or {
            side: min(max_channels, capacity // side) for side in sides
        }
        if missing := [side for side in sides if width.get(side, 0) < 1]:
            raise ConfigError(
                f"discriminator.channels has no width of at least 1 for side {missing[0]}; give one per side "
                f"{sides}, or raise discriminator.capacity"
            )
        self.resolution = resolution
        self.blocks = nn.Sequential(
            nn.Conv2d(in_channels, width[resolution], 3, padding=1),
            nn.LeakyReLU(SLOPE),
            *(ResidualDown(width[side], width[side // 2]) for side in sides[:-1]),
        )
        last = width[4]
        self.final_conv = nn.Sequential(nn.Conv2d(last, last, 3, padding=1), nn.LeakyReLU(SLOPE))
        self.final_linear = nn.Sequential(nn.Linear(last * 16, last), nn.LeakyReLU(SLOPE), nn.Linear(last, 1))

    def forward(self, images: Tensor, rng: SampleRng | torch.Generator | None = None) -> Tensor:
        """Logits (B, 1) of images (B, C, resolution, resolution) in [-1, 1]; DataError for another size.

        `rng` is not used: nothing here is random.
        """
        if images.shape[-2:] != (self.resolution, self.resolution):
            raise DataError(
                f"images of {tuple(images.shape[-2:])} pixels do not fit discriminator.resolution={self.resolution}; "
                "set it to data.dataset.resolution"
            )
        return self.final_linear(self.final_conv(self.blocks(images)).flatten(1))
