"""Order and shares of the samples."""

import itertools

import pytest
import torch
from torch.utils.data import DistributedSampler

from forked import run_forked
from tessera.data.sampler import EvalBatches, TrainBatches
from tessera.errors import ConfigError


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def numbers(batches):
    return [number for _, number in flat(batches)]


def serve(rank, world, length, batch_size, epochs, start):
    """Batches of this process, per epoch, resuming the first at `start`."""
    positions = iter([(0, start), *((epoch, 0) for epoch in range(1, epochs))])
    sampler = TrainBatches(length, batch_size, 3, lambda: next(positions))
    return [list(sampler) for _ in range(epochs)], len(sampler)


@pytest.mark.parametrize(("length", "batch"), [(50, 8), (48, 8), (17, 8), (8, 8)])
@pytest.mark.parametrize("start", [0, 1])
def test_two_processes_see_what_one_sees_with_the_joint_batch(length, batch, start):
    alone, steps = serve(0, 1, length, batch, 3, start)
    shares = run_forked(serve, length, batch // 2, 3, start)
    assert all(count == steps for _, count in shares), "the length must stay the full epoch's"
    joint = [
        [first + second for first, second in zip(*epochs, strict=True)]
        for epochs in zip(*(served for served, _ in shares), strict=True)
    ]
    assert joint == alone
    assert [len(epoch) for epoch in alone] == [steps - start, steps, steps]


def batches(length=40, batch_size=8, seed=0, epoch=0, start=0):
    return TrainBatches(length, batch_size, seed, lambda: (epoch, start))


def test_an_epoch_is_a_permutation_with_its_epoch_in_the_keys():
    orders = []
    for epoch in (0, 1, 7):
        served = list(batches(epoch=epoch))
        assert all(key[0] == epoch for batch in served for key in batch)
        orders.append(numbers(served))
        assert sorted(orders[-1]) == list(range(40))
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != numbers(batches(seed=1))


def test_order_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    first = list(batches())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert list(batches()) == first


def test_batches_done_before_are_left_out_of_their_epoch():
    whole, rest = batches(epoch=2), batches(epoch=2, start=3)
    assert list(rest) == list(whole)[3:] and len(rest) == len(whole) == 5
    rest.set_epoch(0)
    assert list(rest) == list(whole)[3:], "Lightning's epoch number is not used"


def test_position_is_read_when_the_iterator_is_made():
    position = [(0, 0)]
    iterator = iter(TrainBatches(40, 8, 0, lambda: position[0]))
    position[0] = (5, 0)
    assert next(iterator)[0][0] == 0


def test_every_bit_of_the_seed_counts():
    orders = {tuple(numbers(batches(seed=seed))) for seed in (-1, 0, 1, 2**32, 2**40)}
    assert len(orders) == 5


def test_batch_larger_than_the_data_is_refused():
    with pytest.raises(ConfigError, match=r"data\.batch_size=11 x 1 processes exceeds the 10"):
        batches(10, 11)


def share(rank, world, length, batch_size):
    sampler = EvalBatches(length, batch_size)
    return list(sampler), len(sampler)


@pytest.mark.parametrize(("length", "batch"), [(10, 4), (11, 4), (9, 4), (7, 3), (3, 2), (100, 7), (2, 5)])
def test_evaluation_covers_every_sample_once_in_as_many_batches_everywhere(length, batch):
    alone, count = share(0, 1, length, batch)
    assert flat(alone) == list(range(length)) and len(alone) == count == -(-length // batch)
    assert max(map(len, alone)) <= batch
    shares = run_forked(share, length, batch)
    assert flat(flat(batches) for batches, _ in shares) == list(range(length))
    assert len({count for _, count in shares}) == 1, "a collective inside a step would hang"
    assert all(batches and max(map(len, batches)) <= batch for batches, _ in shares)


def test_fewer_samples_than_processes_leave_one_without():
    shares = run_forked(share, 1, 4)
    assert [batches for batches, _ in shares] == [[], [[0]]]


def test_lightning_takes_the_samplers_for_its_own_distributed_one():
    assert issubclass(TrainBatches, DistributedSampler) and issubclass(EvalBatches, DistributedSampler)
