"""TiTok's patch discriminator: blurred down-sampling, group norm, logits on a fixed grid."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.rng import SampleRng

SLOPE = 0.1


class BlurDown(nn.Module):
    """Depthwise [1, 3, 3, 1] x [1, 3, 3, 1] / 64 filter of stride 2; ceil(side / 2) pixels come out."""

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", line[:, None] * line[None, :], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2)), padded with zeros, the odd one right and below."""
        pads = [max((math.ceil(side / 2) - 1) * 2 + 4 - side, 0) for side in x.shape[-2:]]
        (top, bottom), (left, right) = ((pad // 2, pad - pad // 2) for pad in pads)
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(F.pad(x, (left, right, top, bottom)), kernel, stride=2, groups=x.shape[1])


class BlurPatchGAN(nn.Module):
    """Convolutional patch classifier whose logits are pooled to one grid for every image size.

    Args:
        channels: width of the first stage; doubles from stage to stage.
        num_stages: halvings of the image.
        norm_groups: of the group norms; must divide `channels`.
        logits_size: side of the grid of logits; features are max-pooled to it.
        in_channels: of the images.

    Raises:
        ConfigError: sizes below 1, or groups that don't divide the channels.

    Source: TiTok (arXiv:2406.07550), bytedance/1d-tokenizer, modeling/modules/discriminator.py.
    """

    def __init__(
        self,
        channels: int = 128,
        num_stages: int = 3,
        norm_groups: int = 32,
        logits_size: int = 16,
        in_channels: int = 3,
    ):
        super().__init__()
        sizes = {"channels": channels, "num_stages": num_stages, "norm_groups": norm_groups, "logits_size": logits_size}
        for key, value in sizes.items():
            if value < 1:
                raise ConfigError(f"discriminator.{key}={value} must be at least 1")
        if channels % norm_groups:
            raise ConfigError(
                f"discriminator.norm_groups={norm_groups} does not divide discriminator.channels={channels}"
            )
        self.logits_size = logits_size
        self.block_in = nn.Sequential(nn.Conv2d(in_channels, channels, 5, padding=2), nn.LeakyReLU(SLOPE))
        blocks, width = [], channels
        for stage in range(num_stages):
            wider = channels * 2**stage
            conv = nn.Conv2d(width, wider, 3, padding=1)
            blocks.append(nn.Sequential(conv, BlurDown(), nn.GroupNorm(norm_groups, wider), nn.LeakyReLU(SLOPE)))
            width = wider
        self.blocks = nn.ModuleList(blocks)
        self.to_logits = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.LeakyReLU(SLOPE), nn.Conv2d(width, 1, 5, padding=2)
        )

    def forward(self, images: Tensor, rng: SampleRng | torch.Generator | None = None) -> Tensor:
        """Logits (B, 1, logits_size, logits_size) of images (B, C, H, W) in [-1, 1], seen as [0, 1].

        `rng` is not used: nothing here is random.
        """
        x = self.block_in((images + 1) / 2)
        for block in self.blocks:
            x = block(x)
        return self.to_logits(F.adaptive_max_pool2d(x, (self.logits_size, self.logits_size)))
