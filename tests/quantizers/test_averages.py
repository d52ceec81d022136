"""Codes as moving averages: formula, ranks, gradients."""

import pytest
import torch
import torch.nn.functional as F

from forked import run_forked
from golden_cases import assert_close
from tessera.errors import ConfigError
from tessera.quantizers import VQCodebook


def make(**options) -> VQCodebook:
    torch.manual_seed(0)
    return VQCodebook(**{"dim": 3, "codebook_size": 7, "l2_normalize": False, "update": "ema", **options})


@pytest.mark.parametrize("l2_normalize", [True, False])
def test_formula(l2_normalize):
    codebook = make(l2_normalize=l2_normalize, ema_decay=0.8)
    counts, sums = torch.ones(7), codebook.embedding.detach().clone()
    for _ in range(3):
        x = torch.randn(20, 3)
        indices = codebook(x).indices
        points = F.normalize(x, dim=1) if l2_normalize else x
        for k in range(7):
            counts[k] = 0.8 * counts[k] + 0.2 * (indices == k).sum()
            sums[k] = 0.8 * sums[k] + 0.2 * points[indices == k].sum(0)
        smooth = (counts + 1e-5) / (counts.sum() + 7e-5) * counts.sum()
        assert_close(codebook.embedding, sums / smooth[:, None])


def test_codes_move_to_the_means_of_their_clusters():
    codebook = make(ema_decay=0.5)
    with torch.no_grad():
        codebook.embedding[:2] = torch.tensor([[4.0, 0, 0], [-4.0, 0, 0]])
    x = torch.cat([torch.randn(50, 3) * 0.1 + torch.tensor([[3.0, 1, 0]]), torch.randn(50, 3) * 0.1 - 3])
    for _ in range(30):
        indices = codebook(x).indices
    assert len(indices.unique()) >= 2
    for k in indices.unique():
        assert_close(codebook.embedding[k], x[indices == k].mean(0), atol=1e-4)


def test_only_training_moves_codes_and_no_gradient_does():
    codebook = make()
    x, before = torch.randn(20, 3, requires_grad=True), codebook.embedding.clone()
    assert "codebook" not in codebook.eval()(x).losses
    assert torch.equal(codebook.embedding, before)
    out = codebook.train()(x)
    assert not torch.equal(codebook.embedding, before)
    (out.losses["commitment"] + out.vectors.sum()).backward()
    assert codebook.embedding.grad is None and x.grad.abs().sum() > 0
    assert not codebook.embedding.requires_grad


def _share(rank, world, x):
    codebook = make().train()
    for batch in x:
        codebook(batch.chunk(world)[rank])
    return codebook.embedding.tolist(), codebook.averages.counts.tolist()


def test_ranks_together_equal_the_joint_batch():
    x = torch.randn(4, 24, 3)
    alone = _share(0, 1, x)
    first, second = run_forked(_share, x)
    assert first == second
    for found, expected in zip(first, alone, strict=True):
        assert_close(torch.tensor(found), torch.tensor(expected))


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_refuses_bad_decay(decay):
    with pytest.raises(ConfigError, match="ema_decay"):
        make(ema_decay=decay)
