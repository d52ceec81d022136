"""Discriminator that reads the features of a frozen DINO vision transformer."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.discriminators.patchgan import JointBatchNorm2d
from tessera.errors import ConfigError
from tessera.frozen import Standardise, Unregistered, timm_vit
from tessera.rng import SampleRng, as_sample_rng

NORMS = ("bn", "sbn", "gn")
VIRTUAL_BATCH = 8
NORM_EPS = 1e-6
SLOPE = 0.2


class SpectralConv1d(nn.Module):
    """Convolution of tokens in a ring, its weight divided by an estimate of its largest singular value.

    Each training forward improves the estimate by one power iteration: v = W^T u / |.|, u = W v / |.|, sigma = u W v.
    Parameter and buffer names are those of torch's `nn.utils.spectral_norm`, whose published weights load as they are;
    its replacement in `nn.utils.parametrizations` iterates in the other order.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        layer = nn.Conv1d(in_channels, out_channels, kernel_size)  # torch's initialisation
        self.weight_orig, self.bias = layer.weight, layer.bias
        self.register_buffer("weight_u", F.normalize(torch.randn(out_channels), dim=0, eps=1e-12))
        self.register_buffer("weight_v", F.normalize(torch.randn(in_channels * kernel_size), dim=0, eps=1e-12))
        self.padding = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, L) -> (B, out, L); L of at least half the kernel."""
        matrix = self.weight_orig.flatten(1)
        with torch.autocast(x.device.type, enabled=False):
            if self.training:
                with torch.no_grad():
                    # out of place: the graph of an earlier forward may still hold the old vectors
                    self.weight_v = F.normalize(matrix.T @ self.weight_u, dim=0, eps=1e-12)
                    self.weight_u = F.normalize(matrix @ self.weight_v, dim=0, eps=1e-12)
            weight = self.weight_orig / (self.weight_u @ (matrix @ self.weight_v))
        if self.padding:
            x = F.pad(x, (self.padding, self.padding), mode="circular")
        return F.conv1d(x, weight, self.bias)


class VirtualBatchNorm(nn.Module):
    """Batch norm over groups of about 8 consecutive samples of this process; no running statistics, float32.

    A batch of B samples is split into ceil(B / 8) groups whose sizes differ by at most one.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) -> the same shape."""
        groups = math.ceil(len(x) / VIRTUAL_BATCH)
        values = x if x.dtype == torch.float64 else x.float()
        if len(x) % groups == 0:
            parts = values.view(groups, -1, *values.shape[1:])
            variance, mean = torch.var_mean(parts, (1, 3), correction=0, keepdim=True)
            values = ((parts - mean) * (variance + NORM_EPS).rsqrt()).view_as(values)
        else:
            done = []
            for part in values.tensor_split(groups):
                variance, mean = torch.var_mean(part, (0, 2), correction=0, keepdim=True)
                done.append((part - mean) * (variance + NORM_EPS).rsqrt())
            values = torch.cat(done)
        return (values * self.weight[:, None] + self.bias[:, None]).to(x.dtype)


class JointBatchNorm1d(JointBatchNorm2d):
    """Batch norm of tokens (B, C, L) with statistics over all processes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[..., None])[..., 0]


class Residual(nn.Module):
    """(fn(x) + x) / sqrt(2)."""

    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) / math.sqrt(2)


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "bn":
        return VirtualBatchNorm(channels)
    if kind == "sbn":
        return JointBatchNorm1d(channels, eps=NORM_EPS)
    groups = min(32, channels)
    if channels % groups:
        raise ConfigError(f"discriminator.norm=gn needs channels that {groups} groups divide, not {channels}")
    return nn.GroupNorm(groups, channels, eps=NORM_EPS)


def make_head(channels: int, norm: str, kernel_size: int = 9) -> nn.Sequential:
    """Features (B, C, L) -> logits (B, 1, L): 1 x 1, a residual block with a wide kernel, 1 x 1; spectrally normed."""

    def block(kernel: int) -> nn.Sequential:
        return nn.Sequential(SpectralConv1d(channels, channels, kernel), _norm(norm, channels), nn.LeakyReLU(SLOPE))

    return nn.Sequential(block(1), Residual(block(kernel_size)), SpectralConv1d(channels, 1, 1))


