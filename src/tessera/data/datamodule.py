"""The one LightningDataModule of all stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from tessera.data.images import ImageDataset, Key
from tessera.data.sampler import EvalShare, TrainBatches
from tessera.data.token_cache import TokenCache
from tessera.errors import CheckpointError, ConfigError, DataError

SERVES = ("images", "tokens", "pairs")


class ImageBatches(Dataset):
    """Batches of `image`, `label`, `index` for a list of (epoch, number) keys."""

    def __init__(self, images: ImageDataset):
        self.images = images

    def __getitem__(self, keys: list[Key]) -> dict[str, Tensor]:
        return default_collate([self.images[key] for key in keys])


class TokenBatches(Dataset):
    """Batches of `tokens`, `label`, `index` from a cache; the index is the row, one per stored view."""

    def __init__(self, cache: TokenCache):
        self.cache = cache

    def __getitem__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        numbers = [number for _, number in keys]
        tokens, labels = self.cache.rows(numbers)
        return {"tokens": tokens, "label": labels, "index": torch.tensor(numbers)}


class PairBatches(Dataset):
    """Batches of generated `tokens` with the real `image` (fixed crop) they were made from, `label` and `index`."""

    def __init__(self, images: ImageDataset, cache: TokenCache):
        self.images, self.cache = images, cache

    def __getitem__(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        numbers = [number for _, number in keys]
        tokens, labels = self.cache.rows(numbers)
        images = torch.cat([self.images.views(number, "none") for number in numbers])
        return {"tokens": tokens, "image": images, "label": labels, "index": torch.tensor(numbers)}


class ImageDataModule(lightning.LightningDataModule):
    """Serves images, cached tokens, or token/image pairs for training, and always images for validation.

    Needs `Trainer(use_distributed_sampler=False)`: its samplers shard by themselves, so that W processes see together
    what one process with the joint batch sees, and every validation image comes exactly once. A checkpoint holds the
    position inside the epoch; training then continues with the next batch.

    Args:
        dataset: factory called with split="train" or "val".
        batch_size: training batch per process.
        eval_batch_size: validation batch per process; None: as in training.
        num_workers: loader processes.
        seed: of the order of the samples.
        serve: images, tokens or pairs.
        token_cache: folder of the cache; for tokens and pairs. Opened when the loader is made.
        expected_fingerprint: the tokenizer's; refuse tokens of another one. None accepts any.
        pin_memory: for CUDA.

    Raises:
        ConfigError: an unknown `serve`, sizes below 1, a missing `token_cache`, or a trainer that replaces samplers.
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
        expected_fingerprint: str | None = None,
        pin_memory: bool = False,
    ):
        super().__init__()
        if serve not in SERVES:
            raise ConfigError(f"data.serve={serve!r} is unknown; choose one of {', '.join(SERVES)}")
        if serve != "images" and token_cache is None:
            raise ConfigError(f"data.serve={serve} needs data.token_cache, the folder of the tokens")
        for key, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size or 1)):
            if value < 1:
                raise ConfigError(f"data.{key}={value} must be at least 1")
        if num_workers < 0:
            raise ConfigError(f"data.num_workers={num_workers} must not be negative")
        self.factory, self.batch_size = dataset, batch_size
        self.eval_batch_size, self.num_workers, self.seed = eval_batch_size or batch_size, num_workers, seed
        self.serve, self.token_cache, self.expected_fingerprint = serve, token_cache, expected_fingerprint
        self.pin_memory = pin_memory
        self.position = (0, 0)  # epoch and batches of it that are done, of the checkpoint resumed from
        self._splits: dict[str, ImageDataset] = {}

    def images(self, split: str) -> ImageDataset:
        """The data set of a split, made once."""
        if split not in self._splits:
            self._splits[split] = self.factory(split=split)
        return self._splits[split]

    def setup(self, stage: str) -> None:
        """Fail before training starts, not in the first batch or the first validation."""
        if self.trainer is not None and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError("set trainer.use_distributed_sampler=false: the data module shards by itself")
        if stage == "fit":
            self.images("train")
        self.images("val")

    def train_batches(self) -> tuple[Dataset, int]:
        """What training reads, by batch, and its number of samples."""
        if self.serve == "images":
            images = self.images("train")
            return ImageBatches(images), len(images)
        cache = TokenCache(self.token_cache, self.expected_fingerprint)
        if self.serve == "tokens":
            return TokenBatches(cache), len(cache)
        images = self.images("train")
        if cache.manifest.data != images.fingerprint() or cache.manifest.views != "none":
            raise CheckpointError(
                f"{self.token_cache} was made from other images than data.dataset gives; pairs need the same ones"
            )
        return PairBatches(images, cache), len(cache)

    def train_dataloader(self) -> DataLoader:
        batches, length = self.train_batches()
        sampler = TrainBatches(length, self.batch_size, self.seed, *self.position)
        return self._loader(batches, sampler=sampler, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return self.reference_loader("val")

    def reference_loader(self, split: str) -> DataLoader:
        """Every image of a split exactly once over all processes, without augmentation."""
        images = self.images(split)
        if images.augment:
            images = self.factory(split=split)
            images.augment = False
        return self._loader(images, sampler=EvalShare(len(images)), batch_size=self.eval_batch_size)

    def _loader(self, dataset: Dataset, **arguments: Any) -> DataLoader:
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=False,
            # an own generator: drawing the workers' base seed must not advance the global one
            generator=torch.Generator().manual_seed(self.seed),
            **arguments,
        )

    def state_dict(self) -> dict[str, Any]:
        """Position in the training data: epoch, batches of it that are done, and the sizes that give it meaning."""
        if self.trainer is None:
            return {}
        loop = self.trainer.fit_loop
        return {
            "epoch": self.trainer.current_epoch,
            # `processed` counts the batch whose end is being handled, but not one that an exception cut short
            "batches": loop.epoch_loop.batch_progress.current.processed,
            "global_batch_size": self.batch_size * self.trainer.world_size,
            "seed": self.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at that position.

        Raises:
            DataError: another global batch size or seed; the position would mean other samples.
        """
        current = {"global_batch_size": self.batch_size * self.trainer.world_size, "seed": self.seed}
        for key, value in current.items():
            if state_dict[key] != value:
                raise DataError(
                    f"the checkpoint was written with {key.replace('_', ' ')} {state_dict[key]}, this run has {value}; "
                    "resuming would repeat or leave out samples"
                )
        self.position = (state_dict["epoch"], state_dict["batches"])
