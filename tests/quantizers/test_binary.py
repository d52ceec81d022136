"""LFQ and BSQ: indices, codes, entropies against the naive N x K formulas, neighbours."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from golden_cases import assert_close
from tessera.errors import ConfigError
from tessera.quantizers import BSQCodebook, LFQCodebook, ProductQuantizer, SingleGridQuantizer
from tessera.quantizers.codebooks.entropy import bitwise_entropies, codewise_entropies

both = pytest.mark.parametrize("kind", [LFQCodebook, BSQCodebook])


def all_codes(codebook) -> Tensor:
    return codebook.lookup(torch.arange(codebook.codebook_size))


@both
def test_bits_are_little_endian_and_zero_counts_as_minus(kind):
    codebook = kind(bits=4)
    s = 1.0 if kind is LFQCodebook else 0.5
    x = torch.tensor([[0.3, -1.0, 0.0, 2.0], [-1.0, 5.0, -0.1, -2.0], [0.0, 0.0, 0.0, 0.0]])
    assert codebook.assign(x).tolist() == [1 + 8, 2, 0]
    assert torch.equal(codebook.lookup(torch.tensor([9, 2])), s * torch.tensor([[1.0, -1, -1, 1], [-1, 1, -1, -1]]))
    codes = all_codes(codebook)
    assert torch.equal(codebook.assign(codes), torch.arange(16))
    assert len(codes.unique(dim=0)) == 16
    assert_close(codes.norm(dim=1), torch.full((16,), 2 * s))


@both
def test_quantises_to_the_nearest_code(kind):
    codebook = kind(bits=6)
    x = torch.randn(50, 6, requires_grad=True)
    out = codebook(x)
    latents = F.normalize(x, dim=1) if kind is BSQCodebook else x
    assert torch.equal(out.indices, torch.cdist(latents, all_codes(codebook)).argmin(1))
    codes = codebook.lookup(out.indices)
    assert_close(out.vectors, codes)
    assert_close(out.losses["commitment"], (codes - latents).square().mean())
    cotangent = torch.randn(50, 6)
    (grad,) = torch.autograd.grad((out.vectors * cotangent).sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad((latents * cotangent).sum(), x)
    assert_close(grad, expected)


def naive_codewise(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: a softmax over all codes for every sample."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=logits.shape[1])), dtype=logits.dtype)
    p = (logits[mask] / 2 @ signs.t()).softmax(1)  # 2 x.c / T with the difference of the two signs being `logits`
    mean = p.mean(0)
    return -(p * p.clamp_min(1e-300).log()).sum(1).mean(), -(mean * (mean + 1e-5).log()).sum()


def naive_bitwise(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    p = logits[mask].sigmoid()

    def entropy(p: Tensor) -> Tensor:
        return -(p * (p + 1e-8).log() + (1 - p) * (1 - p + 1e-8).log())

    return entropy(p).sum(1).mean(), entropy(p.mean(0)).sum()


@pytest.mark.parametrize("bits", [1, 2, 5, 8])
@pytest.mark.parametrize(("ours", "naive"), [(bitwise_entropies, naive_bitwise), (codewise_entropies, naive_codewise)])
@pytest.mark.parametrize("masked", [False, True])
def test_entropies_equal_the_definition(bits, ours, naive, masked):
    logits = (torch.randn(40, bits, dtype=torch.float64) * 3).requires_grad_()
    mask = torch.rand(40) < 0.6 if masked else torch.ones(40, dtype=torch.bool)
    weights = torch.tensor([0.7, -1.3], dtype=torch.float64)
    expected = naive(logits, mask)
    found = ours(logits, mask if masked else None)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(weights[0] * a + weights[1] * b, logits)[0] for a, b in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-12)
    assert found[0] > 0.1


@pytest.mark.parametrize("entropies", [bitwise_entropies, codewise_entropies])
def test_entropies_of_saturated_or_missing_samples_are_finite(entropies):
    for logits, mask in ((torch.full((3, 5), 1e4), None), (torch.randn(3, 5), torch.zeros(3, dtype=torch.bool))):
        logits = logits.clone().requires_grad_()
        values = entropies(logits, mask)
        (grad,) = torch.autograd.grad(sum(values), logits)
        assert all(torch.isfinite(value) for value in values) and torch.isfinite(grad).all()
        assert values[0].item() == pytest.approx(0, abs=1e-5)


@both
@pytest.mark.parametrize(("mode", "temperature"), [("soft", None), ("soft", 0.2), ("hard", None), ("hard", 0.5)])
def test_penalties_are_of_the_softmax_over_codes(kind, mode, temperature):
    codebook = kind(bits=5, entropy=mode, temperature=temperature)
    x, gain = torch.randn(30, 5), 0.7
    scale = {"soft": 1.0, "hard": 0.01}[mode] if temperature is None else temperature
    found = codebook.penalties(x, None, gain)
    codes = gain * all_codes(codebook).double()
    p = (2 * x.double() @ codes.t() / scale).softmax(1)
    if mode == "soft":  # marginals of the bits
        bits = p @ (codes > 0).double()
        entropy = lambda p: -(p.xlogy(p) + (1 - p).xlogy(1 - p))  # noqa: E731
        expected = entropy(bits).sum(1).mean(), entropy(bits.mean(0)).sum()
    else:
        expected = -p.xlogy(p).sum(1).mean(), -(p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
    assert_close(found["entropy_sample"], expected[0], atol=1e-4)
    assert_close(found["entropy_batch"], -expected[1], atol=1e-4)
    latents = codebook.project(x)
    assert_close(codebook(x).losses["entropy_sample"], codebook.penalties(latents)["entropy_sample"])


def test_entropy_terms_do_what_their_weights_ask_for():
    """Small entropy_sample: sure of each; small entropy_batch: all codes used."""
    codebook = LFQCodebook(bits=3)
    sure, unsure = torch.tensor([[9.0, 9, 9]]).expand(8, 3), torch.zeros(8, 3)
    spread = 9 * codebook.lookup(torch.arange(8))
    assert codebook.penalties(sure)["entropy_sample"] < codebook.penalties(unsure)["entropy_sample"]
    assert codebook.penalties(spread)["entropy_batch"] < codebook.penalties(sure)["entropy_batch"]
    assert LFQCodebook(bits=3, entropy="none").penalties(sure) == {}


def test_soft_entropy_costs_the_same_for_any_codebook():
    """No tensor grows with K, also at 2^40 codes, and the hard one never sees N x K."""

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor):
                    Watch.largest = max(Watch.largest, value.numel())
            return out

    for bits, mode, bound in ((40, "soft", 300 * 40), (12, "hard", max(2**12, 300 * 2**6))):
        x = torch.randn(300, bits, requires_grad=True)
        Watch.largest = 0
        with Watch():
            sum(BSQCodebook(bits=bits, entropy=mode)(x).losses.values()).backward()
        assert Watch.largest <= bound


@both
def test_neighbors_equal_brute_force(kind):
    codebook = kind(bits=6)
    x = codebook.project(torch.randn(30, 6))
    distances = torch.cdist(x.double(), all_codes(codebook).double())
    for k in (1, 7, 64):
        found = codebook.neighbors(x, k)
        assert torch.equal(found, distances.argsort(dim=1)[:, :k])
    assert torch.equal(codebook.neighbors(x, 1)[:, 0], codebook.assign(x))


@both
def test_neighbors_of_codes_are_ordered_by_hamming_distance(kind):
    codebook = kind(bits=5)
    indices = torch.randint(32, (20,))
    found = codebook.neighbors(indices, 32)
    assert torch.equal(found[:, 0], indices)
    flips = found ^ indices[:, None]
    hamming = sum((flips >> d) & 1 for d in range(5))
    assert (hamming.diff(dim=1) >= 0).all()
    assert torch.equal(found.sort(dim=1).values, torch.arange(32).expand(20, 32))


def test_zero_latents_are_their_own_first_neighbour():
    codebook = LFQCodebook(bits=4)
    x = torch.zeros(2, 4)
    found = codebook.neighbors(x, 16)
    assert torch.equal(found[:, 0], codebook.assign(x))
    assert torch.equal(found.sort(dim=1).values, torch.arange(16).expand(2, 16))


def test_neighbors_of_a_large_codebook():
    """2^40 codes: the nearest is the assigned one, the next flips the channel closest to 0."""
    codebook = BSQCodebook(bits=40)
    x = torch.randn(6, 40)
    found = codebook.neighbors(x, 50)
    indices = codebook.assign(x)
    assert torch.equal(found[:, 0], indices)
    assert torch.equal(found[:, 1] ^ indices, 1 << x.abs().argmin(1))
    cost = [(x.abs() * (((found[:, k] ^ indices)[:, None] >> torch.arange(40)) & 1)).sum(1) for k in range(50)]
    assert (torch.stack(cost).diff(dim=0) >= -1e-6).all()


@both
def test_bits_must_be_the_channels(kind):
    assert kind(8, bits=8).dim == kind(None, bits=8).dim == 8
    message = r"quantizer\.branch\.codebook\.bits=12 .*quantizer\.dim / quantizer\.branches = 8.*quantizer\.dim=12"
    with pytest.raises(ConfigError, match=message):
        kind(8, bits=12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 63}, "bits=63"),
        ({"bits": 4, "entropy": "analytic"}, "entropy='analytic'"),
        ({"bits": 25, "entropy": "hard"}, "entropy=hard"),
        ({"bits": 4, "temperature": 0.0}, "temperature=0"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        BSQCodebook(**options)


def test_product_without_dim_takes_the_bits():
    quantizer = ProductQuantizer(lambda dim: SingleGridQuantizer(dim, lambda dim: BSQCodebook(dim, 7)), 3, None)
    assert quantizer.dim == 21 and quantizer.codebook_size == 128