class DINODiscriminator(nn.Module):
    """Spectrally normed heads on the tokens of a frozen DINO ViT, before its first block and after chosen ones.

    The backbone is no part of parameters, state dict or train mode, and follows the images' device. Images are scaled
    to its size: smaller ones up (bicubic), larger ones down (area), or cropped in half of the calls.

    Args:
        model: timm's name of the backbone.
        pretrained: take DINO's weights, from `weights` or else from the hub. False: a random backbone, for tests.
        weights: local file of them.
        readouts: blocks whose output is read, besides the tokens before the first one.
        norm: "bn": groups of 8 samples of a process; "sbn": the batch of all processes; "gn": group norm.
        crop_probability: of cropping images larger than the backbone takes, instead of scaling them down.
        backbone: further options of timm's constructor, e.g. a smaller `img_size`, `depth`, `embed_dim`.

    Raises:
        ConfigError: an unknown norm or model, or a readout beyond the backbone's depth.
        MissingFileError: weights that can't be had.

    Source: Sauer et al. 2023 (arXiv:2301.09515) in the form of XQ-GAN's `discriminator_dino.py`; crops are drawn from
        the step's seed, and any batch size is taken.
    """

    def __init__(
        self,
        model: str = "vit_small_patch16_224.dino",
        pretrained: bool = True,
        weights: str | Path | None = None,
        readouts: Sequence[int] = (2, 5, 8, 11),
        norm: str = "bn",
        crop_probability: float = 0.5,
        backbone: dict[str, Any] | None = None,
    ):
        super().__init__()
        if norm not in NORMS:
            raise ConfigError(f"discriminator.norm={norm!r} is unknown; choose one of {', '.join(NORMS)}")
        if not 0 <= crop_probability <= 1:
            raise ConfigError(f"discriminator.crop_probability={crop_probability} is outside [0, 1]")
        options = {"act_layer": "gelu_tanh", **(backbone or {})}  # as the published discriminator runs it
        network = timm_vit(model, pretrained, weights, "discriminator", **options)
        depth = len(network.blocks)
        if not readouts or sorted(set(readouts)) != list(readouts) or not 0 <= readouts[0] <= readouts[-1] < depth:
            raise ConfigError(
                f"discriminator.readouts={list(readouts)} must rise from 0 to at most {depth - 1}, the backbone's last "
                "block"
            )
        self.backbone = Unregistered(network)
        self.readouts, self.crop_probability = tuple(readouts), crop_probability
        self.size = network.patch_embed.img_size[0]
        self.standardise = Standardise("imagenet", "discriminator.normalisation")
        self.heads = nn.ModuleList([make_head(network.embed_dim, norm) for _ in range(len(readouts) + 1)])

    def resize(self, images: Tensor, rng: SampleRng | torch.Generator | None = None) -> Tensor:
        """Images (B, 3, H, W) at the backbone's size; draws "dino/crop" (3, shared) where H and W are larger."""
        height, width = images.shape[-2:]
        if (height, width) == (self.size, self.size):
            return images
        if min(height, width) <= self.size:
            return F.interpolate(images, (self.size, self.size), mode="bicubic", align_corners=False)
        crops, top, left = as_sample_rng(rng, len(images), images.device).shared("dino/crop", 3).tolist()
        if crops >= self.crop_probability:
            return F.interpolate(images, (self.size, self.size), mode="area")
        y, x = int(top * (height - self.size + 1)), int(left * (width - self.size + 1))
        return images[..., y : y + self.size, x : x + self.size]

    def features(self, images: Tensor) -> list[Tensor]:
        """Readouts (B, C, L) of images at the backbone's size: each patch token plus the class token."""
        network = self.backbone.get(images.device)
        x = network.patch_embed(images)
        x = torch.cat([network.cls_token.expand(len(x), -1, -1), x], dim=1) + network.pos_embed
        found = [x]
        for number, block in enumerate(network.blocks[: self.readouts[-1] + 1]):
            x = block(x)
            if number in self.readouts:
                found.append(x)
        return [(tokens[:, 1:] + tokens[:, :1]).transpose(1, 2) for tokens in found]

    def forward(self, images: Tensor, rng: SampleRng | torch.Generator | None = None) -> Tensor:
        """Logits (B, heads * L), head by head, of images (B, 3, H, W) in [-1, 1]; `rng`: see `resize`."""
        features = self.features(self.resize(self.standardise(images), rng))
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, features, strict=True)], dim=1)
