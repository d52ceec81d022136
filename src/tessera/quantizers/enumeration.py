"""Nearest codes where a codebook is a product of scalar alphabets: no table of the K codes is ever built."""

import torch
from torch import Tensor

# Candidates alive at once; bounds the memory to some 100 MB whatever N, k and K are
_CANDIDATES = 1 << 22


def nearest_products(costs: list[Tensor], k: int) -> Tensor:
    """The k cheapest codes of each row, when a code is one letter per channel and its cost the sum of its letters'.

    cost(n, code) = sum_d costs[d][n, letter_d],  index(code) = sum_d letter_d prod_{e < d} |alphabet_e|

    The k cheapest codes of the first d + 1 channels extend only the k cheapest of the first d, so that lists of k
    are merged channel by channel: O(N k sum_d |alphabet_d|) instead of O(N K).

    Args:
        costs: one (N, L_d) float per channel.
        k: 1 <= k <= K, the product of the L_d.

    Returns:
        (N, k) int64, cheapest first, distinct within a row; the order among equal costs is the same for any k.

    Raises:
        ValueError: k outside [1, K].
    """
    size = 1
    for cost in costs:
        size *= cost.shape[1]
    if not 1 <= k <= size:
        raise ValueError(f"k={k} neighbours asked of a codebook of {size} codes; k must lie in [1, {size}]")
    rows = max(1, _CANDIDATES // (k * max(cost.shape[1] for cost in costs)))
    count = costs[0].shape[0]
    found = torch.empty(count, k, dtype=torch.int64, device=costs[0].device)
    for start in range(0, count, rows):
        part = slice(start, start + rows)
        found[part] = _merge([cost[part] for cost in costs], k)
    return found


def _merge(costs: list[Tensor], k: int) -> Tensor:
    total = costs[0].new_zeros(costs[0].shape[0], 1)
    index = torch.zeros_like(total, dtype=torch.int64)
    stride = 1
    for cost in costs:
        letters = torch.arange(cost.shape[1], device=cost.device) * stride
        total = (total[:, :, None] + cost[:, None, :]).flatten(1)
        index = (index[:, :, None] + letters).flatten(1)
        # a stable sort: `topk` leaves the order of ties open, and mending that would wait for a GPU
        total, position = total.sort(dim=1, stable=True)
        total, index = total[:, :k], index.gather(1, position[:, :k])
        stride *= cost.shape[1]
    return index
