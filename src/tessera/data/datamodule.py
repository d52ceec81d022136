"""The one LightningDataModule of all stages."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tessera import distributed
from tessera.data.images import ImageDataset
from tessera.data.pair_store import open_pairs
from tessera.data.sampler import EvalBatches, FixedBatches, TrainBatches
from tessera.data.token_cache import TokenCache
from tessera.errors import CheckpointError, ConfigError

SERVES = ("images", "tokens", "pairs")


class TokenBatches(Dataset):
    """Batches of `tokens`, `label` and `index` for a list of (epoch, row) keys; see `TokenCache.rows`."""

    def __init__(self, cache: TokenCache):
        self.cache = cache

    def __getitem__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        return self.cache.rows([row for _, row in keys])


class PairBatches(Dataset):
    """Batches as of `TokenBatches`, with the real `image` (in its fixed crop) that the tokens belong to.

    Args:
        cache: pairs, or tokens of the images themselves.
        images: the data set that they were made from.
    """

    def __init__(self, cache: TokenCache, images: ImageDataset):
        self.cache, self.images = cache, images

    def __getitem__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        batch = self.cache.rows([row for _, row in keys])
        manifest = self.cache.manifest
        numbers, own = batch["index"] // manifest.rows_per_image, batch["index"] % manifest.rows_per_image
        images = [
            self.images.views(number, manifest.view_set)["image"][row % manifest.num_views]
            for number, row in zip(numbers.tolist(), own.tolist(), strict=True)
        ]
        return {**batch, "image": torch.stack(images)}


class TrainLoader(DataLoader):
    """A loader whose position the data module keeps.

    It passes for a stateful one, or Lightning would warn that resuming within an epoch is unreliable.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing of its own."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def _outlive_signals(worker: int) -> None:
    """Let a loader process serve on after a signal to the whole process group, so that training can stop by itself.

    A terminal sends Ctrl-C, and a scheduler SIGTERM, to every process of a job. SIGTERM also ends a loader whose owner
    is exiting, hence the alarm, which kills it half a minute later.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


class ImageDataModule(lightning.LightningDataModule):
    """Serves images, cached tokens, or token/image pairs for training; always images for validation and prediction.

    W processes together see what one process with the joint batch sees, and every validation image comes exactly once.
    A checkpoint holds the position in the training data, from which training continues with the next batch. The order
    of the samples and their augmentation depend on neither `num_workers` nor torch's global generator.

    Args:
        dataset: factory called with split="train" or "val".
        batch_size: training batch per process.
        eval_batch_size: most validation images in a batch per process; None: as in training.
        num_workers: loader processes.
        seed: of the order of the samples.
        serve: images, tokens or pairs.
        token_cache: folder of the cache, for tokens and pairs; opened when the loader is made.
        pin_memory: for CUDA.
        expected_fingerprint: the tokenizer's; refuse tokens of another one. None accepts any.

    Raises:
        ConfigError: an unknown `serve`, sizes out of range, a missing or useless `token_cache`.
    """

    def __init__(
        self,
        dataset: Callable[..., ImageDataset],
        batch_size: int,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        serve: str = "images",
        token_cache: str | Path | None = None,
        pin_memory: bool = False,
        expected_fingerprint: str | None = None,
    ):
        super().__init__()
        if serve not in SERVES:
            raise ConfigError(f"data.serve={serve!r} is unknown; choose one of {', '.join(SERVES)}")
        if serve != "images" and token_cache is None:
            raise ConfigError(f"data.serve={serve} needs data.token_cache, the folder of the tokens")
        if serve == "images" and (token_cache is not None or expected_fingerprint is not None):
            raise ConfigError("data.token_cache and data.expected_fingerprint have no use with data.serve=images")
        eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        for key, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ConfigError(f"data.{key}={value} must be at least 1")
        if num_workers < 0:
            raise ConfigError(f"data.num_workers={num_workers} must not be negative")
        self.factory, self.batch_size, self.eval_batch_size = dataset, batch_size, eval_batch_size
        self.num_workers, self.seed, self.pin_memory = num_workers, seed, pin_memory
        self.serve, self.token_cache, self.expected_fingerprint = serve, token_cache, expected_fingerprint
        # a process without a share of a tiny validation split is no error
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._splits: dict[str, ImageDataset] = {}
        self._rewind()

    def _rewind(self) -> None:
        # epoch and batches of it done when the loader's current iteration began, and Lightning's count at that time
        # (None before any iteration)
        self._began: tuple[int, int] = (0, 0)
        self._began_count: int | None = None

    def images(self, split: str) -> ImageDataset:
        """The data set of a split, made once."""
        if split not in self._splits:
            self._splits[split] = self.factory(split=split)
        return self._splits[split]

    def setup(self, stage: str) -> None:
        """Fail before training starts, not in the first batch or the first validation."""
        if stage == "fit":
            self._rewind()
            if self.serve != "tokens":
                self.images("train")
        self.images("val")

    def train_dataloader(self) -> DataLoader:
        source, length = self.train_batches()
        if self.trainer is not None and self.trainer.overfit_batches > 0:
            sampler: TrainBatches = FixedBatches(length, self.batch_size, self.seed, lambda: (0, 0))
        else:
            sampler = TrainBatches(length, self.batch_size, self.seed, self._begin)
        return self._loader(TrainLoader, source, sampler, persistent_workers=self.num_workers > 0)

    def train_batches(self) -> tuple[Dataset, int]:
        """What training reads, by lists of (epoch, number) keys, and its number of samples."""
        if self.serve == "images":
            images = self.images("train")
            return images, len(images)
        opened = TokenCache.open if self.serve == "tokens" else open_pairs
        cache = opened(self.token_cache, tokenizer_fingerprint=self.expected_fingerprint)
        if self.serve == "tokens":
            return TokenBatches(cache), len(cache)
        images = self.images("train")
        if cache.manifest.data != images.fingerprint():
            raise CheckpointError(
                f"data.token_cache={self.token_cache} was made from other images ({cache.manifest.data or 'imported'}) "
                f"than data.dataset gives ({images.fingerprint()}); pairs need the images the tokens came from"
            )
        return PairBatches(cache, images), len(cache)

    def val_dataloader(self) -> DataLoader:
        return self.reference_loader("val")

    def predict_dataloader(self) -> DataLoader:
        return self.reference_loader("val")

    def reference_loader(self, split: str) -> DataLoader:
        """Every image of a split exactly once over all processes, without augmentation."""
        images = self.images(split).without_augmentation()
        return self._loader(DataLoader, images, EvalBatches(len(images), self.eval_batch_size))

    def _loader(
        self, kind: type[DataLoader], source: Dataset, sampler: TrainBatches | EvalBatches, **options: Any
    ) -> DataLoader:
        return kind(
            source,
            batch_size=None,  # the sampler's keys are batches already
            sampler=sampler,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=_outlive_signals,
            # an own generator: drawing the workers' seeds must not advance torch's global one
            generator=torch.Generator().manual_seed(self.seed & (1 << 63) - 1),
            **options,
        )

    def _begin(self) -> tuple[int, int]:
        """The position, when the loader begins an iteration."""
        self._began, self._began_count = self.position, self._count()
        return self._began

    def _count(self) -> int:
        """Training batches of the whole run that have been processed.

        This count of Lightning's only ever grows. Its counts within an epoch are reset at other times than the loader's
        iterations begin, and its epoch numbers skip one after resuming from a checkpoint of an epoch's end. The count
        includes a batch whose end is being handled, but not one that an exception cut short.
        """
        trainer = self.trainer
        return 0 if trainer is None else trainer.fit_loop.epoch_loop.batch_progress.total.processed

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and how many of its batches are done."""
        epoch, batches = self._began
        if self._began_count is not None:
            batches += self._count() - self._began_count
        if self.trainer is not None and batches and batches >= self.trainer.num_training_batches:
            return epoch + 1, 0
        return epoch, batches

    def state_dict(self) -> dict[str, Any]:
        """Position in the training data, and what gives it its meaning."""
        epoch, batches = self.position
        return {"epoch": epoch, "batches": batches, **self._meaning()}

    def _meaning(self) -> dict[str, int]:
        return {"global_batch_size": self.batch_size * distributed.world_size(), "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            CheckpointError: another global batch size or seed; the position would mean other samples.
        """
        for key, value in self._meaning().items():
            if state_dict[key] != value:
                raise CheckpointError(
                    f"the checkpoint was written with {key.replace('_', ' ')} {state_dict[key]}, this run has {value}; "
                    "continuing would repeat or leave out samples; restore data.batch_size x trainer.devices and "
                    "data.seed, or start a new run"
                )
        # Lightning restores its count after this
        self._began, self._began_count = (state_dict["epoch"], state_dict["batches"]), None
