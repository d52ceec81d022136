"""Phi: small convolutions that refine the upsampled codes of a scale before they are added up."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError


def phi_table(scales: int, convs: int) -> list[int]:
    """Which of `convs` convolutions each scale uses: the one whose tick lies nearest.

    Ticks are spread evenly over [a, 1 - a], a = 1/(3 convs) for 4 convolutions and 1/(2 convs) otherwise; scale s
    lies at s / (scales - 1).

    In exact arithmetic many scales lie midway between two ticks; the public code resolves them by the rounding of
    IEEE double arithmetic, which Python's float has on every platform, and which is followed step by step here. The
    result is integers, made once; float32 or another order of operations would choose other convolutions.

    Args:
        scales: S, at least 1.
        convs: at least 1.

    Returns:
        S numbers in [0, convs).

    Source: VAR (arXiv:2404.02905), `PhiPartiallyShared` of the public code; one scale, where that divides by zero,
        uses the first.
    """
    if scales == 1 or convs == 1:
        return [0] * scales
    start = 1 / 3 / convs if convs == 4 else 1 / 2 / convs
    end = 1 - start
    step = (end - start) / (convs - 1)
    ticks = [i * step + start for i in range(convs - 1)] + [end]
    return [min(range(convs), key=lambda i, s=s: abs(ticks[i] - s / (scales - 1))) for s in range(scales)]


class PhiConvs(nn.ModuleList):
    """phi(h) = (1 - r) h + r conv(h), a 3 x 3 convolution chosen by scale.

    Args:
        dim: channels.
        scales: S.
        convs: convolutions: 0 is one per scale, 1 one for all, more are shared by neighbouring scales (`phi_table`).
        ratio: r in [0, 1]; 0 makes phi the identity, without parameters.

    Raises:
        ConfigError: a value out of range.

    Source: VAR (arXiv:2404.02905), `Phi` of the public code. Convolutions that no scale uses (4 for 3 scales) are
        kept, as published weights have them, but not trained: a gradient would never come.
    """

    def __init__(self, dim: int, scales: int, convs: int, ratio: float):
        if convs < 0:
            raise ConfigError(f"quantizer.branch.phi_convs={convs} must be 0 (one per scale), 1 (one for all) or more")
        if not 0 <= ratio <= 1:
            raise ConfigError(f"quantizer.branch.phi_ratio={ratio} is outside [0, 1]; 0 switches the convolutions off")
        count = convs or scales
        super().__init__([nn.Conv2d(dim, dim, 3, padding=1) for _ in range(count if ratio > 0 else 0)])
        self.ratio, self.table = ratio, phi_table(scales, count)
        for unused in set(range(len(self))) - set(self.table):
            self[unused].requires_grad_(False)

    def extra_repr(self) -> str:
        """What, besides the weights, decides the tokens."""
        return f"ratio={self.ratio}, table={self.table}"

    def refine(self, h: Tensor, scale: int) -> Tensor:
        """phi of maps h (B, D, h, w) float32 of a scale."""
        if not len(self):
            return h
        conv = self[self.table[scale]]
        return torch.lerp(h, F.conv2d(h, conv.weight.float(), conv.bias.float(), padding=1), self.ratio)
