"""A tiny tokenizer stage with its data, to run figure callbacks through Lightning's validation."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate

from tessera import distributed
from tessera.backbones.cnn import CNNDecoder, CNNEncoder
from tessera.metrics.features import FeatureExtractor
from tessera.quantizers.codebooks.vq import VQCodebook
from tessera.quantizers.product import ProductQuantizer
from tessera.quantizers.structure import SingleGridQuantizer
from tessera.rng import IndexedRng, integers
from tessera.tokenizers.tokenizer import Tokenizer

RESOLUTION, NUM_CLASSES = 16, 3


def tiny_tokenizer(codebook_size: int = 16, branches: int = 1, seed: int = 0) -> Tokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {
            "channels": 8,
            "channel_multipliers": (1, 1, 1),
            "num_res_blocks": 1,
            "z_channels": 8,
            "norm_groups": 4,
        }
        branch = partial(SingleGridQuantizer, codebook=partial(VQCodebook, codebook_size=codebook_size))
        quantizer = ProductQuantizer(branch, branches, 4 * branches)
        return Tokenizer(CNNEncoder(**sizes), quantizer, CNNDecoder(**sizes), RESOLUTION).eval()


class TinyImages(Dataset):
    """Smooth random colour images."""

    num_classes, resolution, name, crop_id = NUM_CLASSES, RESOLUTION, "tiny", "centre"

    def __init__(self, count: int, seed: int = 0, split: str = "train"):
        self.split = split
        coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        self.images = nn.functional.interpolate(coarse, RESOLUTION, mode="bilinear")
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int | list[int]) -> dict[str, Any]:
        if isinstance(i, list):
            return default_collate([self[one] for one in i])
        return {"image": self.images[i], "label": self.label(i), "index": i}

    def label(self, i: int) -> int:
        return i % NUM_CLASSES

    def without_augmentation(self) -> "TinyImages":
        return self

    def fingerprint(self) -> str:
        return f"tiny-{len(self)}-{self.seed}"


class Shares(Sampler[int]):
    """Contiguous ranges without padding or repeats."""

    def __init__(self, count: int):
        rank, world = distributed.rank(), distributed.world_size()
        self.own = range(count * rank // world, count * (rank + 1) // world)

    def __iter__(self) -> Iterator[int]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


class TinyData(lightning.LightningDataModule):
    """Serves TinyImages; `padded` uses torch's sampler that repeats samples."""

    def __init__(self, val: int = 23, train: int = 40, batch_size: int = 8, padded: bool = False):
        super().__init__()
        self.val, self.train = TinyImages(val, 1, "val"), TinyImages(train, 2)
        self.batch_size, self.padded = batch_size, padded
        self.reference_reads = 0

    def _loader(self, dataset: Dataset) -> DataLoader:
        if self.padded and distributed.is_distributed():
            sampler = DistributedSampler(dataset, shuffle=False, drop_last=False)
        else:
            sampler = Shares(len(dataset))
        return DataLoader(dataset, self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.val)

    def reference_loader(self, split: str) -> DataLoader:
        assert split == "train"
        self.reference_reads += 1
        return DataLoader(self.train, self.batch_size, sampler=Shares(len(self.train)))


class TinyGenerator(nn.Module):
    num_classes = NUM_CLASSES


class TinyStage(lightning.LightningModule):
    """Reconstructs, and 'generates' random tokens that depend on (seed, sample number, label)."""

    def __init__(self, codebook_size: int = 16, branches: int = 1, generator: bool = True):
        super().__init__()
        self.tokenizer, self.seed = tiny_tokenizer(codebook_size, branches), 0
        self.generator = TinyGenerator() if generator else None

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Tensor]:
        out = self.tokenizer(batch["image"])
        return {"reconstruction": out.reconstruction.clamp(-1, 1), "tokens": out.tokens, "z": out.z}

    def generate_tokens(self, labels: Tensor, index: Tensor) -> Tensor:
        quantizer = self.tokenizer.quantizer
        draws = IndexedRng(self.seed, index).uniform("tokens", quantizer.num_branches, quantizer.num_tokens)
        return (integers(draws, quantizer.codebook_size) + labels[:, None, None]) % quantizer.codebook_size


class TinyFeatures(FeatureExtractor):
    """Means of image quarters and their products: cheap, deterministic, sensitive to colour."""

    name, weights_id, num_features = "tiny", "none", 12
    input_size, resize, normalisation = RESOLUTION, "none", "x/255"

    def features(self, images_u8: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(images_u8.double() / 255, 2).flatten(1)
        return torch.sin(x * torch.arange(1, 13, device=x.device)).float() * 3


def validate(
    callbacks: list, stage: TinyStage | None = None, data: TinyData | None = None, **trainer: Any
) -> lightning.Trainer:
    """Run one validation epoch with the callbacks."""
    settings = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    if distributed.is_distributed():
        from lightning.pytorch.strategies import DDPStrategy

        os.environ.update(LOCAL_RANK=str(distributed.rank()), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        settings |= {
            "devices": distributed.world_size(),
            "strategy": DDPStrategy(process_group_backend="gloo"),
            "use_distributed_sampler": False,
        }
    runner = lightning.Trainer(
        callbacks=callbacks, enable_model_summary=False, num_sanity_val_steps=0, **(settings | trainer)
    )
    stage = TinyStage() if stage is None else stage
    runner.validate(stage, data or TinyData(), verbose=False)
    return runner
