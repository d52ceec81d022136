"""FSQ: levels, mixed-radix indices, bound, neighbours."""

import itertools

import pytest
import torch

from golden_cases import assert_close
from tessera.errors import ConfigError
from tessera.quantizers import FSQCodebook

LEVELS = [[2], [3], [8, 5, 5], [4, 3, 2, 7], [2, 2, 2]]
every_levels = pytest.mark.parametrize("levels", LEVELS, ids=str)


@every_levels
def test_codes_are_all_combinations_of_levels(levels):
    codebook = FSQCodebook(levels=levels)
    codes = codebook.lookup(torch.arange(codebook.codebook_size))
    values = [[(letter - level // 2) / (level // 2) for letter in range(level)] for level in levels]
    # channel 0 changes fastest
    expected = [list(reversed(code)) for code in itertools.product(*reversed(values))]
    assert_close(codes, torch.tensor(expected))
    assert torch.equal(codebook.assign(codes), torch.arange(codebook.codebook_size))
    assert codes.abs().max() <= 1


@every_levels
def test_every_level_is_reached_and_zero_is_one(levels):
    codebook = FSQCodebook(levels=levels)
    sweep = torch.linspace(-8, 8, 4001)[:, None].expand(-1, len(levels))
    points = codebook.project(sweep)
    assert (points.diff(dim=0) >= 0).all()
    letters = (codebook.lookup(codebook.assign(points)) * torch.tensor([level // 2 for level in levels])).round()
    for d, level in enumerate(levels):
        assert letters[:, d].unique().tolist() == list(range(-(level // 2), level - level // 2))
    assert_close(codebook.project(torch.zeros(1, len(levels))), torch.zeros(1, len(levels)), atol=1e-6)


@every_levels
def test_forward_is_straight_through_the_rounding(levels):
    codebook = FSQCodebook(levels=levels)
    x = torch.randn(30, len(levels), requires_grad=True)
    out = codebook(x)
    assert out.losses == {}
    assert_close(out.vectors, codebook.lookup(out.indices))
    cotangent = torch.randn_like(x)
    (grad,) = torch.autograd.grad((out.vectors * cotangent).sum(), x)
    (expected,) = torch.autograd.grad((codebook.project(x) * cotangent).sum(), x)
    assert_close(grad, expected)
    assert (grad.abs() > 0).all()


@every_levels
def test_neighbors_equal_brute_force(levels):
    codebook = FSQCodebook(levels=levels)
    codes = codebook.lookup(torch.arange(codebook.codebook_size))
    points = codebook.project(torch.randn(40, len(levels)))
    distances = torch.cdist(points.double(), codes.double())
    assert torch.equal(codebook.assign(points), distances.argmin(1))
    for k in {1, min(9, codebook.codebook_size), codebook.codebook_size}:
        found = codebook.neighbors(points, k)
        assert_close(distances.gather(1, found), distances.sort(dim=1).values[:, :k])
        assert all(len(set(row)) == k for row in found.tolist())
    indices = codebook.assign(points)
    own = codebook.neighbors(indices, codebook.codebook_size)
    assert torch.equal(own[:, 0], indices)
    between = torch.cdist(codes, codes)[indices].gather(1, own)
    assert (between.diff(dim=1) > -1e-5).all()


def test_neighbors_step_one_level():
    codebook = FSQCodebook(levels=[5, 5])
    centre = codebook.assign(torch.zeros(1, 2))
    found = codebook.lookup(codebook.neighbors(centre, 5)[0])
    assert torch.equal(found[0], torch.zeros(2))
    assert found[1:].abs().sum(1).tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": []}, r"levels=\[\]"),
        ({"levels": [8, 1]}, r"levels=\[8, 1\]"),
        ({"dim": 4, "levels": [8, 5, 5]}, r"3 channels.*= 4.*quantizer\.dim=3"),
        ({"levels": [8] * 21}, "more than int64"),
    ],
)
def test_refuses_bad_levels(options, message):
    with pytest.raises(ConfigError, match=message):
        FSQCodebook(**options)
