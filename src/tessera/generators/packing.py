"""Products of linear layers by oneDNN, for sampling on a CPU in float32.

torch's own product (MKL) of few rows reads weights at half the memory's rate, and on processors that MKL doesn't
count as its own computes at less than half of theirs. 768 x 3072 weights, one AVX-512 core of an EPYC, milliseconds:

    rows        1     2     16    256
    MKL         0.54  0.98  1.23  11.3
    oneDNN      0.34  0.57  0.77  5.1
    packed      0.24  0.29  0.49  4.8     the weight copied to oneDNN's layout before, which takes 1.7
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MIN_ELEMENTS = 2**16  # of a weight; below, the call costs more than it saves
MIN_ROWS = 2  # with the usual layout


def is_large(weight: Tensor) -> bool:
    """Whether products with a dense weight gain from oneDNN."""
    suits = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= MIN_ELEMENTS
    return suits and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `onednn_linear` is to take the product: without gradients, outside of autocast and of compiled code."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    return weight.is_mkldnn or (is_large(weight) and x.numel() >= MIN_ROWS * x.shape[-1])


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b without gradient: (..., in) float32 -> (..., out); the weight as it is or from `pack`."""
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def pack(weight: Tensor) -> Tensor:
    """(out, in) float32 weight in oneDNN's layout for few rows, which also serves many."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)


@contextmanager
def packed(module: nn.Module) -> Iterator[None]:
    """Packed copies of the weights of a module's `tessera.generators.layers.Linear` parts while it samples.

    Packing costs about two decoding steps, and as much memory again as the weights. For other devices and types, under
    autocast and where the module compiles its steps nothing is packed.
    """
    layers = [part for part in module.modules() if getattr(part, "is_packable", False) and is_large(part.weight)]
    if torch.is_autocast_enabled("cpu") or getattr(module, "compiles_sampling", False):
        layers = []
    before = [layer.packed for layer in layers]
    try:
        for layer in layers:
            layer.packed = pack(layer.weight)
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.packed = value
