"""The only places where float images become bytes and bytes become float images."""

from typing import Literal

import torch
from torch import Tensor

from tessera.errors import ConfigError, DataError

Rounding = Literal["half_up", "half_even", "truncate"]

ROUNDINGS = ("half_up", "half_even", "truncate")
TOLERANCE = 1e-3  # what rounding in a checked range may add


def to_uint8(images: Tensor, rounding: Rounding = "half_up", tolerance: float | None = None) -> Tensor:
    """Images in [-1, 1] as uint8, as an image file would store them.

    half_up: trunc(clamp(127.5 x + 128, 0, 255)), the ADM evaluator's rule.
    half_even: round(255 clamp((x + 1) / 2, 0, 1)).
    truncate: trunc(clamp((x + 1) / 2, 0, 1) * 255), half a level darker (sampling scripts of several repositories).

    Args:
        images: float of any shape in [-1, 1]; computed in float32 (bfloat16 would damage half of the levels).
        rounding: see above.
        tolerance: refuse values that lie further outside than this (`TOLERANCE` where the range is a contract); None
            clamps silently, as decoders overshoot.

    Returns:
        uint8 of the same shape.

    Raises:
        ConfigError: an unknown rule.
        DataError: not floating point, or values out of range or not finite; the message gives their share.

    Source: openai/guided-diffusion, evaluations and scripts/image_sample.py.
    """
    x = _checked(images, -1.0, rounding, tolerance)
    if rounding == "half_up":
        levels = (127.5 * x + 128).clamp(0, 255)
    elif rounding == "half_even":
        levels = (((x + 1) / 2).clamp(0, 1) * 255).round()
    else:
        levels = ((x + 1) / 2).clamp(0, 1) * 255
    return levels.to(torch.uint8)


def unit_to_uint8(images_01: Tensor, rounding: Rounding = "half_up", tolerance: float | None = None) -> Tensor:
    """Images in [0, 1] as uint8.

    half_up: trunc(clamp(255 u + 0.5, 0, 255)) (torchvision's save_image). half_even: round(255 clamp(u, 0, 1)) (TiTok's
    evaluation). truncate: trunc(clamp(255 u, 0, 255)) (sampling scripts of RAR, TiTok and ImageFolder).

    Args:
        images_01: float of any shape in [0, 1]; computed in float32.
        rounding, tolerance: as in `to_uint8`.

    Returns:
        uint8 of the same shape.

    Raises:
        As `to_uint8`.
    """
    u = _checked(images_01, 0.0, rounding, tolerance)
    if rounding == "half_up":
        levels = (255 * u + 0.5).clamp(0, 255)
    elif rounding == "half_even":
        levels = (u.clamp(0, 1) * 255).round()
    else:
        levels = (255 * u).clamp(0, 255)
    return levels.to(torch.uint8)


def from_uint8(images_u8: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1] (u / 127.5 - 1), which `to_uint8` undoes exactly.

    Raises:
        DataError: another dtype.
    """
    if images_u8.dtype != torch.uint8:
        raise DataError(f"from_uint8 takes uint8 images, not {images_u8.dtype}")
    return images_u8.float() / 127.5 - 1


def _checked(images: Tensor, low: float, rounding: str, tolerance: float | None) -> Tensor:
    """The images in float32, after the checks both conversions share."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding={rounding!r} is unknown; choose one of {', '.join(ROUNDINGS)}")
    if not images.is_floating_point():
        raise DataError(f"float images in [{low:g}, 1] are converted to uint8, not {images.dtype}")
    x = images.float()
    if tolerance is not None:
        # written so that NaN counts as outside
        outside = ~((x >= low - tolerance) & (x <= 1 + tolerance))
        if outside.any():
            raise DataError(
                f"{outside.double().mean().item():.2%} of the pixels are outside [{low:g}, 1] or not finite; clamp a "
                "decoder's output, and rescale images in another range, before they become uint8"
            )
    return x
