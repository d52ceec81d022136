"""Grids of latents: (height, width) in cells."""

from collections.abc import Sequence

from tessera.errors import ConfigError

Grid = tuple[int, int]


def as_grid(grid: int | Sequence[int], key: str) -> Grid:
    """(height, width) from a pair or from one number for a square; `key` names the config value in errors."""
    pair = (grid, grid) if isinstance(grid, int) else tuple(int(side) for side in grid)
    if len(pair) != 2 or min(pair) < 1:
        raise ConfigError(f"{key}={grid!r} is no grid; give (height, width), both at least 1, or one number")
    return pair
