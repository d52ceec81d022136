"""Counts every sample once, whatever the evaluation sampler repeats."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from tessera import distributed
from tessera.errors import DataError

Commit = Callable[[Tensor], None]


class UniqueSamples:
    """Decides, by data set index, which samples of an evaluation enter a figure.

    Repeats inside a process are dropped as they come. A sampler that pads makes processes repeat each other's
    samples at their ends, so the last batch is held back until all indices are known.
    """

    def __init__(self) -> None:
        self.seen: list[Tensor] = []
        self.known: set[int] = set()
        self.pending: tuple[Tensor, Tensor, Commit] | None = None
        self.total = 0
        self.unique = 0

    def add(self, index: Tensor, commit: Commit) -> None:
        """Take a measured batch.

        Args:
            index: (B,) int64 data set indices.
            commit: adds the batch to the figure's sums, given a (B,) bool mask of the samples that count.
        """
        self._release()
        index = index.detach().cpu().to(torch.int64)
        fresh = torch.ones(len(index), dtype=torch.bool)
        for row, number in enumerate(index.tolist()):
            fresh[row] = number not in self.known
            self.known.add(number)
        self.pending = (index, fresh, commit)
        self.seen.append(index[fresh])
        self.total += len(index)

    def _release(self) -> None:
        if self.pending is not None:
            _, mask, commit = self.pending
            self.unique += int(mask.sum())
            commit(mask)
            self.pending = None

    def finish(self) -> None:
        """Commit the last batch, without what an earlier process has measured. Every process must call it.

        Afterwards `total` and `unique` are the numbers of samples over all processes.

        Raises:
            DataError: processes share more than the samples at their ends.
        """
        if distributed.is_distributed():
            self._drop_shared()
        self._release()
        if distributed.is_distributed():
            counts = torch.tensor([self.total, self.unique])
            gathered: list = [None] * distributed.world_size()
            dist.all_gather_object(gathered, counts.tolist())
            self.total, self.unique = (sum(column) for column in zip(*gathered, strict=True))

    def _drop_shared(self) -> None:
        own = torch.cat([*self.seen, torch.empty(0, dtype=torch.int64)])
        held = int(self.pending[1].sum()) if self.pending is not None else 0
        gathered: list = [None] * distributed.world_size()
        dist.all_gather_object(gathered, (own.tolist(), held))
        earlier: set[int] = set()
        for rank, (indices, pending) in enumerate(gathered):
            committed = indices[: len(indices) - pending]
            # checked for every rank by every rank, so that all raise together
            if not earlier.isdisjoint(committed):
                raise DataError(
                    f"processes evaluate the same samples (rank {rank} repeats index "
                    f"{min(earlier.intersection(committed))}); use the data module's own sampler: "
                    "trainer.use_distributed_sampler=false"
                )
            if rank == distributed.rank() and self.pending is not None:
                index, mask, commit = self.pending
                repeated = torch.tensor([number in earlier for number in index.tolist()], dtype=torch.bool)
                self.pending = (index, mask & ~repeated, commit)
            earlier.update(indices)
