"""Bicubic enlargement of small maps as two matrix products."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=256)
def _weights(size: int, enlarged: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(enlarged, size): what each new position takes of the old ones along one axis."""
    with torch.inference_mode(False), torch.no_grad():  # a tensor that any later graph may hold
        units = torch.eye(size, dtype=torch.float64, device=device)[None, None]
        return F.interpolate(units, size=(enlarged, size), mode="bicubic")[0, 0].to(dtype)


def enlarge(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, D, h, w) at another size, bicubic (a = -0.75, pixel centres, no antialias).

    The same numbers as `torch.nn.functional.interpolate`, which takes ten times as long forward and backward for
    grids of codes, and whose backward isn't deterministic on a GPU.
    """
    height, width = (_weights(old, new, maps.dtype, maps.device) for old, new in zip(maps.shape[2:], size, strict=True))
    return height @ (maps @ width.t())
