"""Orders in which tokens are predicted: random permutations that give way to the raster order in training, and either
in sampling."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import ConfigError, DataError
from tessera.generators.sampling import SamplingConfig
from tessera.rng import SampleRng, permutations

ORDERS = ("raster", "random")


@dataclass(frozen=True)
class RARSampling(SamplingConfig):
    """Settings of RAR's sampling.

    Args:
        order: raster, or random: a uniform permutation for each sample. Training ends with the raster order alone, so
            random orders suit models whose `order_anneal` ends late.

    Raises:
        ConfigError: a value out of range.
    """

    order: str = "raster"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ORDERS:
            raise ConfigError(f"sampling.order={self.order!r} is unknown; choose one of {', '.join(ORDERS)}")


def random_ratio(position: float, start: float, end: float) -> float:
    """Probability of a random order: 1 before `start`, 0 after `end`, a straight line between.

    r = 1 - (position - start) / (end - start)

    Args:
        position: training step, or share of training done; any unit, the same for all three.
        start, end: start <= end. start = end is a step: 1 before, 0 from there on.

    Returns:
        float in [0, 1].

    Source: RAR (arXiv:2411.00776), annealing; published: from step 125 000 to 187 500 of 250 000.
    """
    if position < start:
        return 1.0
    if position >= end:
        return 0.0
    return 1.0 - (position - start) / (end - start)


def raster_orders(batch_size: int, length: int, device: torch.device | str = "cpu") -> Tensor:
    """(B, L) int64, 0 .. L-1 in every row (a view of one row)."""
    return torch.arange(length, device=device).expand(batch_size, length)


def sample_orders(rng: SampleRng, batch_size: int, length: int, ratio: float, device: torch.device) -> Tensor:
    """An order per sample: a uniform random permutation with probability `ratio`, else raster.

    Args:
        rng: streams "order/random" and "order/permutation". Not read for ratio 0.
        ratio: in [0, 1].

    Returns:
        (B, L) int64 permutations; orders[b, k] is the position that sample b predicts as its k-th.
    """
    raster = raster_orders(batch_size, length, device)
    if ratio <= 0:
        return raster
    chosen = rng.uniform("order/random").to(device) < ratio
    shuffled = permutations(rng.uniform("order/permutation", length).to(device))
    return torch.where(chosen[:, None], shuffled, raster)


def check_orders(orders: Tensor, batch_size: int, length: int) -> None:
    """Refuse orders that are no (B, L) int64 permutations of 0 .. L - 1.

    Raises:
        DataError: names the shape and type, or the first sample whose order is none.
    """
    if tuple(orders.shape) != (batch_size, length) or orders.dtype != torch.int64:
        raise DataError(
            f"orders have shape {tuple(orders.shape)} and type {orders.dtype}; need {(batch_size, length)} int64"
        )
    wrong = (orders.sort(1).values != raster_orders(batch_size, length, orders.device)).any(1).nonzero()
    if len(wrong):
        raise DataError(
            f"the order of sample {int(wrong[0])} is no permutation of 0 .. {length - 1}; give every place once"
        )


def permute(tokens: Tensor, orders: Tensor) -> Tensor:
    """Tokens in prediction order: out[b, p, k] = tokens[b, p, orders[b, k]].

    Args:
        tokens: (B, P, L).
        orders: (B, L) int64 permutations.

    Returns:
        (B, P, L).
    """
    return tokens.gather(2, orders[:, None].expand_as(tokens))


def inverse(orders: Tensor) -> Tensor:
    """(B, L) inverse permutations: `permute(permute(x, o), inverse(o))` is x."""
    return torch.empty_like(orders, memory_format=torch.contiguous_format).scatter_(
        1, orders, raster_orders(*orders.shape, device=orders.device)
    )
