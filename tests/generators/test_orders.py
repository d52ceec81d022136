"""Randomised prediction orders."""

import pytest
import torch

from tessera.generators.orders import inverse, permute, random_ratio, raster_orders, sample_orders
from tessera.rng import IndexedRng

CPU = torch.device("cpu")


def test_ratio_falls_from_one_to_zero():
    assert [random_ratio(x, 0.5, 0.75) for x in (0.0, 0.499, 0.5, 0.625, 0.75, 1.0)] == [1, 1, 1, 0.5, 0, 0]


@pytest.mark.parametrize(("start", "end", "before", "after"), [(0.5, 0.5, 1, 0), (0.0, 0.0, 1, 0), (1.0, 1.0, 1, 0)])
def test_ratio_is_a_step_where_start_is_end(start, end, before, after):
    assert random_ratio(start - 1e-9, start, end) == before
    assert random_ratio(start, start, end) == after


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_orders_are_permutations_at_the_asked_rate(ratio):
    count, length = 2000, 12
    orders = sample_orders(IndexedRng(0, torch.arange(count)), count, length, ratio, CPU)
    raster = raster_orders(count, length)
    assert torch.equal(orders.sort(1).values, raster)
    share = (orders != raster).any(1).float().mean()
    assert share == pytest.approx(ratio, abs=0.05 if 0 < ratio < 1 else 0)


def test_random_orders_are_uniform():
    count, length = 6000, 3
    orders = sample_orders(IndexedRng(1, torch.arange(count)), count, length, 1.0, CPU)
    counts = (orders * torch.tensor([9, 3, 1])).sum(1).unique(return_counts=True)[1]
    assert len(counts) == 6
    assert (counts.float() / count - 1 / 6).abs().max() < 0.02  # four standard deviations


def test_order_depends_on_the_sample_only():
    together = sample_orders(IndexedRng(0, torch.arange(8), step=4), 8, 6, 0.5, CPU)
    alone = sample_orders(IndexedRng(0, torch.tensor([5]), step=4), 1, 6, 0.5, CPU)
    assert torch.equal(together[5:6], alone)
    later = sample_orders(IndexedRng(0, torch.arange(8), step=5), 8, 6, 0.5, CPU)
    assert not torch.equal(together, later)


def test_permute_and_its_inverse():
    tokens = torch.randint(0, 50, (4, 3, 10))
    orders = sample_orders(IndexedRng(0, torch.arange(4)), 4, 10, 1.0, CPU)
    permuted = permute(tokens, orders)
    for b in range(4):
        assert torch.equal(permuted[b], tokens[b][:, orders[b]])
    assert torch.equal(permute(permuted, inverse(orders)), tokens)
    assert torch.equal(orders.gather(1, inverse(orders)), raster_orders(4, 10))
    assert torch.equal(inverse(raster_orders(4, 10)), raster_orders(4, 10))
