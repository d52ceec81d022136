"""Orders in which tokens are predicted in training: random permutations that give way to the raster order."""

import torch
from torch import Tensor

from tessera.rng import SampleRng, permutations


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
