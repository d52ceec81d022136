"""Encoder and decoder of MaskGIT's VQGAN: no attention, average pooling, and a shortcut that drops its input."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from tessera.backbones.cnn import ConvolutionalDecoder, ConvolutionalEncoder, Upsample, group_norm, level_widths


class MaskGITBlock(nn.Module):
    """norm, swish, conv, norm, swish, dropout, conv, without biases; plus the input where widths agree.

    Where they don't, the result is h + shortcut(h): the 1x1 shortcut sees the block's own result h and the input is
    lost, as in the network that the published weights come from.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(in_channels, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.nin_shortcut = (
            None if in_channels == out_channels else nn.Conv2d(out_channels, out_channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(h))


def _blocks(widths: Sequence[int], norm_groups: int, dropout: float) -> nn.ModuleList:
    return nn.ModuleList([MaskGITBlock(a, b, norm_groups, dropout) for a, b in pairwise(widths)])


class _Level(nn.Module):
    """The blocks of one resolution and what leads to the next one."""

    def __init__(self, widths: Sequence[int], norm_groups: int, dropout: float, resample: nn.Module):
        super().__init__()
        self.res = _blocks(widths, norm_groups, dropout)
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.res:
            x = block(x)
        return self.resample(x)


class MaskGITEncoder(ConvolutionalEncoder):
    """Images (B, 3, H, W) in [-1, 1] -> latent (B, z_channels, H/f, W/f), f = 2^(levels - 1).

    The convolutions see the images in [0, 1] with a black border, as the published weights expect.

    Args:
        channels, channel_multipliers, z_channels, norm_groups, dropout, in_channels: as in `CNNEncoder`.
        num_res_blocks: residual blocks per level, and after the last one.

    Raises:
        ConfigError: widths not divisible by norm_groups, or a size out of range.

    Source: Chang et al. 2022 (arXiv:2202.04200) in the form of bytedance/1d-tokenizer, maskgit_vqgan.py; the defaults
        have 23.775 M parameters.
    """

    def __init__(
        self,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        norm_groups: int = 32,
        dropout: float = 0.0,
        in_channels: int = 3,
    ):
        super().__init__()
        widths = level_widths(
            "encoder", channels, channel_multipliers, num_res_blocks, z_channels, norm_groups, dropout
        )
        last = len(widths) - 1
        self.out_channels, self.downsample = z_channels, 2**last
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.levels = nn.ModuleList(
            _Level(
                [entry] + [width] * num_res_blocks,
                norm_groups,
                dropout,
                nn.AvgPool2d(2) if i < last else nn.Identity(),
            )
            for i, (entry, width) in enumerate(zip([channels, *widths[:-1]], widths, strict=True))
        )
        self.mid = _blocks([widths[-1]] * (num_res_blocks + 1), norm_groups, dropout)
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in((images + 1) / 2)
        for level in self.levels:
            h = level(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class MaskGITDecoder(ConvolutionalDecoder):
    """Latent (B, z_channels, h, w) -> images (B, 3, h f, w f) around [-1, 1], not clamped. Mirrors `MaskGITEncoder`.

    Args:
        channels, channel_multipliers, num_res_blocks, norm_groups, dropout: as in `MaskGITEncoder` (multipliers finest
            first too, and as many blocks per level).
        z_channels: channels of the input.
        in_channels: channels of the images, 3 for RGB.

    Raises:
        ConfigError: widths not divisible by norm_groups, or a size out of range.

    Source: as `MaskGITEncoder`; the defaults have 30.478 M parameters.
    """

    def __init__(
        self,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        z_channels: int = 256,
        norm_groups: int = 32,
        dropout: float = 0.0,
        in_channels: int = 3,
    ):
        super().__init__()
        widths = level_widths(
            "decoder", channels, channel_multipliers, num_res_blocks, z_channels, norm_groups, dropout
        )
        widths.reverse()
        last = len(widths) - 1
        self.in_channels, self.upsample = z_channels, 2**last
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = _blocks([widths[0]] * (num_res_blocks + 1), norm_groups, dropout)
        self.levels = nn.ModuleList(
            _Level(
                [entry] + [width] * num_res_blocks,
                norm_groups,
                dropout,
                Upsample(width) if i < last else nn.Identity(),
            )
            for i, (entry, width) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True))
        )
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        for block in self.mid:
            h = block(h)
        for level in self.levels:
            h = level(h)
        return 2 * self.conv_out(F.silu(self.norm_out(h))) - 1
