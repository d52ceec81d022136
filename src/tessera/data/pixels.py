"""The only places where float images become bytes and bytes become float images."""

from typing import Literal

import torch
from torch import Tensor

from tessera.errors import DataError

Rounding = Literal["half_up", "half_even", "truncate"]


def to_uint8(images: Tensor, rounding: Rounding = "half_up", tolerance: float | None = None) -> Tensor:
    """Images in [-1, 1] as uint8, as an image file would store them.

    half_up: trunc(clamp(127.5 x + 128, 0, 255)), the ADM evaluator's rule. half_even: round(255 clamp((x + 1) / 2)).
    truncate: trunc(clamp((x + 1) / 2) * 255), the rule of several public sampling scripts, half a level darker.

    Args:
        images: float of any shape, nominally in [-1, 1]; computed in float32 (bfloat16 would damage half the levels).
        rounding: see above.
        tolerance: refuse values further than this outside [-1, 1]; None clamps silently (decoders overshoot).

    Returns:
        uint8 of the same shape.

    Raises:
        DataError: not floating point, an unknown rule, or values out of range by more than the tolerance.
    """
    if not images.is_floating_point():
        raise DataError(f"to_uint8 takes float images in [-1, 1], not {images.dtype}")
    x = images.float()
    if tolerance is not None:
        outside = (x.abs() > 1 + tolerance) | ~torch.isfinite(x)
        if outside.any():
            share = outside.float().mean().item()
            raise DataError(
                f"{share:.2%} of the pixels are outside [-1, 1]; images in [0, 1] or [0, 255] must be rescaled"
            )
    if rounding == "half_up":
        levels = (127.5 * x + 128).clamp(0, 255)
    elif rounding == "half_even":
        levels = (((x + 1) / 2).clamp(0, 1) * 255).round()
    elif rounding == "truncate":
        levels = ((x.clamp(-1, 1) + 1) / 2) * 255
    else:
        raise DataError(f"rounding={rounding!r} is unknown; choose half_up, half_even or truncate")
    return levels.to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 of any shape -> float32 in [-1, 1] (u / 127.5 - 1)."""
    if images.dtype != torch.uint8:
        raise DataError(f"from_uint8 takes uint8 images, not {images.dtype}")
    return images.float() / 127.5 - 1
