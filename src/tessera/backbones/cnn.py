"""Convolutional encoder and decoder of the VQGAN line, with the published module names."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with the epsilon of the VQGAN line."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """norm, swish, conv, norm, swish, dropout, conv; plus the input (by a 1x1 conv where widths differ)."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, dropout: float):
        super().__init__()
        self.norm1 = group_norm(in_channels, norm_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, norm_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over the cells of the map, with residual."""

    def __init__(self, channels: int, norm_groups: int):
        super().__init__()
        self.norm = group_norm(channels, norm_groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # (B, C, H, W) -> (B, 1 head, H W, C)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Half the resolution: zero padding at the right and bottom only, then a stride-2 conv."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a conv."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """The blocks of one resolution; `attn` and the resampling layer exist only where they are used."""

    def __init__(self, widths: Sequence[int], attention: bool, norm_groups: int, dropout: float):
        super().__init__()
        pairs = list(pairwise(widths))
        self.res = nn.ModuleList([ResnetBlock(a, b, norm_groups, dropout) for a, b in pairs])
        self.attn = nn.ModuleList([AttnBlock(b, norm_groups) for _, b in pairs] if attention else [])

    def blocks(self, x: Tensor) -> Tensor:
        for j, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[j](x)
        return x


class _EncoderLevel(_Level):
    def __init__(self, widths: Sequence[int], attention: bool, norm_groups: int, dropout: float, resample: bool):
        super().__init__(widths, attention, norm_groups, dropout)
        self.downsample = Downsample(widths[-1]) if resample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.blocks(x))


class _DecoderLevel(_Level):
    def __init__(self, widths: Sequence[int], attention: bool, norm_groups: int, dropout: float, resample: bool):
        super().__init__(widths, attention, norm_groups, dropout)
        self.upsample = Upsample(widths[-1]) if resample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.blocks(x))


def _middle(channels: int, attention: bool, norm_groups: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        ResnetBlock(channels, channels, norm_groups, dropout),
        AttnBlock(channels, norm_groups) if attention else nn.Identity(),
        ResnetBlock(channels, channels, norm_groups, dropout),
    )


def _attention_levels(part: str, levels: Sequence[int] | None, count: int) -> set[int]:
    """Levels with attention, finest 0; None stands for the coarsest."""
    chosen = {count - 1} if levels is None else set(levels)
    if chosen - set(range(count)):
        raise ConfigError(
            f"backbone.{part}.attention_levels={list(levels)} names a level outside of 0 (finest) to {count - 1}, one "
            f"per entry of backbone.{part}.channel_multipliers"
        )
    return chosen


def level_widths(
    part: str,
    channels: int,
    channel_multipliers: Sequence[int],
    num_res_blocks: int,
    z_channels: int,
    norm_groups: int,
    dropout: float,
) -> list[int]:
    """Channels of each level, finest resolution first."""
    key = f"backbone.{part}"
    if not channel_multipliers or min(channel_multipliers) < 1:
        raise ConfigError(f"{key}.channel_multipliers={list(channel_multipliers)} needs entries of at least 1")
    sizes = {"channels": channels, "num_res_blocks": num_res_blocks, "z_channels": z_channels}
    for name, value in {**sizes, "norm_groups": norm_groups}.items():
        if value < 1:
            raise ConfigError(f"{key}.{name}={value} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"{key}.dropout={dropout} is outside [0, 1)")
    widths = [channels * multiplier for multiplier in channel_multipliers]
    for width in (channels, *widths):
        if width % norm_groups:
            raise ConfigError(
                f"{key}.norm_groups={norm_groups} does not divide a width of {width} channels; choose "
                f"{key}.channels as a multiple of it"
            )
    return widths


class ConvolutionalEncoder(nn.Module):
    """What encoders share that halve the resolution: one latent map, on a grid that follows from the images.

    Attributes:
        downsample: pixels per cell and side.
        out_channels: of the latent.
        groups: 1, a map for all branches.
        norm_out: the last GroupNorm.
    """

    downsample: int
    out_channels: int
    groups = 1
    norm_out: nn.GroupNorm

    def extra_repr(self) -> str:
        """What the weights don't show of the function they make (the tokenizer's fingerprint hashes it)."""
        return f"downsample={self.downsample}, norm_groups={self.norm_out.num_groups}"

    def latent_grid(self, resolution: int) -> tuple[int, int]:
        """(h, w) of the latent of square images; ConfigError where they can't be halved so often."""
        if resolution < 1 or resolution % self.downsample:
            raise ConfigError(
                f"data.dataset.resolution={resolution} is not divisible by {self.downsample}, the downsampling of the "
                "encoder (backbone.encoder.channel_multipliers: one halving per entry after the first)"
            )
        return (resolution // self.downsample,) * 2


class ConvolutionalDecoder(nn.Module):
    """What decoders share that double the resolution and end in a convolution.

    Attributes:
        upsample: pixels per cell and side.
        in_channels: of the latent.
        conv_out: the last convolution.
    """

    upsample: int
    in_channels: int
    conv_out: nn.Conv2d

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the output projection, where the adaptive adversarial weight is measured."""
        return self.conv_out.weight

    def resolution(self, grid: tuple[int, int]) -> int:
        """Side in pixels of the images made from a latent grid (h, w)."""
        return grid[0] * self.upsample


class CNNEncoder(ConvolutionalEncoder):
    """Images (B, 3, H, W) -> latent (B, z_channels, H/f, W/f), f = 2^(levels - 1).

    Args:
        channels: width of the finest level before its multiplier.
        channel_multipliers: width of each level over `channels`, finest resolution first.
        num_res_blocks: residual blocks per level.
        z_channels: channels of the result.
        norm_groups: groups of every GroupNorm.
        dropout: inside residual blocks.
        in_channels: 3 for RGB.
        attention_levels: levels with attention after each block, 0 the finest; None: the coarsest alone.
        mid_attention: attention between the two blocks after the last level.

    Raises:
        ConfigError: widths not divisible by norm_groups, an unknown level, or a size out of range.

    Source: Esser et al. 2021 (arXiv:2012.09841) with the module names of XQ-GAN's CNN tokenizers; the
        defaults are its VQ-16 (29.298 M parameters). IBQ (arXiv:2412.02692) has 4 blocks per level (46.752 M), VAR
        (arXiv:2404.02905) 160 channels and a z of 32 (44.108 M).
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
        attention_levels: Sequence[int] | None = None,
        mid_attention: bool = True,
    ):
        super().__init__()
        widths = level_widths(
            "encoder", channels, channel_multipliers, num_res_blocks, z_channels, norm_groups, dropout
        )
        last = len(widths) - 1
        attention = _attention_levels("encoder", attention_levels, len(widths))
        self.out_channels, self.downsample = z_channels, 2**last
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        entries = [channels, *widths[:-1]]
        self.conv_blocks = nn.ModuleList(
            _EncoderLevel([entry] + [width] * num_res_blocks, i in attention, norm_groups, dropout, resample=i < last)
            for i, (entry, width) in enumerate(zip(entries, widths, strict=True))
        )
        self.mid = _middle(widths[-1], mid_attention, norm_groups, dropout)
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        h = self.conv_in(images)
        for level in self.conv_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class CNNDecoder(ConvolutionalDecoder):
    """Latent (B, z_channels, h, w) -> images (B, 3, h f, w f), not clamped. Mirrors `CNNEncoder`.

    Args:
        channels, channel_multipliers, norm_groups, dropout, attention_levels, mid_attention: as in `CNNEncoder`
            (levels finest first too).
        num_res_blocks: of the encoder; the decoder has one more per level.
        z_channels: channels of the input.
        in_channels: channels of the images, 3 for RGB.

    Raises:
        ConfigError: widths not divisible by norm_groups, an unknown level, or a size out of range.

    Source: as `CNNEncoder`; the defaults have 42.450 M parameters.
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
        attention_levels: Sequence[int] | None = None,
        mid_attention: bool = True,
    ):
        super().__init__()
        widths = level_widths(
            "decoder", channels, channel_multipliers, num_res_blocks, z_channels, norm_groups, dropout
        )
        widths.reverse()
        last = len(widths) - 1
        attention = {last - level for level in _attention_levels("decoder", attention_levels, len(widths))}
        self.in_channels, self.upsample = z_channels, 2**last
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], mid_attention, norm_groups, dropout)
        entries, blocks = [widths[0], *widths[:-1]], num_res_blocks + 1
        self.conv_blocks = nn.ModuleList(
            _DecoderLevel([entry] + [width] * blocks, i in attention, norm_groups, dropout, resample=i < last)
            for i, (entry, width) in enumerate(zip(entries, widths, strict=True))
        )
        self.norm_out = group_norm(widths[-1], norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
