"""Bases of the metrics: states that are sums, and states that are sets of features."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from tessera.errors import DataError


def usable_rows(
    features: Tensor, width: int, mask: Tensor | None = None, index: Tensor | None = None, what: str = "features"
) -> tuple[Tensor, Tensor]:
    """Rows of a batch that count, checked.

    Args:
        features: (N, width) float.
        width: that the metric expects.
        mask: (N,) bool; rows that are False are left out (repeats made by a padding sampler).
        index: (N,) int64 identities of the samples, for the error message; None: the row numbers.
        what: the rows are, for the message.

    Returns:
        The rows without gradient, and their indices on the same device.

    Raises:
        DataError: another width; NaN or infinite values, with the samples that have them.
    """
    if features.ndim != 2 or features.shape[1] != width:
        raise DataError(f"{what} have shape {tuple(features.shape)}, expected (N, {width})")
    features = features.detach()
    index = torch.arange(len(features)) if index is None else index
    index = index.to(features.device)
    if mask is not None:
        mask = mask.to(features.device, torch.bool)
        features, index = features[mask], index[mask]
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        bad = index[~finite].tolist()
        raise DataError(
            f"{what} of sample {', '.join(map(str, bad[:8]))} are NaN or infinite "
            f"({len(bad)} in this batch); check the model's output for divergence"
        )
    return features, index


class StoredMetric(Metric):
    """A torchmetrics metric whose state keeps its dtype, and is usable after a reload without a further update."""

    full_state_update = False
    is_differentiable = False

    def set_dtype(self, dst_type: Any) -> "StoredMetric":
        """States keep their dtype whatever precision the model uses."""
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # a restored state is as good as an updated one, and an older result no longer belongs to it
        self._computed = None
        self._update_count = max(self._update_count, 1)


class SumMetric(StoredMetric):
    """A metric of float64 and int64 sums, merged by addition."""

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Declare a state that starts at zero and is added up over processes."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), "sum", persistent=True)

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        # torchmetrics would gather one covariance per process before adding them up
        for name in self._reductions:
            total = getattr(self, name).clone()
            dist.all_reduce(total, group=process_group or self.process_group)
            setattr(self, name, total)


class FeatureSets(StoredMetric):
    """A metric of two sets of features, `real` and `generated`, in float32 on the device of the metric.

    Processes may hold any number of rows, none included. What is computed depends on samples and their indices alone,
    not on processes or batches.

    Args:
        num_features: d.
    """

    def __init__(self, num_features: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.num_features = num_features
        for side in ("real", "generated"):
            self.add_state(f"{side}_rows", [], "cat", persistent=True)
            self.add_state(f"{side}_index", [], "cat", persistent=True)

    def update(self, features: Tensor, *, real: bool, mask: Tensor | None = None, index: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            features: (N, d) float.
            real: which side.
            mask: (N,) bool; rows that are False are left out.
            index: (N,) int64, each sample's number within its side; None: rows are numbered as they come.

        Raises:
            DataError: wrong width; a NaN or infinite feature.
        """
        side = "real" if real else "generated"
        if index is None:
            start = sum(map(len, getattr(self, f"{side}_index")))
            index = torch.arange(start, start + len(features))
        rows, index = usable_rows(features, self.num_features, mask, index)
        getattr(self, f"{side}_rows").append(rows.to(self.device, torch.float32))
        getattr(self, f"{side}_index").append(index.to(self.device))

    def rows(self, real: bool) -> Tensor:
        """(N, d) float32 features of one side in the order of their indices (inside `compute`: of all processes)."""
        side = "real" if real else "generated"
        parts, index = getattr(self, f"{side}_rows"), getattr(self, f"{side}_index")
        if isinstance(parts, list) and not parts:
            return torch.empty(0, self.num_features, device=self.device)
        return dim_zero_cat(parts)[dim_zero_cat(index).argsort(stable=True)]

    def compute(self) -> Any:
        """(N, d) features of the real samples and (M, d) of the generated ones."""
        return self.rows(True), self.rows(False)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        # a process without rows has to take part in the gathering
        for side in ("real", "generated"):
            if not getattr(self, f"{side}_rows"):
                setattr(self, f"{side}_rows", [torch.empty(0, self.num_features, device=self.device)])
                setattr(self, f"{side}_index", [torch.empty(0, dtype=torch.int64, device=self.device)])
        super()._sync_dist(*args, **kwargs)
