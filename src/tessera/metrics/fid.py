"""Frechet distance between two sets of features, from sums that merge over batches and processes.

Knows nothing about images: features come from `features.py`, names from `protocol.py`.
"""

from typing import Any

import torch
from torch import Tensor

from tessera.errors import DataError
from tessera.metrics.statistics import Statistics
from tessera.metrics.sums import SumMetric, usable_rows

RIDGES = (0.0, 1e-12)  # of the mean variance
LEAF = 256  # matrices up to this size are multiplied in one piece


def moments(n: int, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance from sums: m = s / n, S = (C - n m m^T) / (n - 1).

    Args:
        n: number of samples.
        total: (d,) float64, sum of x.
        outer: (d, d) float64, sum of x x^T.

    Returns:
        (d,) mean and (d, d) covariance, float64; symmetric as `outer` is.

    Raises:
        DataError: fewer than two samples.
    """
    if n < 2:
        raise DataError(f"a covariance needs at least 2 samples, but there are {n}; evaluate more images")
    mean = total / n
    return mean, torch.addr(outer, mean, mean, alpha=-n).div_(n - 1)


def trace_root_product(sigma1: Tensor, sigma2: Tensor, rank: int | None = None) -> Tensor:
    """tr (S1 S2)^{1/2} by a symmetric eigenproblem: S1 = R R^T, then the sum of sqrt(eig(R^T S2 R)).

    R is the Cholesky factor of S1; of a singular S1, with 1e-12 of its mean variance added, which changes the result by
    about 1e-12 of itself; should that fail too, the eigenvectors scaled by the roots of the eigenvalues. Eigenvalues
    are real; negative ones are rounding and count as 0. Features that are constant on a side contribute nothing and are
    left out.

    Args:
        sigma1, sigma2: (d, d) float64 covariances.
        rank: bound on the rank of the product (from the sample counts); only as many eigenvalues are summed,
            because the rounding errors of the others would enter through their square roots. None: d.

    Returns:
        float64 scalar.
    """
    varying = (sigma1.diagonal() > 0) & (sigma2.diagonal() > 0)
    if not varying.all():
        sigma1, sigma2 = (sigma[varying][:, varying] for sigma in (sigma1, sigma2))
    d = sigma1.shape[0]
    rank = d if rank is None else min(rank, d)
    for ridge in RIDGES:
        shifted = sigma1.clone()
        shifted.diagonal().add_(ridge * sigma1.diagonal().mean())
        root, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            inner = lower_sandwich(root, sigma2)
            break
    else:
        values, vectors = torch.linalg.eigh(sigma1)
        root = vectors * values.clamp_min(0).sqrt()
        inner = root.T @ sigma2 @ root
    values = torch.linalg.eigvalsh(inner)  # of the lower triangle; ascending
    return values[d - rank :].clamp_min(0).sqrt().sum()


def lower_sandwich(root: Tensor, sigma: Tensor, leaf: int = LEAF) -> Tensor:
    """Lower triangle of R^T S R for a lower triangular R and a symmetric S; what is above it is unspecified.

    Halved again and again, which leaves out the products with the zeros of R and takes those that are each other's
    transposes once: less than a third of the multiplications of two full products.

    Args:
        root, sigma: (d, d).
        leaf: size of the blocks that are multiplied in full; smaller ones save more but make smaller products.
    """
    inner = torch.empty_like(sigma)
    _lower_sandwich(root, sigma, inner, leaf)
    return inner


def _lower_sandwich(root: Tensor, sigma: Tensor, out: Tensor, leaf: int) -> None:
    d = len(root)
    if d <= leaf:
        torch.mm(root.T @ sigma, root, out=out)
        return
    half = d // 2
    top, side, bottom = root[:half, :half], root[half:, :half], root[half:, half:]
    _lower_sandwich(top, sigma[:half, :half], out[:half, :half], leaf)
    _lower_sandwich(bottom, sigma[half:, half:], out[half:, half:], leaf)
    below = sigma[half:, half:] @ side
    across = torch.empty_like(below)  # S21 R11
    for start in range(0, half, leaf):
        stop = min(start + leaf, half)
        torch.mm(sigma[half:, start:half], top[start:, start:stop], out=across[:, start:stop])
    both = across + below
    for start in range(0, d - half, leaf):
        stop = min(start + leaf, d - half)
        torch.mm(bottom[start:, start:stop].T, both[start:], out=out[half + start : half + stop, :half])
    corner = side.T @ across.add_(below, alpha=0.5)
    out[:half, :half].add_(corner).add_(corner.T)


def frechet_distance(
    mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor, n1: int | None = None, n2: int | None = None
) -> Tensor:
    """|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^{1/2}.

    Args:
        mu1, mu2: (d,) means.
        sigma1, sigma2: (d, d) unbiased covariances.
        n1, n2: samples behind each side, where known; they bound the rank of singular covariances.

    Returns:
        float64 scalar, raw: equal sets may give a value a rounding error below 0.

    Raises:
        DataError: the sides have different numbers of features.

    Source: Heusel et al. 2017 (arXiv:1706.08500), eq. 6; the symmetric form of the root is ours.
    """
    if mu1.shape != mu2.shape:
        raise DataError(f"the sides have {mu1.numel()} and {mu2.numel()} features: they come from different extractors")
    mu1, sigma1, mu2, sigma2 = (x.double() for x in (mu1, sigma1, mu2, sigma2))
    d = mu1.numel()
    rank = min(d, *(n - 1 for n in (n1, n2) if n is not None)) if (n1 or n2) else d
    # the factorised side should be the one of higher rank, which the ridge changes least
    if (n1 or d + 1) < (n2 or d + 1):
        sigma1, sigma2 = sigma2, sigma1
    return (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_root_product(sigma1, sigma2, rank)


class FrechetDistance(SumMetric):
    """Frechet distance of `fake` features to `real` ones, or to fixed reference statistics.

    The state is, per side, the number of samples, their sum and the sum of their outer products in float64;
    all are added up over processes. It is saved in `state_dict` and `compute` works on a restored state.

    Args:
        num_features: d, the width of the features.
        reference: statistics of a fixed set. Then only fake features are accepted.
        sides: which sides have sums; ("real",) merely collects statistics, ("fake",) awaits a `reference`.
    """

    higher_is_better = False

    def __init__(
        self,
        num_features: int,
        reference: Statistics | None = None,
        sides: tuple[str, ...] = ("real", "fake"),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if reference is not None and reference.mu.numel() != num_features:
            raise DataError(
                f"the reference statistics have {reference.mu.numel()} features, the extractor "
                f"{num_features}; "
                "use statistics made with the same extractor"
            )
        self.num_features, self.reference = num_features, reference
        self.sides = ("fake",) if reference is not None else tuple(sides)
        for side in self.sides:
            self.add_sum(f"{side}_n", dtype=torch.int64)
            self.add_sum(f"{side}_sum", num_features)
            self.add_sum(f"{side}_outer", num_features, num_features)

    def update(self, features: Tensor, real: bool, mask: Tensor | None = None, index: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            features: (N, d) float.
            real: which side.
            mask: (N,) bool; rows that are False are left out (repeats made by a padding sampler).
            index: (N,) int64 identities of the samples, for the error message; default the row numbers.

        Raises:
            DataError: wrong width; a NaN or infinite feature; real features besides fixed reference
            statistics.
        """
        side = "real" if real else "fake"
        if side not in self.sides:
            why = " (it has fixed reference statistics)" if self.reference is not None else ""
            raise DataError(f"{side} features can't be added to this distance{why}")
        rows, _ = usable_rows(features, self.num_features, mask, index)
        x = rows.to(getattr(self, f"{side}_sum").device, torch.float64)
        setattr(self, f"{side}_n", getattr(self, f"{side}_n") + len(x))
        setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + x.sum(0))
        # in place: the product is accumulated without a second (d, d) matrix
        getattr(self, f"{side}_outer").addmm_(x.T, x)

    def statistics(self, real: bool) -> Statistics:
        """Mean and covariance of one side as accumulated here (inside `compute`: over all processes)."""
        if real and self.reference is not None:
            return self.reference
        side = "real" if real else "fake"
        n = int(getattr(self, f"{side}_n"))
        mu, sigma = moments(n, getattr(self, f"{side}_sum"), getattr(self, f"{side}_outer"))
        return Statistics(mu, sigma, n)

    def summary(self) -> tuple[float, Statistics, Statistics]:
        """The distance over all processes with both sides' statistics: (distance, real, fake).

        Every process must call it.
        """
        with self.sync_context():
            real, fake = self.statistics(real=True), self.statistics(real=False)
        return float(_between(real, fake)), real, fake

    def compute(self) -> Tensor:
        """The distance, a float64 scalar.

        Raises:
            DataError: a side has fewer than two samples.
        """
        return _between(self.statistics(real=True), self.statistics(real=False))


def _between(real: Statistics, fake: Statistics) -> Tensor:
    device = fake.mu.device
    return frechet_distance(real.mu.to(device), real.sigma.to(device), fake.mu, fake.sigma, real.n, fake.n)
