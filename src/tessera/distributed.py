"""Rank facts and collectives that are no-ops in a single process."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group of more than one process is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Rank of this process, 0 when not distributed."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes, 1 when not distributed."""
    return dist.get_world_size() if is_distributed() else 1


def share(count: int) -> range:
    """This process's contiguous part of `count` samples; the parts of all processes hold every sample once."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def barrier() -> None:
    """Wait for all processes."""
    if is_distributed():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over processes, without gradient; returns a new tensor."""
    if not is_distributed():
        return tensor.detach().clone()
    total = tensor.detach().clone().contiguous()
    dist.all_reduce(total)
    return total


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over processes, without gradient; returns a new tensor."""
    return all_reduce_sum(tensor) / world_size()


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes whose gradient is again the sum over processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_sum(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad)


def all_reduce_sum_with_grad(tensor: Tensor) -> Tensor:
    """Sum over processes through which gradients flow to every process."""
    return _AllReduceSum.apply(tensor) if is_distributed() else tensor


class _AllGather(torch.autograd.Function):
    """Concatenation over processes whose gradient is the sum over processes of the own part's gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad).chunk(world_size())[rank()]


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """Concatenate (N, ...) of all processes, in rank order, to (W N, ...); equal N on all of them.

    Where every process computes the same joint loss of the result, each gets W times that loss's gradient of its own
    part, which the mean that DistributedDataParallel takes undoes.
    """
    return _AllGather.apply(tensor) if is_distributed() else tensor


def broadcast_object(value: Any) -> Any:
    """The value of rank 0 on every rank (picklable objects)."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
