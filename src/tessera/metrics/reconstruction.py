"""PSNR and SSIM of reconstructions, per image.

Both round the two sides to uint8 first, so a figure can be reproduced from saved PNG files. The functions
offer the flavours found in public code; the metric classes report one.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.errors import ConfigError, DataError
from tessera.metrics.features import as_uint8
from tessera.metrics.sums import SumMetric

QUANTISATIONS = ("half-up", "truncate", "none")
WINDOWS = ("uniform7", "gauss11")


def unit_range(images: Tensor, quantisation: str = "half-up") -> Tensor:
    """Map images from [-1, 1] to [0, 1], on the grid of 8-bit levels.

    Args:
        images: float in [-1, 1] (clamped), or uint8.
        quantisation: "half-up" (rounded to the nearest level, as an image file holds it), "truncate"
            ((x + 1) / 2 * 255 cut off, as TencentARC/SEED-Voken does to both sides), "none".

    Returns:
        float64 of the same shape.
    """
    from tessera.data.pixels import to_uint8

    if images.dtype == torch.uint8:
        return images.double() / 255
    if quantisation == "half-up":
        return to_uint8(images).double() / 255
    clamped = images.float().clamp(-1, 1)
    if quantisation == "truncate":
        return ((clamped + 1) / 2 * 255).to(torch.uint8).double() / 255
    if quantisation == "none":
        return (clamped.double() + 1) / 2
    raise ConfigError(f"quantisation={quantisation!r} is unknown; choose one of {', '.join(QUANTISATIONS)}")


def psnr(images: Tensor, reference: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio per image: 10 log10(R^2 / MSE), the MSE over all channels and pixels.

    Args:
        images, reference: (B, C, H, W) float of equal shape, in the units of `data_range`.
        data_range: R.

    Returns:
        (B,) float64 in dB; +inf where the two are equal.
    """
    _check_pair(images, reference)
    error = (images.double() - reference.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(data_range**2 / error)


def ssim(
    images: Tensor,
    reference: Tensor,
    window: str = "uniform7",
    data_range: float = 1.0,
    border: str = "crop",
    covariance: str | None = None,
) -> Tensor:
    """Structural similarity per image, averaged over channels and pixels.

    ((2 mx my + C1) (2 sxy + C2)) / ((mx^2 + my^2 + C1) (sxx + syy + C2)), C1 = (0.01 R)^2, C2 = (0.03 R)^2.

    Args:
        images, reference: (B, C, H, W) float of equal shape.
        window: "uniform7" (7x7 box; scikit-image's default, used by IBQ) or "gauss11" (11x11, sigma 1.5; Wang
            et al.).
        data_range: R.
        border: "crop" keeps windows that lie inside; "reflect" mirrors the border (torchmetrics).
        covariance: "sample" (n/(n-1)) or "population"; None: what goes with the window in scikit-image.

    Returns:
        (B,) float64.

    Raises:
        ConfigError: an unknown option.
        DataError: shapes differ, or images smaller than the window.

    Source: Wang et al. 2004; scikit-image structural_similarity; torchmetrics for border="reflect".
    """
    _check_pair(images, reference)
    if window not in WINDOWS:
        raise ConfigError(f"window={window!r} is unknown; choose one of {', '.join(WINDOWS)}")
    if border not in ("crop", "reflect"):
        raise ConfigError(f"border={border!r} is unknown; choose crop or reflect")
    covariance = covariance or ("sample" if window == "uniform7" else "population")
    if covariance not in ("sample", "population"):
        raise ConfigError(f"covariance={covariance!r} is unknown; choose sample or population")
    kernel = _kernel(window).to(images.device)
    size = kernel.numel()
    if min(images.shape[-2:]) < size:
        raise DataError(f"images of {tuple(images.shape[-2:])} pixels are smaller than SSIM's {size}x{size} window")
    x, y = images.double(), reference.double()
    if border == "reflect":
        x, y = (F.pad(t, (size // 2,) * 4, mode="reflect") for t in (x, y))
    mx, my, xx, yy, xy = _smooth(torch.stack([x, y, x * x, y * y, x * y]), kernel)
    factor = size**2 / (size**2 - 1) if covariance == "sample" else 1.0
    # window variances are non-negative; rounding may say otherwise
    sxx, syy = factor * (xx - mx * mx).clamp_min(0), factor * (yy - my * my).clamp_min(0)
    sxy = factor * (xy - mx * my)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = ((2 * mx * my + c1) * (2 * sxy + c2)) / ((mx * mx + my * my + c1) * (sxx + syy + c2))
    return values.mean(dim=(1, 2, 3))


def _check_pair(images: Tensor, reference: Tensor) -> None:
    if images.shape != reference.shape or images.ndim != 4:
        raise DataError(
            "pairs need two (B, C, H, W) tensors of equal shape, not "
            f"{tuple(images.shape)} and {tuple(reference.shape)}"
        )


def _kernel(window: str) -> Tensor:
    if window == "uniform7":
        return torch.full((7,), 1 / 7, dtype=torch.float64)
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    weights = torch.exp(-offsets.square() / (2 * 1.5**2))
    return weights / weights.sum()


def _smooth(maps: Tensor, kernel: Tensor) -> Tensor:
    """Filter rows, then columns, without padding; (..., H, W) -> (..., H - k + 1, W - k + 1)."""
    size = kernel.numel()
    flat = maps.flatten(0, -3)[:, None]
    rows = F.conv2d(flat, kernel.view(1, 1, 1, size))
    both = F.conv2d(rows, kernel.view(1, 1, size, 1))
    return both.view(*maps.shape[:-2], *both.shape[-2:])


class ImageMean(SumMetric):
    """Mean over images of a per-image value; sums are added up over processes."""

    def __init__(self, quantisation: str = "half-up", **kwargs: Any):
        super().__init__(**kwargs)
        if quantisation not in QUANTISATIONS:
            raise ConfigError(f"quantisation={quantisation!r} is unknown; choose one of {', '.join(QUANTISATIONS)}")
        self.quantisation = quantisation
        self.add_sum("total")
        self.add_sum("n", dtype=torch.int64)

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        """(B,) float64.

        Raises:
            DataError: other shapes or dtypes, or values out of range.
        """
        raise NotImplementedError

    def levels(self, images: Tensor) -> Tensor:
        """Images in [0, 1], see `unit_range`; refuses what is out of range, where that only clamps."""
        as_uint8(images)  # for its checks
        return unit_range(images, self.quantisation)

    def add(self, values: Tensor, mask: Tensor | None = None) -> None:
        """Add per-image values made by `values`; rows whose mask is False are left out."""
        values = values if mask is None else values[mask.to(values.device)]
        self.total = self.total + values.sum().to(self.total.device)
        self.n = self.n + values.numel()
        # `add` may be called instead of `update`
        self._update_count, self._computed = max(self._update_count, 1), None

    def update(self, images: Tensor, reference: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            images, reference: (B, 3, H, W) in [-1, 1], or uint8; clamp what a decoder gives.
            mask: (B,) bool; rows that are False are left out.

        Raises:
            DataError: other shapes or dtypes, or values out of range.
        """
        self.add(self.values(images, reference), mask)

    def compute(self) -> Tensor:
        if self.n == 0:
            raise DataError(f"{type(self).__name__} has seen no image; check data and limit_val_batches")
        return self.total / self.n


class PSNR(ImageMean):
    """Mean over images of the PSNR on 8-bit levels, in dB.

    Args:
        infinite: images reproduced exactly have no finite PSNR: "exclude" leaves them out of the mean (their
            number is the state `perfect`), a number counts them with that value.
        quantisation: see `unit_range`.
    """

    higher_is_better = True

    def __init__(self, infinite: str | float = "exclude", quantisation: str = "half-up", **kwargs: Any):
        super().__init__(quantisation, **kwargs)
        if infinite != "exclude" and not (isinstance(infinite, int | float) and math.isfinite(infinite)):
            raise ConfigError(f"infinite={infinite!r} must be 'exclude' or a finite number of dB")
        self.infinite = infinite
        self.add_sum("perfect", dtype=torch.int64)

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        return psnr(self.levels(images), self.levels(reference))

    def add(self, values: Tensor, mask: Tensor | None = None) -> None:
        values = values if mask is None else values[mask.to(values.device)]
        perfect = values.isposinf()
        self.perfect = self.perfect + perfect.sum().to(self.perfect.device)
        super().add(values[~perfect] if self.infinite == "exclude" else values.clamp_max(float(self.infinite)))

    def compute(self) -> Tensor:
        """Mean in dB; +inf where every image is reproduced exactly."""
        if self.n == 0 and self.perfect > 0:
            return torch.full_like(self.total, math.inf)
        return super().compute()


class SSIM(ImageMean):
    """Mean over images of the SSIM on 8-bit levels; report it as `SSIM[<window>]`.

    Args:
        window: see `ssim`.
        quantisation: see `unit_range`.
    """

    higher_is_better = True

    def __init__(self, window: str = "uniform7", quantisation: str = "half-up", **kwargs: Any):
        super().__init__(quantisation, **kwargs)
        if window not in WINDOWS:
            raise ConfigError(f"window={window!r} is unknown; choose one of {', '.join(WINDOWS)}")
        self.window = window

    def values(self, images: Tensor, reference: Tensor) -> Tensor:
        return ssim(self.levels(images), self.levels(reference), window=self.window)
