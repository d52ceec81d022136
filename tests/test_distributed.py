import pytest
import torch

from forked import run_forked
from tessera import distributed
from tessera.distributed import all_gather_with_grad


def joint_loss(rows):
    return (rows @ rows.T).tril().square().sum()


def _gathered(rank, world):
    rows = torch.arange(12.0).view(4, 3)[2 * rank : 2 * rank + 2].requires_grad_()
    everything = all_gather_with_grad(rows)
    joint_loss(everything).backward()
    return everything.tolist(), rows.grad.tolist()


def test_gathered_rows_carry_the_gradient_of_all_processes():
    rows = torch.arange(12.0).view(4, 3).requires_grad_()
    joint_loss(all_gather_with_grad(rows)).backward()
    (first, grad0), (second, grad1) = run_forked(_gathered)
    assert first == second == rows.tolist()
    # each process computes the same loss, so that its part gets twice the gradient, which the mean over two undoes
    torch.testing.assert_close(torch.tensor(grad0 + grad1) / 2, rows.grad)


@pytest.mark.parametrize(("count", "world"), [(10, 3), (2, 4), (50_000, 7)])
def test_shares_hold_every_sample_once(monkeypatch, count, world):
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts += distributed.share(count)
    assert parts == list(range(count))
