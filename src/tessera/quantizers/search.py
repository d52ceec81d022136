"""Exact nearest-code search in tiles: memory O(N) plus one tile, never an N x K table.

Minimising |x - e|^2 over codes e is maximising x.e - |e|^2/2, because |x|^2 is the same for all codes. For
unit vectors |e|^2 is constant too and the product alone decides. The scores of one (rows x codes) tile are
reduced while they are still in cache. Everything runs in float32 with autocast off: bfloat16 products change
up to 1 % of the codes.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Metric = Literal["euclidean", "dot", "cosine"]

DEFAULT_CHUNK_SIZE = 4096
# Scores per tile. The CPU figure keeps a tile in the cache of one core (measured: 2^17 to 2^18 is fastest); a
# GPU needs large tiles to fill its multiprocessors (2^25 scores are 128 MiB).
_TILE_SCORES = {"cpu": 1 << 18}
_TILE_SCORES_ACCELERATOR = 1 << 25
# Most codes in a tile on a CPU: 128 rows beside them make the products fastest
_TILE_CODES_CPU = 2048
# Codes whose maximum is taken before positions matter
_GROUP = 64


def _check(x: Tensor, codebook: Tensor, chunk_size: int, metric: str) -> None:
    if x.ndim != 2 or codebook.ndim != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"nearest-code search needs x (N, D) and codebook (K, D) of equal D; got {tuple(x.shape)} and "
            f"{tuple(codebook.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if metric not in ("euclidean", "dot", "cosine"):
        raise ValueError(f"metric={metric!r} is unknown; choose euclidean, dot or cosine")


def _tile_rows(x: Tensor, codes_per_tile: int) -> int:
    return max(1, min(x.shape[0], _TILE_SCORES.get(x.device.type, _TILE_SCORES_ACCELERATOR) // codes_per_tile))


def _row_tiles(x: Tensor, codes_per_tile: int) -> Iterator[slice]:
    rows = _tile_rows(x, codes_per_tile)
    for start in range(0, x.shape[0], rows):
        yield slice(start, start + rows)


def _scores(x: Tensor, codes: Tensor, offset: Tensor | None, out: Tensor | None = None) -> Tensor:
    """(rows, codes) similarity, larger is nearer."""
    return torch.mm(x, codes.t(), out=out) if offset is None else torch.addmm(offset, x, codes.t(), out=out)


def _tile(codes: Tensor, metric: Metric) -> tuple[Tensor, Tensor | None]:
    """Codes in float32 as they are multiplied, and what is added to the products; O(codes D)."""
    codes = codes.float()
    if metric == "cosine":
        return F.normalize(codes, dim=1), None
    # recomputed rather than cached, so it can't go stale: negligible beside the search
    return codes, codes.square().sum(1).mul_(-0.5) if metric == "euclidean" else None


def _prepare(x: Tensor, codebook: Tensor, metric: Metric) -> tuple[Tensor, Tensor, Tensor | None]:
    return x.detach().float(), *_tile(codebook.detach(), metric)


def nearest_codes(
    x: Tensor, codebook: Tensor, chunk_size: int = DEFAULT_CHUNK_SIZE, metric: Metric = "euclidean"
) -> Tensor:
    """Index of the nearest code of each vector.

    Args:
        x: (N, D) float of any precision; compared in float32.
        codebook: (K, D) float.
        chunk_size: codes per tile; changes speed and memory, but no result (distances closer than float32
            resolves aside).
        metric: "euclidean", "dot" (largest product; for unit vectors the same codes, one pass less), or "cosine" (codes
            are divided by their norms, tile by tile, without a copy of the codebook).

    Returns:
        (N,) int64 in [0, K). Ties go to the lowest index.

    Raises:
        ValueError: shapes do not fit, chunk_size < 1, unknown metric.
    """
    _check(x, codebook, chunk_size, metric)
    count, size, on_cpu = x.shape[0], codebook.shape[0], x.device.type == "cpu"
    width = min(chunk_size, size, _TILE_CODES_CPU) if on_cpu else min(chunk_size, size)
    nearest = torch.zeros(count, dtype=torch.int64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        x, codebook = x.detach().float(), codebook.detach()
        best = x.new_full((count,), -torch.inf)
        scratch = x.new_empty(_tile_rows(x, width), width)
        # each code is read, converted and measured once, while the latents come round again: they are the smaller side
        for start in range(0, size, width):
            codes, offset = _tile(codebook[start : start + width], metric)
            for rows in _row_tiles(x, width):
                scores = scratch[: min(len(scratch), count - rows.start), : len(codes)]
                _scores(x[rows], codes, offset, out=scores)
                if on_cpu:
                    _improve_where_better(scores, start, best[rows], nearest[rows])
                else:
                    value, position = scores.max(dim=1)  # the first of equal maxima
                    # strictly better only, so that a tie stays with the earlier chunk
                    nearest[rows] = torch.where(value > best[rows], position + start, nearest[rows])
                    best[rows] = torch.maximum(value, best[rows])
    return nearest


def _improve_where_better(scores: Tensor, start: int, best: Tensor, nearest: Tensor) -> None:
    """Update running maxima and their indices by the scores (rows, codes) of the codes from `start` on.

    A maximum with its position costs six times the maximum alone on a CPU. Positions are therefore looked up in groups
    of codes, of which the maximum is known, and only in rows that got better: with many tiles, few.
    """
    grouped = scores.shape[1] % _GROUP == 0 and scores.shape[1] > _GROUP
    groups = scores.unflatten(1, (-1, _GROUP)) if grouped else scores.unsqueeze(2)
    value, group = (groups.amax(2) if grouped else scores).max(dim=1)  # the first of equal maxima
    better = (value > best).nonzero().squeeze(1)  # strictly, so that a tie stays with the earlier codes
    if len(better) == 0:
        return
    group = group[better]
    within = groups[better, group].argmax(1)
    best[better] = value[better]
    nearest[better] = group * groups.shape[2] + within + start


def _top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`k` largest per row, descending; ties by lowest position, which `torch.topk` leaves open."""
    values, positions = scores.topk(min(k + 1, scores.shape[1]), dim=1)  # one more shows a tie across the cut
    tied = (values[:, 1:] == values[:, :-1]).any(1)
    values, positions = values[:, :k], positions[:, :k]
    if bool(tied.any()):
        ordered = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], positions[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, positions


def nearest_k(
    x: Tensor, codebook: Tensor, k: int, chunk_size: int = DEFAULT_CHUNK_SIZE, metric: Metric = "euclidean"
) -> Tensor:
    """Indices of the k nearest codes of each vector, nearest first.

    Args:
        x: (N, D) float of any precision; compared in float32.
        codebook: (K, D) float.
        k: neighbours per vector, 1 <= k <= K.
        chunk_size: codes per tile; changes speed and memory, but no result (distances closer than float32
            resolves aside).
        metric: as in `nearest_codes`.

    Returns:
        (N, k) int64 in [0, K), distinct within a row. Ties go to the lowest index first.

    Raises:
        ValueError: k outside [1, K], shapes do not fit, chunk_size < 1, unknown metric.
    """
    _check(x, codebook, chunk_size, metric)
    size = codebook.shape[0]
    if not 1 <= k <= size:
        raise ValueError(f"k={k} neighbours asked of a codebook of {size} codes; k must lie in [1, {size}]")
    nearest = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        x, codebook, offset = _prepare(x, codebook, metric)
        for rows in _row_tiles(x, max(min(chunk_size, size), 2 * k)):
            best = index = None
            for start in range(0, size, chunk_size):
                codes = slice(start, start + chunk_size)
                scores = _scores(x[rows], codebook[codes], None if offset is None else offset[codes])
                value, position = _top_k(scores, min(k, scores.shape[1]))
                position = position + start
                if best is not None:  # earlier chunks first: position order is index order among ties
                    candidates, owners = torch.cat([best, value], 1), torch.cat([index, position], 1)
                    value, chosen = _top_k(candidates, min(k, candidates.shape[1]))
                    position = owners.gather(1, chosen)
                best, index = value, position
            nearest[rows] = index
    return nearest
