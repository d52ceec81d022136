"""Index backpropagation in tiles against the formula written out on N x K tables."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from forked import run_forked
from tessera.quantizers import ibq_attention
from tessera.quantizers.ibq_attention import Tiling, index_backpropagation

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from measure import peak_bytes


def naive(x, codes, temperature, rows=None):
    """vectors, codes, indices, entropies as published; `rows` of x count in the mean assignment, None: all."""
    logits = x @ codes.t()
    soft, indices = logits.softmax(1), logits.argmax(1)
    hard = F.one_hot(indices, len(codes)).to(x.dtype)
    log_p = (logits / temperature).log_softmax(1)
    p = log_p.exp()
    mean = p.mean(0)
    entropies = -(p * log_p).sum(1).mean(), (mean * (mean + 1e-5).log()).sum()
    return (hard - soft.detach() + soft) @ codes, hard @ codes, indices, *entropies


def inputs(n, k, d, dtype=torch.float64, spread=0.3):
    x, codes, g, h = torch.randn(n, d), torch.randn(k, d), torch.randn(n, d), torch.randn(n, d)
    return (x * spread).to(dtype).requires_grad_(), codes.to(dtype).requires_grad_(), g.to(dtype), h.to(dtype)


SIZES = [
    # N, K, D, codes per tile, temperature: nothing divides anything; one code; one latent; one tile; many row blocks
    (37, 101, 8, 7, 0.01),
    (300, 1000, 16, 64, 0.01),
    (300, 1000, 16, 1000, 0.5),
    (5, 1, 3, 4, 0.01),
    (1, 9, 3, 4096, 2.0),
    (130, 5000, 4, 777, 0.05),
]


@pytest.fixture
def small_blocks(monkeypatch):
    """Several row blocks and code tiles at test sizes."""
    monkeypatch.setattr(ibq_attention, "_BLOCK_SCORES", {"cpu": 1})
    monkeypatch.setattr(ibq_attention, "_LEAST_ROWS", 17)
    monkeypatch.setattr(ibq_attention, "_LEAST_CODES", 1)


@pytest.fixture
def accelerator_tiles(monkeypatch):
    """The tiles a GPU gets: all codes at once, in blocks of rows."""
    plan = Tiling.plan
    monkeypatch.setattr(
        Tiling, "plan", lambda count, size, chunk, device: plan(count, size, chunk, torch.device("cuda"))
    )
    monkeypatch.setattr(ibq_attention, "_BLOCK_SCORES_ACCELERATOR", 1 << 13)
    monkeypatch.setattr(ibq_attention, "_LEAST_ROWS", 5)


@pytest.mark.parametrize("blocks", ["default", "small_blocks", "accelerator_tiles"])
@pytest.mark.parametrize(("n", "k", "d", "chunk", "temperature"), SIZES)
@pytest.mark.parametrize("part", ["vectors", "codes", "sample", "batch", "all"])
def test_values_and_gradients_are_exact(request, blocks, n, k, d, chunk, temperature, part):
    if blocks != "default":
        request.getfixturevalue(blocks)
    x, codes, g, h = inputs(n, k, d)
    weights = {"vectors": (1, 0, 0, 0), "codes": (0, 1, 0, 0), "sample": (0, 0, 3, 0), "batch": (0, 0, 0, 7)}
    a, b, c, e = weights.get(part, (1, 1, 3, 7))

    def gradients(vectors, chosen, _, sample, batch):
        terms = [(a, (vectors * g).sum()), (b, (chosen * h).sum()), (c, sample), (e, batch)]
        total = sum(weight * term for weight, term in terms if weight)  # the others get no gradient at all
        return torch.autograd.grad(total, (x, codes), allow_unused=True, materialize_grads=True)

    expected = naive(x, codes, temperature)
    found = index_backpropagation(x, codes, chunk, temperature)
    assert torch.equal(found.indices, expected[2])
    torch.testing.assert_close(found.vectors, codes[expected[2]], rtol=0, atol=0)
    values = (found.sample_entropy, found.batch_entropy)
    torch.testing.assert_close(values, expected[3:], rtol=1e-12, atol=1e-12)
    ours = gradients(found.vectors, found.codes, None, *values)
    torch.testing.assert_close(ours, gradients(*expected), rtol=1e-11, atol=1e-12)


def test_without_entropy_terms(small_blocks):
    x, codes, g, _ = inputs(50, 90, 5)
    found = index_backpropagation(x, codes, 16)
    assert found.sample_entropy is None and found.batch_entropy is None
    expected = torch.autograd.grad((naive(x, codes, 1.0)[0] * g).sum(), (x, codes))
    torch.testing.assert_close(torch.autograd.grad((found.vectors * g).sum(), (x, codes)), expected)


def test_float32_agrees_to_its_precision(small_blocks):
    x, codes, g, h = inputs(200, 700, 32, torch.float32)
    results = []
    for dtype in (torch.float32, torch.float64):
        a, b = x.detach().to(dtype).requires_grad_(), codes.detach().to(dtype).requires_grad_()
        out = index_backpropagation(a, b, 64, 0.01) if dtype == torch.float32 else naive(a, b, 0.01)
        vectors, chosen, _, sample, batch = vars(out).values() if dtype == torch.float32 else out
        total = (vectors * g).sum() + (chosen * h).sum() + sample + batch
        results.append([t.double() for t in (sample.detach(), batch.detach(), *torch.autograd.grad(total, (a, b)))])
    for ours, exact in zip(*results, strict=True):
        assert float((ours - exact).abs().max() / exact.abs().max()) < 2e-5


def test_saturated_scores_stay_finite():
    """Scores in the thousands (half precision overflows at 655) and probabilities that underflow."""
    x, codes, g, _ = inputs(40, 60, 16, torch.float32, spread=300.0)
    out = index_backpropagation(x, codes, 16, 0.01)
    total = (out.vectors * g).sum() + out.sample_entropy + out.batch_entropy
    grad_x, grad_codes = torch.autograd.grad(total, (x, codes))
    assert torch.isfinite(grad_x).all() and torch.isfinite(grad_codes).all()
    assert float(out.sample_entropy.detach()) < 1e-3


def test_ties_go_to_the_lowest_index(small_blocks):
    codes = torch.randn(5, 4).mul(8).round().repeat(20, 1)  # whole numbers: equal products in tiles of any width
    found = index_backpropagation(torch.randn(60, 4).mul(8).round(), codes, 3)
    assert int(found.indices.max()) < 5


def test_only_needed_gradients():
    x, codes, g, _ = inputs(20, 30, 4)
    both = torch.autograd.grad((index_backpropagation(x, codes, 8, 0.1).vectors * g).sum(), (x, codes))
    frozen = index_backpropagation(x, codes.detach(), 8, 0.1)
    assert torch.equal(torch.autograd.grad((frozen.vectors * g).sum(), x)[0], both[0])
    fixed = index_backpropagation(x.detach(), codes, 8, 0.1)
    assert torch.equal(torch.autograd.grad((fixed.vectors * g).sum(), codes)[0], both[1])
    with torch.no_grad():
        assert not index_backpropagation(x, codes, 8, 0.1).sample_entropy.requires_grad


def test_backward_under_autocast_is_in_float32():
    x, codes, g, _ = inputs(30, 50, 8, torch.float32)

    def gradients():
        out = index_backpropagation(x, codes, 16, 0.01)
        return torch.autograd.grad((out.vectors * g).sum() + out.sample_entropy + out.batch_entropy, (x, codes))

    expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


def test_tiles_cover_everything_once():
    for count, size, chunk in ((1, 1, 1), (1000, 7, 3), (129, 300_000, 4096)):
        tiling = Tiling.plan(count, size, chunk, torch.device("cpu"))
        rows = torch.cat([torch.arange(count)[rows] for rows in tiling.row_blocks()])
        codes = torch.cat([torch.arange(size)[part] for _, part in tiling.code_tiles()])
        assert torch.equal(rows, torch.arange(count)) and torch.equal(codes, torch.arange(size))
        assert tiling.tiles == len(list(tiling.code_tiles()))


def test_memory_stays_below_one_table():
    """N = 2048, K = 16384: the way back adds less than one N x K table to the gradients it returns."""
    n, k, d = 2048, 16384, 8
    x, codes, g, _ = inputs(n, k, d, torch.float32)

    def step():
        out = index_backpropagation(x, codes, 4096, 0.01)
        torch.autograd.grad((out.vectors * g).sum() + out.sample_entropy + out.batch_entropy, (x, codes))

    table = 4 * n * k
    assert peak_bytes(step, torch.device("cpu")) < table / 2


def _shares(rank, world):
    torch.manual_seed(0)
    x, codes, *_ = inputs(23, 31, 6)
    bounds = (0, 23) if world == 1 else ((0, 14), (14, 23))[rank]
    part = slice(*bounds)
    own = x.detach()[part].requires_grad_()
    out = index_backpropagation(own, codes, 8, 0.05, "global")
    grad_x, grad_codes = torch.autograd.grad(out.batch_entropy, (own, codes))
    return out.batch_entropy.item(), grad_x.tolist(), grad_codes.tolist()


def test_two_processes_share_the_batch_entropy():
    """The mean of the processes' gradients is that of the joint batch, with uneven shares too."""
    value, grad_x, grad_codes = _shares(0, 1)
    answers = run_forked(_shares)
    for answer in answers:
        assert answer[0] == pytest.approx(value, abs=1e-12)
    shares = torch.tensor(answers[0][1] + answers[1][1], dtype=torch.float64)
    torch.testing.assert_close(shares / 2, torch.tensor(grad_x, dtype=torch.float64))
    mean = (torch.tensor(answers[0][2]) + torch.tensor(answers[1][2])) / 2
    torch.testing.assert_close(mean.double(), torch.tensor(grad_codes).double())
