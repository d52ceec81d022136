"""Scores by branch, scale and part of the image: grouped, summed over batches and processes, divided once."""

import pytest
import torch

from forked import run_forked
from generators.generator_cases import quantizer
from tessera.stages.token_logs import TokenScores


def scores(branches, length, seed=0, count=None):
    """What a generator's loss reports of a batch of 7."""
    generator = torch.Generator().manual_seed(seed)
    losses, hits = (torch.rand(7, branches, length, generator=generator) for _ in range(2))
    counted = torch.rand(losses.shape, generator=generator) < (0.6 if count is None else count)
    parts = {"site_loss": losses, "site_hits": (hits < 0.5).float(), "site_count": torch.ones_like(losses)}
    return {name: (value * counted).sum(0) for name, value in parts.items()}


def ratio(results, name, *sites):
    """A mean over sites of several batches' sums."""
    total = [sum(result[key][sites].sum().item() for result in results) for key in (name, "site_count")]
    return pytest.approx(total[0] / total[1])


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize(
    ("multiscale", "kind", "bounds"), [(False, "quarter", [0, 2, 4, 6, 9]), (True, "scale", [0, 1, 5, 14])]
)
def test_groups(branches, multiscale, kind, bounds):
    logs, batches = TokenScores(quantizer(multiscale, branches)), [scores(branches, bounds[-1], s) for s in range(3)]
    for result in batches:
        logs.add(result)
    found, every = logs.means(), slice(None)
    expected = {"accuracy": ratio(batches, "site_hits", every)}
    groups = {f"{kind}{i}": (every, slice(bounds[i], bounds[i + 1])) for i in range(len(bounds) - 1)}
    if branches > 1:
        groups |= {f"branch{i}": (i,) for i in range(branches)}
    for name, sites in groups.items():
        expected |= {f"loss/{name}": ratio(batches, "site_loss", *sites)}
        expected |= {f"accuracy/{name}": ratio(batches, "site_hits", *sites)}
    assert found == expected


def test_means_start_anew():
    logs = TokenScores(quantizer(False))
    assert logs.means() == {}
    logs.add(scores(1, 9, 0))
    logs.means()
    logs.add(scores(1, 9, 1))
    assert logs.means()["accuracy"] == ratio([scores(1, 9, 1)], "site_hits", slice(None))


def test_what_counted_no_token_is_left_out():
    logs, result = TokenScores(quantizer(False)), scores(1, 9)
    for value in result.values():
        value[:, 2:] = 0
    logs.add(result)
    assert set(logs.means()) == {"accuracy", "loss/quarter0", "accuracy/quarter0"}
    logs.add(scores(1, 9, count=0.0))
    assert logs.means() == {}


def test_fewer_tokens_than_quarters():
    logs = TokenScores(quantizer(False, grid=1))
    logs.add(scores(1, 1, count=1.0))
    assert set(logs.means()) == {"accuracy", "loss/quarter3", "accuracy/quarter3"}


def _means(rank, world):
    logs = TokenScores(quantizer(True, 2))
    if rank == 0:  # the other has no batch
        logs.add(scores(2, 14))
        logs.add(scores(2, 14, 1))
    return logs.means(over_processes=True)


def test_processes_share_their_sums():
    logs = TokenScores(quantizer(True, 2))
    logs.add(scores(2, 14))
    logs.add(scores(2, 14, 1))
    expected = logs.means()
    assert run_forked(_means) == [pytest.approx(expected)] * 2
