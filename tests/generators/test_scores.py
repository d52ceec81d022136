"""Loss of the heads: tiled and plain forms agree, in values, gradients and memory."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tessera.generators import scores
from tessera.generators.scores import head_losses, site_sums

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cross_entropy
from measure import peak_bytes


def problem(branches=1, size=13, rows=6, dim=5, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(branches)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).requires_grad_()  # noqa: E731
    features, weight = draw(rows, dim), draw(branches * size, dim)
    bias = draw(branches * size) if bias else None
    targets = torch.randint(0, size, (rows, branches), generator=generator)
    targets[0] = F.linear(features[0], weight, bias).view(branches, size).argmax(-1)  # some are hit
    return features, weight, bias, targets


@pytest.fixture
def tiled(monkeypatch):
    """Call `head_losses` in tiles of so many codes."""

    def call(width, features, weight, bias, targets, smoothing=0.0):
        monkeypatch.setattr(scores, "TILE_BYTES", 4 * width * len(features))
        return head_losses(features, weight, bias, targets, smoothing)

    return call


@pytest.mark.parametrize("width", [1, 5, 12])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("branches", "bias"), [(1, False), (1, True), (3, True)])
def test_tiles_give_the_plain_loss_and_gradients(tiled, branches, bias, smoothing, width):
    features, weight, bias, targets = problem(branches, bias=bias)
    inputs = [value for value in (features, weight, bias) if value is not None]
    logits = F.linear(features, weight, bias).unflatten(-1, (branches, -1))
    expected = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", label_smoothing=smoothing)
    losses, hits = tiled(width, features, weight, bias, targets, smoothing)
    torch.testing.assert_close(losses, expected)
    assert torch.equal(hits, logits.argmax(-1) == targets) and hits.any()
    upstream = torch.linspace(-1, 2, targets.numel(), dtype=torch.float64).view_as(targets)
    torch.testing.assert_close(
        torch.autograd.grad((losses * upstream).sum(), inputs), torch.autograd.grad((expected * upstream).sum(), inputs)
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck(tiled, smoothing):
    features, weight, bias, targets = problem(2, size=4, rows=3, dim=3)
    assert torch.autograd.gradcheck(lambda *inputs: tiled(3, *inputs, targets, smoothing)[0], (features, weight, bias))


def test_only_what_needs_a_gradient_gets_one(tiled):
    features, weight, bias, targets = problem()
    losses, _ = tiled(4, features.detach(), weight, bias.detach(), targets)
    losses.sum().backward()
    assert weight.grad is not None and bias.grad is None
    with torch.no_grad():
        assert not tiled(4, features, weight, bias, targets)[0].requires_grad


def test_large_logits_do_not_overflow(tiled):
    features, weight, bias, targets = problem(dtype=torch.float32)
    losses, _ = tiled(4, features * 1e3, weight * 1e3, bias, targets)
    plain, _ = head_losses_plain(features * 1e3, weight * 1e3, bias, targets)
    assert losses.isfinite().all()
    torch.testing.assert_close(losses, plain)


def head_losses_plain(*arguments):
    assert 4 * len(arguments[0]) * len(arguments[1]) > scores.TILE_BYTES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "TILE_BYTES", 2**40)
        return head_losses(*arguments)


@pytest.mark.parametrize("how", ["autocast", "module"])
def test_half_precision(tiled, how):
    """The same products in bfloat16 as the plain form; losses in float32, gradients in the inputs' types."""
    dtype = torch.bfloat16 if how == "module" else torch.float32
    results = []
    for call in (lambda *a: tiled(50, *a), head_losses_plain):
        features, weight, bias, targets = problem(2, size=130, rows=40, dim=16, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            losses, hits = call(features, weight, bias, targets)
        losses.mean().backward()
        assert losses.dtype == torch.float32 and features.grad.dtype == weight.grad.dtype == dtype
        results.append((losses, hits, features.grad, weight.grad, bias.grad))
    (losses, hits, *grads), (expected, expected_hits, *expected_grads) = results
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(hits, expected_hits)
    for actual, plain in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, plain, atol=2e-2 * plain.abs().max().item(), rtol=0)


def test_memory_does_not_grow_with_the_product(monkeypatch):
    """Forward and backward keep a few tiles beside the gradients; the plain form keeps tables of N x K."""
    rows, size = 256, 4096
    table = 4 * rows * size

    def step(budget):
        monkeypatch.setattr(scores, "TILE_BYTES", budget)
        features, weight, _, targets = problem(1, size, rows, 4, bias=False, dtype=torch.float32)
        return peak_bytes(lambda: head_losses(features, weight, None, targets)[0].sum().backward(), features.device)

    assert step(2**40) > 2 * table
    assert step(table // 16) < table // 4


def test_sums_per_site():
    losses = torch.arange(12.0).view(2, 2, 3)
    hits = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 0, 1], [1, 0, 0]]]).bool()
    sums = site_sums(losses, hits)
    assert torch.equal(sums["site_loss"], losses.sum(0)) and torch.equal(sums["site_hits"], hits.float().sum(0))
    assert torch.equal(sums["site_count"], torch.full((2, 3), 2.0)) and sums["accuracy"] == 0.5
    counted = torch.zeros_like(hits)
    counted[0, 0] = True
    some = site_sums(losses, hits, counted)
    assert torch.equal(some["site_loss"], torch.tensor([[0.0, 1, 2], [0, 0, 0]]))
    assert some["accuracy"].item() == pytest.approx(2 / 3) and some["site_count"].sum() == 3
    assert site_sums(losses, hits, torch.zeros_like(hits))["accuracy"] == 0


def test_benchmark(monkeypatch, tmp_path, capsys):
    """It runs, its sides agree, and what would not fit is left out."""
    arguments = ["--tokens", "32", "--sizes", "64", "4096", "--dim", "8", "--repeats", "1", "--tile-mib", "0.001"]
    monkeypatch.setattr(scores, "TILE_BYTES", scores.TILE_BYTES)  # restored afterwards
    monkeypatch.setattr(
        sys, "argv", ["cross_entropy.py", *arguments, "--memory", "0.001", "--json", str(tmp_path / "out.json")]
    )
    cross_entropy.main()
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [(row["size"], row["tile_bytes"]) for row in rows] == [(64, None), (64, 1048), (4096, 1048)]
    assert all(row["seconds"] > 0 and row["peak_bytes"] > 0 for row in rows)
    assert rows[1]["difference"] < 1e-5 and "plain skipped" in capsys.readouterr().out
