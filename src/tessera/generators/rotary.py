"""Two-dimensional rotary embedding: queries and keys turned by the row and the column of their token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tessera.grids import Grid


def rotary_table(grids: Sequence[Grid], head_dim: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """Cosines and signed sines for a class token and the tokens of every grid, in their order.

    With f_j = base^(-4 j / D), j = 0 .. D / 4 - 1, pair p of the D channels of a head turns at cell (r, c) by the angle
    r f_p for p < D / 4 and c f_(p - D/4) for the others. The class token's row is zero: its query and key become zero
    vectors, so that every later query gives it the score 0.

    Args:
        grids: (height, width) of each scale; a token turns by its cell in its own grid.
        head_dim: D, a multiple of 4.
        base: of the frequencies.

    Returns:
        (2, 1 + L, D) float32, as `rotate` takes it: cosines; sines, negative in the first channel of each pair.

    Source: modules/transformer/llama.py of TencentARC/SEED-Voken, which follows LlamaGen (arXiv:2406.06525).
    """
    exponents = torch.arange(head_dim // 4, dtype=torch.float32, device=device) * (4 / head_dim)
    frequencies = base**-exponents
    cells = []
    for height, width in grids:
        place = torch.arange(height * width, device=device)
        cells.append(torch.stack([place // width, place % width], 1))
    angles = (torch.cat(cells)[:, :, None] * frequencies).flatten(1)  # (L, D / 2)
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)]).flatten(2)
    return torch.nn.functional.pad(table, (0, 0, 1, 0))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (2 p, 2 p + 1) of the last dimension; in float32, the result in x's type.

    Args:
        x: (..., D).
        rotation: rows of `rotary_table`, (2, ..., D), broadcast against x.
    """
    cos, sin = rotation
    turned = x.float()
    swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(turned * cos, swapped, sin).to(x.dtype)
