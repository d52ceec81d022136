"""What sampling loops share: eval mode for their time, the type of their buffers, both halves of guidance."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards every sub-module has the mode it had."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Type in which matrix products run: autocast's where it is on, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def guided(features: Tensor, weight: float) -> Tensor:
    """Both halves of guidance combined: (2B, ...) conditional then unconditional -> (B, ...).

    Of features before an affine head this equals combining the logits, as the weights sum to 1; the head then runs on
    half the rows.
    """
    conditional, unconditional = features.chunk(2)
    return torch.lerp(unconditional, conditional, weight)
