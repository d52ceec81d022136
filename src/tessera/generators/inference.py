"""What sampling loops share: the state of the model meanwhile, the type of their buffers, both halves of guidance."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tessera.generators.packing import packed


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and `packed` weights inside; afterwards every sub-module has the mode it had."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad(), packed(module):
            yield
    finally:
        for part in training:
            part.training = True


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Type in which matrix products run: autocast's where it is on, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def float32_head(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """The head as a function from features of any type to float32 logits: both are taken to float32 before the product.

    A draw from half-precision logits would follow their rounding: bfloat16 has 3 digits, and logits reach tens.
    """
    if layer.weight.dtype != torch.float32:
        layer = copy.deepcopy(layer).float()

    def head(features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return layer(features.float())

    return head


def guided(features: Tensor, weight: float) -> Tensor:
    """Both halves of guidance combined: (2B, ...) conditional then unconditional -> (B, ...).

    Of features before an affine head this equals combining the logits, as the weights sum to 1; the head then runs on
    half the rows.
    """
    conditional, unconditional = features.chunk(2)
    return torch.lerp(unconditional, conditional, weight)
