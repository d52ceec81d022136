"""Base of the metrics whose state is a handful of sums."""

from typing import Any

import torch
from torchmetrics import Metric


class SumMetric(Metric):
    """A torchmetrics metric of float64 and int64 sums: merged by addition, saved, usable after a reload."""

    full_state_update = False
    is_differentiable = False

    def add_sum(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Declare a state that starts at zero and is added up over processes."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), "sum", persistent=True)

    def set_dtype(self, dst_type: Any) -> "SumMetric":
        """Sums keep their dtype whatever precision the model uses."""
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # a restored state is as good as an updated one, and an older result no longer belongs to it
        self._computed = None
        self._update_count = max(self._update_count, 1)
