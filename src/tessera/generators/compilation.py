"""Compiled decoding steps: one code for every position."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tessera.generators.cache import KVCache, Slot

BUCKET = 32  # positions by which the length that attention reads grows


class Slots:
    """The `Slot` of each position of a sequence.

    A step at position p attends, under a mask, to the first ceil((p + 1) / bucket) * bucket positions: shapes change
    once per bucket instead of with every position, at the cost of reading bucket / 2 positions too many on average.

    Args:
        length: positions of a sequence.

    Attributes:
        length: rounded up to whole buckets, what a cache must hold.
    """

    def __init__(self, length: int, device: torch.device, bucket: int = BUCKET):
        self.bucket, self.length = bucket, -(-length // bucket) * bucket
        self.index = torch.arange(self.length, device=device)
        self.visible = self.index <= self.index[:, None]

    def __getitem__(self, position: int) -> Slot:
        here, reach = slice(position, position + 1), (position // self.bucket + 1) * self.bucket
        return Slot(self.index[here], self.visible[here, :reach])


def keep_address(cache: KVCache) -> None:
    """Let CUDA graphs read and write a cache's buffers in place."""
    for buffer in (cache.keys, cache.values):
        torch._dynamo.mark_static_address(buffer, guard=False)


@functools.cache
def _compile(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    return torch.compile(function, mode=mode, fullgraph=True)


def compiled(function: Callable[..., Tensor], device_type: str) -> Callable[..., Tensor]:
    """`function` compiled; on CUDA its kernels are launched as one graph, so what it returned before is overwritten."""
    if device_type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()
    return _compile(function, "reduce-overhead" if device_type == "cuda" else None)
