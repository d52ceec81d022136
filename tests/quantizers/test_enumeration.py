"""Merging lists of the cheapest codes channel by channel."""

import itertools

import pytest
import torch

from tessera.quantizers import enumeration
from tessera.quantizers.enumeration import nearest_products


def brute_force(costs, k):
    sizes = [cost.shape[1] for cost in costs]
    letters = torch.tensor([list(reversed(c)) for c in itertools.product(*map(range, reversed(sizes)))])
    total = sum(cost[:, letters[:, d]] for d, cost in enumerate(costs))
    return total.argsort(dim=1, stable=True)[:, :k]


@pytest.mark.parametrize("sizes", [[3], [2, 2, 2, 2], [4, 1, 3], [5, 2, 6]])
@pytest.mark.parametrize("budget", [1, 1 << 22])
def test_equals_brute_force(monkeypatch, sizes, budget):
    monkeypatch.setattr(enumeration, "_CANDIDATES", budget)  # 1: row by row
    costs = [torch.rand(9, size) for size in sizes]
    for k in {1, 2, torch.tensor(sizes).prod().item()}:
        if k <= torch.tensor(sizes).prod():
            assert torch.equal(nearest_products(costs, k), brute_force(costs, k))


def test_refuses_impossible_numbers():
    costs = [torch.rand(2, 3), torch.rand(2, 2)]
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"k={k}.*6 codes"):
            nearest_products(costs, k)
