"""Moving unused codes: who is dead, where it goes, and that all ranks agree."""

from functools import partial

import pytest
import torch

from forked import run_forked
from golden_cases import assert_close
from tessera.errors import ConfigError
from tessera.quantizers import ClusteringRevival, RandomRevival, VQCodebook

SIZE = 40


def make(revival, **options) -> VQCodebook:
    torch.manual_seed(0)
    options = {"dim": 3, "codebook_size": SIZE, "l2_normalize": False, "revival": revival, **options}
    return VQCodebook(**options).train()


def clusters(count: int = 64) -> torch.Tensor:
    """Vectors far away from all initial codes."""
    return 5 + torch.randn(count, 3)


def at_vectors(codebook: VQCodebook, x: torch.Tensor) -> torch.Tensor:
    """(K,) bool: which codes are equal to one of x."""
    return (codebook.embedding[:, None] == x).all(-1).any(1)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_dead_codes_restart_at_vectors_of_the_batch(update):
    # shares of the mean usage: 1/2 after one step unused, 1/4 < 0.3 after two
    codebook = make(partial(RandomRevival, threshold=0.3, decay=0.5), update=update)
    x = clusters()
    used = torch.zeros(SIZE, dtype=torch.bool)
    for _ in range(2):
        assert not at_vectors(codebook, x).any(), "a grace period comes first"
        used[codebook(x).indices] = True
    assert used.sum() < SIZE / 2, "the control has lost its meaning: all codes are used"
    reached = at_vectors(codebook, x)
    assert reached[~used].all()
    assert_close(codebook.revival.usage[~used], torch.full((int((~used).sum()),), 1 / SIZE))
    if update == "ema":
        assert (codebook.averages.counts[~used] == 1).all()
        assert torch.equal(codebook.averages.sums[~used], codebook.embedding[~used])
    assert len(codebook.eval()(x).indices.unique()) > 2 * used.sum()


def test_used_codes_stay():
    codebook = make(RandomRevival)
    x = codebook.lookup(torch.arange(SIZE)).detach()
    before = codebook.embedding.clone()
    for _ in range(5):
        codebook(x)
    assert torch.equal(codebook.embedding, before)
    assert_close(codebook.revival.usage, torch.full((SIZE,), 1 / SIZE))


def test_draws_depend_on_seed_and_step_only():
    x = clusters()

    def run(seed):
        codebook = make(partial(RandomRevival, threshold=0.9, decay=0.0, seed=seed))
        for _ in range(2):
            codebook(x)
        return codebook

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first.embedding, again.embedding)
    assert not torch.equal(first.embedding, other.embedding)
    assert first.revival.steps.item() == 2
    resumed = make(partial(RandomRevival, threshold=0.9, decay=0.0))
    resumed.load_state_dict(first.state_dict())
    resumed(x), first(x)
    assert torch.equal(resumed.embedding, first.embedding)


def test_clustering_draws_unused_codes_to_their_nearest_vectors():
    codebook = make(ClusteringRevival)
    x, before = clusters(), codebook.embedding.clone()
    indices = codebook(x).indices
    unused = torch.ones(SIZE, dtype=torch.bool)
    unused[indices] = False
    assert unused.any()
    nearest = x[torch.cdist(before, x).argmin(1)]
    assert (torch.cdist(codebook.embedding, nearest).diagonal()[unused] < 0.02).all()
    share = torch.bincount(indices, minlength=SIZE) / len(x)
    pull = torch.exp(-0.01 * share * SIZE * 1000 - 1e-3)[:, None]
    assert_close(codebook.embedding, before * (1 - pull) + nearest * pull)


REVIVALS = {"random": partial(RandomRevival, threshold=0.9, decay=0.3), "clustering": ClusteringRevival}


def _share(rank, world, x, masks, name, update):
    codebook = make(REVIVALS[name], update=update)
    for batch, mask in zip(x, masks, strict=True):
        part, mask = (whole.tensor_split(world)[rank] for whole in (batch, mask))
        codebook.observe(part, codebook.assign(part), mask)
    return {key: value.tolist() for key, value in codebook.state_dict().items()}


@pytest.mark.parametrize("name", REVIVALS)
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_ranks_together_equal_the_joint_batch_of_what_is_kept(name, update):
    x = 5 + torch.randn(5, 65, 3)  # the ranks' shares are unequal
    masks = torch.rand(5, 65) < 0.7
    masks[0] = True
    masks[2, 33:] = False  # nothing is left to the second rank
    masks[3] = False  # nor here to any
    alone = _share(0, 1, x, masks, name, update)
    first, second = run_forked(_share, x, masks, name, update)
    assert first == second
    kept = [batch[mask] for batch, mask in zip(x, masks, strict=True)]
    assert alone == _share(0, 1, kept, [torch.ones(len(batch), dtype=torch.bool) for batch in kept], name, update)
    for key, value in first.items():
        assert_close(torch.tensor(value), torch.tensor(alone[key]))
    start = make(RandomRevival).embedding.detach()
    assert (torch.tensor(first["embedding"]) - start).abs().sum() > 1, "no code has moved"


@pytest.mark.parametrize("name", REVIVALS)
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_batch_that_is_dropped_whole_changes_nothing(name, update):
    codebook = make(REVIVALS[name], update=update)
    x = clusters()
    codebook(x)
    before = {key: value.clone() for key, value in codebook.state_dict().items() if not key.endswith("steps")}
    codebook.observe(x, codebook.assign(x), torch.zeros(len(x), dtype=torch.bool))
    after = codebook.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (partial(RandomRevival, threshold=0.0), r"revival\.threshold=0"),
        (partial(RandomRevival, threshold=1.0), r"revival\.threshold=1"),
        (partial(RandomRevival, decay=1.0), r"revival\.decay=1"),
        (partial(ClusteringRevival, decay=-0.5), r"revival\.decay=-0\.5"),
    ],
)
def test_refuses_bad_settings(factory, message):
    with pytest.raises(ConfigError, match=message):
        make(factory)
