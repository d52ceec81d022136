"""Rotary embedding in two dimensions: angles by cell, turns of pairs, the class's zero row."""

import pytest
import torch

from tessera.generators.rotary import rotary_table, rotate

GRIDS = [(1, 1), (2, 3), (3, 2)]


def angles(head_dim, base):
    """(L, D / 2) float64, cell by cell."""
    rows = []
    for height, width in GRIDS:
        for cell in range(height * width):
            row, column = divmod(cell, width)
            frequencies = [base ** (-4 * j / head_dim) for j in range(head_dim // 4)]
            rows.append([row * f for f in frequencies] + [column * f for f in frequencies])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(("head_dim", "base"), [(4, 10000.0), (16, 100.0)])
def test_table(head_dim, base):
    table = rotary_table(GRIDS, head_dim, base)
    assert table.shape == (2, 1 + 13, head_dim) and table.dtype == torch.float32
    assert not table[:, 0].any()  # the class
    expected = angles(head_dim, base)
    cos, sin = table[:, 1:].double().unflatten(-1, (-1, 2)).unbind(0)
    torch.testing.assert_close(cos, expected.cos()[..., None].expand_as(cos), atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[..., 1], expected.sin(), atol=1e-6, rtol=0)
    assert torch.equal(sin[..., 0], -sin[..., 1])


def test_rotation_is_a_complex_product():
    x = torch.randn(3, 14, 8)
    turned = rotate(x, rotary_table(GRIDS, 8, 50.0))
    assert not turned[:, 0].any()
    factors = torch.polar(torch.ones(13, 4, dtype=torch.float64), angles(8, 50.0))
    expected = torch.view_as_real(torch.view_as_complex(x[:, 1:].double().unflatten(-1, (4, 2))) * factors).flatten(-2)
    torch.testing.assert_close(turned[:, 1:].double(), expected, atol=1e-5, rtol=1e-5)


def test_scores_depend_on_the_offset_alone():
    """Two queries and keys a cell apart have the score of any others so far apart."""
    q, k = torch.randn(2, 8)
    table = rotary_table([(4, 5)], 8, 100.0)[:, 1:]
    score = (rotate(q, table) @ rotate(k, table).T).view(4, 5, 4, 5)
    torch.testing.assert_close(score[0, 0, 2, 1], score[1, 3, 3, 4])
    torch.testing.assert_close(score[3, 1, 1, 0], score[2, 4, 0, 3])
    assert (score[0, 0, 0, 1] - score[0, 0, 1, 0]).abs() > 1e-3


def test_half_precision_is_turned_in_float32():
    x = torch.randn(2, 14, 8)
    table = rotary_table(GRIDS, 8, 50.0)
    turned = rotate(x.bfloat16(), table)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.bfloat16().float(), table).bfloat16())
