"""Which samples a process sees, in which order: seeded, independent of the number of processes, resumable."""

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from tessera import distributed
from tessera.errors import ConfigError


class TrainBatches(Sampler):
    """Batches of (epoch, sample number) keys of one process.

    Global batch s of an epoch is permutation[s W B : (s + 1) W B]; rank r takes its r-th slice of B. W processes
    therefore see together exactly what one process with batches of W B sees. The incomplete last batch is left out.

    Args:
        length: of the data set.
        batch_size: B, per process.
        seed: the permutation is a function of (seed, epoch).
        epoch: the first to serve.
        start: batches of that epoch to leave out (they were seen before a resume).

    Raises:
        ConfigError: a global batch is larger than the data set.
    """

    def __init__(self, length: int, batch_size: int, seed: int, epoch: int = 0, start: int = 0):
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.epoch, self.start = epoch, start
        self.resumed_epoch = epoch
        if len(self) == 0:
            raise ConfigError(
                f"data.batch_size={batch_size} x {distributed.world_size()} processes exceeds the {length} training samples"
            )

    def __len__(self) -> int:
        return self.length // (self.batch_size * distributed.world_size())

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # torch's CPU generator reads 32 bits of a seed only
        key = hashlib.sha256(f"{self.seed}/{self.epoch}".encode()).digest()[:4]
        generator = torch.Generator().manual_seed(int.from_bytes(key))
        order = torch.randperm(self.length, generator=generator).tolist()
        rank, world = distributed.rank(), distributed.world_size()
        start = self.start if self.epoch == self.resumed_epoch else 0
        for batch in range(start, len(self)):
            begin = (batch * world + rank) * self.batch_size
            yield [(self.epoch, number) for number in order[begin : begin + self.batch_size]]


class EvalShare(Sampler):
    """This process's contiguous share of the data set: every sample once over all processes, none repeated."""

    def __init__(self, length: int):
        self.length = length

    def _range(self) -> range:
        rank, world = distributed.rank(), distributed.world_size()
        return range(self.length * rank // world, self.length * (rank + 1) // world)

    def __len__(self) -> int:
        return len(self._range())

    def __iter__(self) -> Iterator[int]:
        return iter(self._range())
