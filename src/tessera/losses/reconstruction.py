"""Pixel losses."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tessera.errors import ConfigError

PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss}


def pixel_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """`mse` (mean squared) or `l1` (mean absolute difference over all elements); ConfigError for another name."""
    if name not in PIXEL_LOSSES:
        raise ConfigError(f"stage.reconstruction_loss={name!r} is unknown; choose one of {', '.join(PIXEL_LOSSES)}")
    return PIXEL_LOSSES[name]
