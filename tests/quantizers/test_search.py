"""Nearest-code search against brute force."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.quantizers import search
from tessera.quantizers.search import nearest_codes, nearest_k


def brute_force(x: Tensor, codebook: Tensor) -> Tensor:
    """(N, K) squared distances in float64, the definition."""
    return (x.double()[:, None] - codebook.double()[None]).square().sum(-1)


def vectors(n: int, k: int, d: int, normalized: bool) -> tuple[Tensor, Tensor]:
    x, codebook = torch.randn(n, d), torch.randn(k, d)
    return (F.normalize(x, dim=1), F.normalize(codebook, dim=1)) if normalized else (x, codebook)


@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (1, 7, 3), (33, 1, 4), (50, 37, 5), (300, 129, 16)])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 5, 64, 4096])
def test_equals_brute_force_for_any_chunk_size(n, k, d, normalized, chunk_size):
    x, codebook = vectors(n, k, d, normalized)
    metric = "dot" if normalized else "euclidean"
    distances = brute_force(x, codebook)
    assert torch.equal(nearest_codes(x, codebook, chunk_size, metric), distances.argmin(1))
    neighbors = min(k, 6)
    found = nearest_k(x, codebook, neighbors, chunk_size, metric)
    assert torch.equal(found, distances.argsort(dim=1, stable=True)[:, :neighbors])


@pytest.mark.parametrize("size", [64, 65, 128, 200, 5000])
def test_positions_are_found_in_groups_of_codes(size):
    """Whole and broken groups, equal codes in one group and in others, maxima at every place."""
    codebook = torch.randn(size, 5).mul(16).round()
    codebook[size // 2] = codebook[size // 3]
    codebook[-1] = codebook[0]
    x = codebook[torch.randperm(size)] + 0.0
    expected = brute_force(x, codebook).argmin(1)
    assert torch.equal(nearest_codes(x, codebook), expected)
    assert torch.equal(nearest_codes(x, codebook, 64), expected)
    assert torch.equal(nearest_codes(x, codebook, 192), expected)


def test_cosine_is_the_product_with_unit_codes():
    x, codebook = vectors(300, 700, 6, False)
    codebook *= torch.rand(700, 1) * 10
    expected = F.cosine_similarity(x[:, None], codebook[None], dim=2).argsort(1, descending=True)
    assert torch.equal(nearest_codes(x, codebook, 100, "cosine"), expected[:, 0])
    assert torch.equal(nearest_k(x, codebook, 3, 100, "cosine"), expected[:, :3])


@pytest.mark.parametrize("k", [4, 11])
def test_tiles_of_rows_and_codes_do_not_change_the_result(monkeypatch, k):
    x, codebook = vectors(101, 53, 4, False)
    whole = nearest_codes(x, codebook), nearest_k(x, codebook, k)
    monkeypatch.setitem(search._TILE_SCORES, "cpu", 64)
    assert torch.equal(nearest_codes(x, codebook, 10), whole[0])
    assert torch.equal(nearest_k(x, codebook, k, 10), whole[1])


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 4096])
@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_ties_go_to_the_lowest_index(chunk_size, metric):
    codebook = torch.eye(4)[[3, 1, 0, 1, 0, 0, 3, 1]]  # equal codes: {0, 6}, {1, 3, 7}, {2, 4, 5}
    x = torch.eye(4)[[0, 1, 3]]
    assert nearest_codes(x, codebook, chunk_size, metric).tolist() == [2, 1, 0]
    found = nearest_k(x, codebook, 4, chunk_size, metric)
    # the equal codes first, then the lowest of the others, which are all equally far
    assert found.tolist() == [[2, 4, 5, 0], [1, 3, 7, 0], [0, 6, 1, 2]]


def test_distances_are_not_computed_in_the_autocast_or_input_precision():
    x, codebook = vectors(400, 512, 16, True)
    expected = brute_force(x, codebook).argmin(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(x, codebook, metric="dot"), expected)
        assert torch.equal(nearest_k(x, codebook, 1, metric="dot")[:, 0], expected)
        low = (x @ codebook.t()).argmax(1)
    assert not torch.equal(low, expected), "the control has lost its meaning: bfloat16 changes no code here"
    rounded = x.bfloat16()
    assert torch.equal(nearest_codes(rounded, codebook), brute_force(rounded.float(), codebook).argmin(1))


def test_never_holds_a_table_of_all_pairs():
    n, k = 4096, 2048
    x, codebook = vectors(n, k, 4, False)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, Tensor):
                    largest = max(largest, value.numel())
            return out

    with Watch():
        nearest_codes(x, codebook)
        nearest_k(x, codebook, 8)
    assert largest <= max(search._TILE_SCORES["cpu"], 8 * n)
    assert largest < n * k / 16


def test_empty_batch():
    codebook = torch.randn(5, 3)
    assert nearest_codes(torch.zeros(0, 3), codebook).shape == (0,)
    assert nearest_k(torch.zeros(0, 3), codebook, 2).shape == (0, 2)


def test_gradient_does_not_enter():
    x, codebook = (value.requires_grad_() for value in vectors(6, 5, 3, False))
    assert not nearest_codes(x, codebook).requires_grad
    assert not nearest_k(x, codebook, 2).requires_grad


def test_refuses_impossible_arguments():
    x, codebook = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"k=6.*5 codes"):
        nearest_k(x, codebook, 6)
    with pytest.raises(ValueError, match="k=0"):
        nearest_k(x, codebook, 0)
    with pytest.raises(ValueError, match="chunk_size=0"):
        nearest_codes(x, codebook, 0)
    with pytest.raises(ValueError, match=r"\(4, 2\).*\(5, 3\)"):
        nearest_codes(x[:, :2], codebook)
    with pytest.raises(ValueError, match="hamming"):
        nearest_codes(x, codebook, metric="hamming")
