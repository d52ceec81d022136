"""Which samples a process sees, in which order: seeded, independent of the number of processes, resumable.

The samplers yield whole batches (lists of keys), for a DataLoader with batch_size=None. They are `DistributedSampler`s
so that Lightning recognises that they shard by themselves and leaves them in place, whatever
`Trainer(use_distributed_sampler=...)` says.
"""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DistributedSampler, SequentialSampler

from tessera import distributed
from tessera.errors import ConfigError

Key = int | tuple[int, int]


class TrainBatches(DistributedSampler):
    """Batches of (epoch, sample number) keys of one process, in an order that is a function of (seed, epoch).

    Global batch s of an epoch is permutation[s W B : (s + 1) W B]; rank r takes its r-th slice of B. W processes
    therefore see together exactly what one process with batches of W B sees. The incomplete last batch is left out.

    Lightning's `set_epoch` has no effect, as its epoch numbers are not always those of an uninterrupted run.

    Args:
        length: of the data set.
        batch_size: B, per process.
        seed: of the permutations.
        position: called whenever an iteration begins; gives its epoch, and how many batches of it to leave out as they
            were served before a resume. `len` stays the full epoch's.

    Raises:
        ConfigError: a global batch is larger than the data set.
    """

    def __init__(self, length: int, batch_size: int, seed: int, position: Callable[[], tuple[int, int]]):
        super().__init__(range(length), distributed.world_size(), distributed.rank(), seed=seed, drop_last=True)
        self.length, self.batch_size, self.position = length, batch_size, position
        if len(self) == 0:
            raise ConfigError(
                f"data.batch_size={batch_size} x {self.num_replicas} processes exceeds the {length} training samples; "
                "lower data.batch_size"
            )

    def __len__(self) -> int:
        return self.length // (self.batch_size * self.num_replicas)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # not a generator itself: the position is read now, not when the first batch is asked for
        return self._batches(*self.position())

    def _batches(self, epoch: int, start: int) -> Iterator[list[tuple[int, int]]]:
        # hashed, as torch's CPU generator looks at the low 32 bits of its seed only
        digest = hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        order = torch.randperm(self.length, generator=generator)
        for batch in range(start, len(self)):
            begin = (batch * self.num_replicas + self.rank) * self.batch_size
            yield [(epoch, number) for number in order[begin : begin + self.batch_size].tolist()]


class FixedBatches(TrainBatches, SequentialSampler):
    """Training batches under `Trainer(overfit_batches=...)`: Lightning replaces samplers that aren't sequential.

    Give it a constant position, so that every epoch is the same.
    """


class EvalBatches(DistributedSampler, SequentialSampler):
    """Batches of sample numbers from this process's contiguous share: every sample once, none repeated.

    Shares differ by at most one sample, and all processes get the same number of batches (a share is cut evenly), so
    that collectives inside a step, such as the broadcast of buffers in DistributedDataParallel, meet. Only a batch size
    of 1, or fewer samples than processes, leaves some processes a batch less. Sequential by name too, so that
    `Trainer(overfit_batches=...)` leaves it in place.

    Args:
        length: of the data set.
        batch_size: the most samples in a batch.
    """

    def __init__(self, length: int, batch_size: int):
        super().__init__(range(length), distributed.world_size(), distributed.rank(), shuffle=False)
        self.own = range(length * self.rank // self.num_replicas, length * (self.rank + 1) // self.num_replicas)
        largest = -(-length // self.num_replicas)
        self.batches = min(-(-largest // batch_size), len(self.own))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        count = len(self.own)
        for batch in range(self.batches):
            yield list(self.own[count * batch // self.batches : count * (batch + 1) // self.batches])
