"""Kernel distance: an unbiased comparison of two sets of features, for few samples."""

from typing import Any

import torch
from torch import Tensor

from tessera.errors import ConfigError, DataError
from tessera.metrics.sums import FeatureSets

KERNELS = ("polynomial", "rbf")
BLOCK = 2048


def squared_mmd(
    x: Tensor,
    y: Tensor,
    kernel: str = "polynomial",
    degree: int = 3,
    gamma: float | None = None,
    coef: float = 1.0,
    sigma: float = 10.0,
    block: int = BLOCK,
) -> Tensor:
    """Unbiased estimate of the squared maximum mean discrepancy; it may be negative.

    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j)

    Args:
        x, y: (N, d) and (M, d) float, N and M at least 2.
        kernel: "polynomial", (gamma x.y + coef)^degree, or "rbf", exp(-|x - y|^2 / (2 sigma^2)).
        degree, gamma, coef: of the polynomial; gamma None: 1 / d.
        sigma: of the rbf.
        block: rows per block of the kernel matrix.

    Returns:
        float64 scalar.

    Raises:
        ConfigError: an unknown kernel.
        DataError: fewer than two samples, or sides of different widths.

    Source: Gretton et al. 2012; Binkowski et al. 2018 (arXiv:1801.01401) for degree 3.
    """
    if kernel not in KERNELS:
        raise ConfigError(f"kernel={kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
    if x.shape[1] != y.shape[1]:
        raise DataError(f"the sides have {x.shape[1]} and {y.shape[1]} features: they come from different extractors")
    if min(len(x), len(y)) < 2:
        raise DataError(f"a kernel distance needs at least 2 samples per side, not {len(x)} and {len(y)}")
    x, y = x.double(), y.double()

    def values(a: Tensor, b: Tensor) -> Tensor:
        if kernel == "polynomial":
            return ((1 / a.shape[1] if gamma is None else gamma) * (a @ b.T) + coef) ** degree
        squares = a.square().sum(1)[:, None] + b.square().sum(1)[None, :] - 2 * (a @ b.T)
        return (squares.clamp_min(0) / (-2 * sigma**2)).exp()

    def total(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([values(p, q).sum() for p in a.split(block) for q in b.split(block)]).sum()

    def own(a: Tensor) -> Tensor:
        diagonal = torch.stack([values(p, p).trace() for p in a.split(block)]).sum()
        return (total(a, a) - diagonal) / (len(a) * (len(a) - 1))

    return own(x) + own(y) - 2 * total(x, y) / (len(x) * len(y))


class KernelDistance(FeatureSets):
    """KID: the mean of `squared_mmd` over random subsets, which follow from a seed and the samples' indices alone.

    Args:
        num_features: d.
        subsets: number of subsets.
        subset_size: samples of each side per subset. None: one estimate from all samples.
        seed: of the subsets.
        **kernel: options of `squared_mmd`, and those of torchmetrics.Metric.

    Raises:
        ConfigError: fewer than one subset, or than two samples in it.

    Source: Binkowski et al. 2018 (arXiv:1801.01401).
    """

    higher_is_better = False

    def __init__(
        self,
        num_features: int,
        subsets: int = 100,
        subset_size: int | None = 1000,
        seed: int = 0,
        kernel: str = "polynomial",
        degree: int = 3,
        **kwargs: Any,
    ):
        super().__init__(num_features, **kwargs)
        if subsets < 1 or (subset_size is not None and subset_size < 2):
            raise ConfigError(f"KID needs subsets={subsets} of at least 1, and subset_size={subset_size} of at least 2")
        if kernel not in KERNELS:
            raise ConfigError(f"kernel={kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        self.kernel = {"kernel": kernel, "degree": degree}

    def values(self) -> Tensor:
        """(subsets,) float64 estimates; (1,) of all samples where there are no subsets.

        Raises:
            DataError: a side has fewer samples than a subset.
        """
        real, generated = self.rows(True), self.rows(False)
        return subset_distances(real, generated, self.subsets, self.subset_size, self.seed, **self.kernel)

    def compute(self) -> Tensor:
        """Mean over the subsets, a float64 scalar."""
        return self.values().mean()


def subset_distances(
    real: Tensor, generated: Tensor, subsets: int = 100, subset_size: int | None = 1000, seed: int = 0, **kernel: Any
) -> Tensor:
    """(subsets,) float64 estimates of `squared_mmd` on random subsets without repeats.

    Args:
        real, generated: (N, d) and (M, d) float.
        subsets, subset_size, seed: as `KernelDistance`.
        **kernel: options of `squared_mmd`.

    Raises:
        DataError: a side has fewer samples than a subset.
    """
    if subset_size is None:
        return squared_mmd(real, generated, **kernel)[None]
    if min(len(real), len(generated)) < subset_size:
        raise DataError(
            f"KID's subset_size={subset_size} exceeds the {len(real)} real or {len(generated)} generated samples; "
            "lower it, or set it to null"
        )
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        chosen = [side[torch.randperm(len(side), generator=generator)[:subset_size]] for side in (real, generated)]
        values.append(squared_mmd(*chosen, **kernel))
    return torch.stack(values)
