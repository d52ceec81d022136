"""Improved precision and recall: shares of points that lie in the other set's manifold."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tessera.errors import ConfigError, DataError
from tessera.metrics.sums import FeatureSets

BLOCK = 4096
# squared distances below this share of the norms are rounding: the points are the same
SAME = 1e-12


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, d) and (M, d) features -> (N, M) float64 squared Euclidean distances, exactly 0 for equal points."""
    x, y = x.double(), y.double()
    norms = x.square().sum(1)[:, None] + y.square().sum(1)[None, :]
    distances = torch.addmm(norms, x, y.T, alpha=-2)
    return distances.masked_fill_(distances <= SAME * norms, 0)


def neighbour_radii(features: Tensor, k: Sequence[int] = (3,), block: int = BLOCK) -> Tensor:
    """Squared distance of each point to its k-th neighbour inside its own set, itself not counted.

    Args:
        features: (N, d) float, N > max(k).
        k: numbers of neighbours.
        block: rows per block of distances; memory is block^2, the result doesn't depend on it.

    Returns:
        (N, len(k)) float64.

    Raises:
        DataError: too few points.
    """
    count, keep = len(features), max(k) + 1
    if count < keep:
        raise DataError(
            f"the {max(k)} nearest neighbours of {count} samples don't exist; precision and recall need at least {keep}"
        )
    nearest = torch.full((count, keep), torch.inf, dtype=torch.float64, device=features.device)
    for rows, x in _blocks(features, block):
        for columns, y in _blocks(features, block):
            if columns.start < rows.start:
                continue  # seen from the other side
            distances = squared_distances(x, y)
            if rows == columns:
                distances.fill_diagonal_(0)
            else:
                nearest[columns] = _smallest(nearest[columns], distances.T)
            nearest[rows] = _smallest(nearest[rows], distances)
    return nearest[:, list(k)]


def in_manifolds(
    *, real: Tensor, generated: Tensor, real_radii: Tensor, generated_radii: Tensor, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Which points lie within the radius of some point of the other set.

    Args:
        real: (N, d) float.
        generated: (M, d) float.
        real_radii: (N, K), `neighbour_radii` of the real points.
        generated_radii: (M, K).
        block: as `neighbour_radii`.

    Returns:
        (M, K) bool of the generated points, whose mean is the precision, and (N, K) bool of the real ones, whose mean
        is the recall.
    """
    _check_widths(real, generated)
    inside_real = torch.zeros(len(generated), real_radii.shape[1], dtype=torch.bool, device=real.device)
    inside_generated = torch.zeros(len(real), real_radii.shape[1], dtype=torch.bool, device=real.device)
    for rows, x in _blocks(generated, block):
        for columns, y in _blocks(real, block):
            distances = squared_distances(x, y)
            for k in range(real_radii.shape[1]):
                inside_real[rows, k] |= (distances <= real_radii[columns, k]).any(1)
                inside_generated[columns, k] |= (distances <= generated_radii[rows, k, None]).any(0)
    return inside_real, inside_generated


def precision_recall(*, real: Tensor, generated: Tensor, k: int = 3, block: int = BLOCK) -> tuple[float, float]:
    """Improved precision and recall.

    Precision is the share of generated points within the distance of some real point to its k-th real neighbour; recall
    is the share of real points within that of some generated one. Both depend on both numbers of points. Distances are
    float64; ADM's evaluator rounds them to float16, which moves a figure by up to about 0.003.

    Args:
        real: (N, d) float; (M, d) for `generated`.
        k: neighbours.
        block: as `neighbour_radii`.

    Returns:
        precision, recall; each in [0, 1].

    Raises:
        DataError: fewer than k + 1 points on a side, or sides of different widths.

    Source: Kynkaanniemi et al. 2019 (arXiv:1904.06991); openai/guided-diffusion, evaluations.
    """
    _check_widths(real, generated)
    radii = [neighbour_radii(side, (k,), block) for side in (real, generated)]
    inside = in_manifolds(real=real, generated=generated, real_radii=radii[0], generated_radii=radii[1], block=block)
    return float(inside[0].double().mean()), float(inside[1].double().mean())


def realism(*, real: Tensor, generated: Tensor, real_radii: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """How far inside the real manifold each generated point lies.

    Args:
        real: (N, d) float; (M, d) for `generated`.
        real_radii: (N,) squared radii.
        block: as `neighbour_radii`.

    Returns:
        (M,) float64, the largest of radius / (squared distance + 1e-5) over the real points; and (M,) int64, the
        nearest real point.
    """
    score = torch.zeros(len(generated), dtype=torch.float64, device=real.device)
    closest = torch.full_like(score, torch.inf)
    nearest = torch.zeros(len(generated), dtype=torch.int64, device=real.device)
    for rows, x in _blocks(generated, block):
        for columns, y in _blocks(real, block):
            distances = squared_distances(x, y)
            score[rows] = torch.maximum(score[rows], (real_radii[columns] / (distances + 1e-5)).amax(1))
            least, place = distances.min(1)
            nearest[rows] = torch.where(least < closest[rows], place + columns.start, nearest[rows])
            closest[rows] = torch.minimum(closest[rows], least)
    return score, nearest


def _check_widths(real: Tensor, generated: Tensor) -> None:
    if real.shape[1] != generated.shape[1]:
        raise DataError(
            f"the sides have {real.shape[1]} and {generated.shape[1]} features: they come from different extractors"
        )


def _blocks(features: Tensor, block: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(features), block):
        rows = slice(start, min(start + block, len(features)))
        yield rows, features[rows]


def _smallest(known: Tensor, distances: Tensor) -> Tensor:
    """The smallest entries of each row, ascending, as many as are known."""
    return torch.cat([known, distances], 1).topk(known.shape[1], largest=False, sorted=True).values


class PrecisionRecall(FeatureSets):
    """Improved precision and recall of the generated features against the real ones; see `precision_recall`.

    Args:
        num_features: d.
        k: neighbours.
        block: rows per block of distances.

    Raises:
        ConfigError: k below 1.
    """

    higher_is_better = True

    def __init__(self, num_features: int, k: int = 3, block: int = BLOCK, **kwargs: Any):
        super().__init__(num_features, **kwargs)
        if k < 1:
            raise ConfigError(f"k={k} neighbours of precision and recall must be at least 1")
        self.k, self.block = k, block

    def compute(self) -> Tensor:
        """(2,) float64: precision, recall."""
        values = precision_recall(real=self.rows(True), generated=self.rows(False), k=self.k, block=self.block)
        return torch.tensor(values, dtype=torch.float64, device=self.device)
