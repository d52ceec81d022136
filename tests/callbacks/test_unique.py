import pytest
import torch
from torch.utils.data import DistributedSampler

from forked import run_forked
from tessera.callbacks.unique import UniqueSamples
from tessera.errors import DataError


def collect(indices: list[list[int]]) -> tuple[list[int], UniqueSamples]:
    samples, kept = UniqueSamples(), []
    for batch in indices:
        index = torch.tensor(batch)
        samples.add(index, lambda mask, index=index: kept.extend(index[mask].tolist()))
    samples.finish()
    return kept, samples


def test_repeats_inside_a_process():
    kept, samples = collect([[0, 1, 2], [2, 3, 3], [0, 4]])
    assert kept == [0, 1, 2, 3, 4]
    assert (samples.total, samples.unique) == (8, 5)


def test_nothing_seen():
    kept, samples = collect([])
    assert kept == [] and samples.unique == 0


def _padded(rank, world, count, batch_size):
    own = list(DistributedSampler(range(count), world, rank, shuffle=False))
    kept, samples = collect([own[i : i + batch_size] for i in range(0, len(own), batch_size)])
    return kept, samples.total, samples.unique


@pytest.mark.parametrize(("world", "count", "batch_size"), [(3, 10, 2), (3, 10, 7), (8, 17, 2)])
def test_padding_sampler(world, count, batch_size):
    answers = run_forked(_padded, count, batch_size, world=world)
    assert sorted(number for kept, _, _ in answers for number in kept) == list(range(count))
    for _, total, unique in answers:
        assert total == -(-count // world) * world and unique == count


def _overlapping(rank, world):
    try:
        collect([[0, 1], [2, 3]])
    except DataError as error:
        return str(error)
    return ""


def test_overlap_is_refused_by_all():
    for message in run_forked(_overlapping):
        assert "trainer.use_distributed_sampler=false" in message
