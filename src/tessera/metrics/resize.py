"""Resizing of 8-bit images to an extractor's input size, in the four flavours that published figures were made with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.errors import ConfigError, DataError

RESIZES = ("legacy_tf", "half_pixel", "antialias", "pil_bicubic")


def check_resize(mode: str) -> None:
    """Refuse an unknown flavour.

    Raises:
        ConfigError: not one of `RESIZES`.
    """
    if mode not in RESIZES:
        raise ConfigError(f"metrics.features.resize={mode!r} is unknown; choose one of {', '.join(RESIZES)}")


def resize(images: Tensor, size: int | tuple[int, int], mode: str = "legacy_tf") -> Tensor:
    """Images (B, C, H, W) of any dtype in 0..255 at another size, float32 in 0..255, not rounded.

    legacy_tf: bilinear, src = dst in / out, no antialias: TensorFlow 1's, inside the graph of the FID Inception.
    half_pixel: bilinear, src = (dst + 0.5) in / out - 0.5 (pytorch-fid, IBQ).
    antialias: as half_pixel, with a wider triangle when shrinking (torchmetrics' default).
    pil_bicubic: Pillow's bicubic, cut to 0..255 (clean-fid, DINOv2, CLIP).

    Args:
        images: float64 stays float64.
        size: (H, W), or the side of a square.
        mode: see above; all agree where the size doesn't change.

    Raises:
        ConfigError: an unknown mode.
        DataError: not (B, C, H, W).
    """
    check_resize(mode)
    if images.ndim != 4 or 0 in images.shape[-2:]:
        raise DataError(f"images to resize are (B, C, H, W), not {tuple(images.shape)}")
    height, width = (size, size) if isinstance(size, int) else size
    x = images if images.dtype == torch.float64 else images.float()
    if x.shape[-2:] == (height, width):
        return x
    if mode == "legacy_tf":
        # with one more (repeated) pixel on either side, corner-aligned sampling has the step in / out from 0
        padded = F.pad(x, (0, 1, 0, 1), mode="replicate")
        larger = F.interpolate(padded, (height + 1, width + 1), mode="bilinear", align_corners=True)
        return larger[..., :height, :width]
    if mode == "pil_bicubic":
        return F.interpolate(x, (height, width), mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False, antialias=mode == "antialias")
