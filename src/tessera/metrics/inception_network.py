"""The 2015-12-05 Inception of the FID, for inference only.

Batch norms are folded into their convolutions when the published weights are read, and average pools, which commute
with 1x1 convolutions, are taken of the narrower side. Both change results by rounding alone.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import CheckpointError

NUM_POOLED, NUM_SPATIAL, NUM_CLASSES = 2048, 2023, 1008
SPATIAL_CHANNELS = 7
BATCH_NORM_EPS = 1e-3
BATCH_NORM_KEYS = ("weight", "bias", "running_mean", "running_var")


class InceptionOutput(NamedTuple):
    """What one forward pass gives; float.

    Attributes:
        taps: (B, 64), (B, 192), (B, 768) and (B, 2048) global means after the first and second max pool, Mixed_6e and
            Mixed_7c, by width. 2048 is pool_3.
        spatial: (B, 2023) first 7 channels of Mixed_6d's 1x1 branch, in the order H, W, C.
        logits: (B, 1008) without the bias, as ADM and torch-fidelity take them for the Inception Score.
    """

    taps: dict[int, Tensor]
    spatial: Tensor
    logits: Tensor


class ConvReLU(nn.Module):
    """Convolution with the batch norm folded in, then ReLU."""

    def __init__(self, width: int, out: int, kernel: int | tuple[int, int], stride: int = 1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x), inplace=True)


class PooledConv(ConvReLU):
    """Average pool over 3x3 without the padding, then a 1x1 convolution and ReLU; computed in the other order."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(self.conv(x), 3, stride=1, padding=1, count_include_pad=False)
        return F.relu(pooled, inplace=True)


class MaxPooledConv(ConvReLU):
    """Max pool over 3x3, then a 1x1 convolution and ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.max_pool2d(x, 3, stride=1, padding=1))


class BlockA(nn.Module):
    """Mixed_5b, 5c, 5d."""

    def __init__(self, width: int, pooled: int):
        super().__init__()
        self.branch1x1 = ConvReLU(width, 64, 1)
        self.branch5x5_1 = ConvReLU(width, 48, 1)
        self.branch5x5_2 = ConvReLU(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvReLU(width, 64, 1)
        self.branch3x3dbl_2 = ConvReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvReLU(96, 96, 3, padding=1)
        self.branch_pool = PooledConv(width, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(x)], 1)


class BlockB(nn.Module):
    """Mixed_6a: to half the size."""

    def __init__(self, width: int):
        super().__init__()
        self.branch3x3 = ConvReLU(width, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvReLU(width, 64, 1)
        self.branch3x3dbl_2 = ConvReLU(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvReLU(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """Mixed_6b to 6e; the first 192 channels are those of the 1x1 branch."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        wide, tall = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = ConvReLU(width, 192, 1)
        self.branch7x7_1 = ConvReLU(width, inner, 1)
        self.branch7x7_2 = ConvReLU(inner, inner, **wide)
        self.branch7x7_3 = ConvReLU(inner, 192, **tall)
        self.branch7x7dbl_1 = ConvReLU(width, inner, 1)
        self.branch7x7dbl_2 = ConvReLU(inner, inner, **tall)
        self.branch7x7dbl_3 = ConvReLU(inner, inner, **wide)
        self.branch7x7dbl_4 = ConvReLU(inner, inner, **tall)
        self.branch7x7dbl_5 = ConvReLU(inner, 192, **wide)
        self.branch_pool = PooledConv(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(x)], 1)


class BlockD(nn.Module):
    """Mixed_7a: to half the size."""

    def __init__(self, width: int):
        super().__init__()
        self.branch3x3_1 = ConvReLU(width, 192, 1)
        self.branch3x3_2 = ConvReLU(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvReLU(width, 192, 1)
        self.branch7x7x3_2 = ConvReLU(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvReLU(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvReLU(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """Mixed_7b and 7c; the latter pools by the maximum, which is a peculiarity of this network."""

    def __init__(self, width: int, pool: type[ConvReLU]):
        super().__init__()
        wide, tall = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = ConvReLU(width, 320, 1)
        self.branch3x3_1 = ConvReLU(width, 384, 1)
        self.branch3x3_2a = ConvReLU(384, 384, **wide)
        self.branch3x3_2b = ConvReLU(384, 384, **tall)
        self.branch3x3dbl_1 = ConvReLU(width, 448, 1)
        self.branch3x3dbl_2 = ConvReLU(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvReLU(384, 384, **wide)
        self.branch3x3dbl_3b = ConvReLU(384, 384, **tall)
        self.branch_pool = pool(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([self.branch1x1(x), *parts, self.branch_pool(x)], 1)


class InceptionNetwork(nn.Module):
    """The network behind FID, sFID and the Inception Score, without resize and normalisation.

    Source: Szegedy et al. 2015 (arXiv:1512.00567), in the variant of Heusel et al. 2017 (arXiv:1706.08500).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvReLU(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvReLU(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, PooledConv)
        self.Mixed_7c = BlockE(2048, MaxPooledConv)
        self.fc = nn.Linear(NUM_POOLED, NUM_CLASSES)

    def forward(self, x: Tensor) -> InceptionOutput:
        """Images (B, 3, 299, 299) in [-1, 1) -> features."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        taps = {64: x.mean((2, 3))}
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        taps[192] = x.mean((2, 3))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x)))
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(x)
        taps[768] = x.mean((2, 3))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        taps[2048] = x.mean((2, 3))
        return InceptionOutput(taps, spatial, F.linear(taps[2048], self.fc.weight))


def fold_batch_norms(published: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """State dict of `InceptionNetwork` from published weights.

    Args:
        published: keys `<layer>.conv.weight`, `<layer>.bn.{weight,bias,running_mean,running_var}` and `fc.*`; counts of
            batches are ignored.
        source: "key=path" for the message.

    Raises:
        CheckpointError: a convolution without its batch norm.
    """
    state = {}
    for key, value in published.items():
        if key.endswith(".conv.weight"):
            layer = key.removesuffix(".conv.weight")
            if missing := [f"{layer}.bn.{part}" for part in BATCH_NORM_KEYS if f"{layer}.bn.{part}" not in published]:
                raise CheckpointError(f"{source} lacks {missing[0]}; it does not hold weights of the FID Inception")
            gain, bias, mean, var = (published[f"{layer}.bn.{part}"].double() for part in BATCH_NORM_KEYS)
            factor = gain / (var + BATCH_NORM_EPS).sqrt()
            state[key] = (value.double() * factor.view(-1, 1, 1, 1)).float()
            state[f"{layer}.conv.bias"] = (bias - mean * factor).float()
        elif ".bn." not in key:
            state[key] = value
    return state
