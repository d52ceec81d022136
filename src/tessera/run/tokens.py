"""Token caches a run needs: made once from a tokenizer (and a generator), in parallel ranks, before training starts."""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from tessera.data import ImageDataset, build_token_cache
from tessera.data.views import Views
from tessera.errors import ConfigError
from tessera.generators.base import Generator
from tessera.generators.sampling import SamplingConfig
from tessera.rng import IndexedRng
from tessera.tokenizers import Tokenizer

log = logging.getLogger(__name__)

Encode = Callable[[dict[str, Tensor]], Tensor]


@dataclass
class TokenSource:
    """How to make the tokens of one data-set split.

    Attributes:
        folder: of the cache, named by content so that equal tokens are made once.
        dataset: the split's data set.
        tokenizer: defines the token space.
        encode: batch of images, labels and indices on the device -> (B, P, L) int64.
        models: the modules `encode` runs; moved to the device for building.
        views: crops of each image.
        extra: whatever else determines the tokens; recorded in the manifest and compared when opened.
        batch_size: of `encode`.
        num_workers: processes that read images.
        indices: numbers of the images to make tokens of; None: all.
    """

    folder: Path
    dataset: Any
    tokenizer: Tokenizer
    encode: Encode
    models: list[nn.Module]
    views: Views
    extra: dict[str, Any]
    batch_size: int
    num_workers: int = 0
    indices: list[int] | None = None


def _key(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def tokens_of_images(
    root: Path, dataset: ImageDataset, tokenizer: Tokenizer, views: Views | str, batch_size: int, num_workers: int = 0
) -> TokenSource:
    """Each image's own tokens (pretokenisation for generator training)."""
    views = Views.of(views)
    drawn = dataset.random_view_id if views.kind == "random" else None
    name = f"images-{_key(tokenizer.fingerprint(), dataset.fingerprint(), vars(views), drawn)}"

    def encode(batch: dict[str, Tensor]) -> Tensor:
        return tokenizer.tokenize(batch["image"])

    return TokenSource(root / name, dataset, tokenizer, encode, [tokenizer], views, {}, batch_size, num_workers)


def tokens_of_pairs(
    root: Path,
    dataset: Any,
    tokenizer: Tokenizer,
    generator: Generator,
    sampling: SamplingConfig,
    sigma: float,
    seed: int,
    batch_size: int,
    num_images: int | None = None,
    num_workers: int = 0,
) -> TokenSource:
    """Each image's tokens, of which all but a share sigma are replaced by the generator's own (decoder post-training).

    Args:
        sigma: preservation ratio in [0, 1]: probability that a token keeps the real image's value.
        seed: of the choice of images, the kept positions and the generator's draws; sample i depends on (seed, i).
        num_images: random images to make pairs of; None: all.

    Raises:
        ConfigError: sigma outside [0, 1], num_images outside [1, number of images].

    Source: RobusTok's paired data (arXiv 2509.12474), as tokens instead of PNG files.
    """
    if not 0.0 <= sigma <= 1.0:
        raise ConfigError(f"pairs.sigma={sigma} is outside [0, 1]; it is the share of tokens kept from the real image")
    if num_images is not None and not 1 <= num_images <= len(dataset):
        raise ConfigError(f"pairs.num_images={num_images} is outside [1, {len(dataset)}]; null takes all images")
    indices = None
    if num_images is not None:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
        indices = sorted(order[:num_images].tolist())
    generator_id = weights_fingerprint(generator)
    extra = {"sigma": sigma, "seed": seed, "generator": generator_id, "sampling": vars(sampling)}
    name = f"pairs-{_key(tokenizer.fingerprint(), dataset.fingerprint(), extra, num_images)}"

    def encode(batch: dict[str, Tensor]) -> Tensor:
        teacher = tokenizer.tokenize(batch["image"])
        rng = IndexedRng(seed, batch["index"])
        keep = rng.uniform("pairs/keep", *teacher.shape[1:]) < sigma
        return generator.generate(batch["label"], sampling, teacher=teacher, keep=keep, rng=rng)

    models: list[nn.Module] = [tokenizer, generator]
    folder = root / name
    return TokenSource(folder, dataset, tokenizer, encode, models, Views(), extra, batch_size, num_workers, indices)


def weights_fingerprint(module: nn.Module) -> str:
    """sha256 (first 16 hex digits) over a module's state dict."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class BuildTokens(Callback):
    """Builds a token cache when the ranks are up and before any loader opens it.

    Lightning calls `setup` on every rank inside the process group, so all devices share the work.
    """

    def __init__(self, source: TokenSource):
        self.source = source

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        build_tokens(self.source, trainer.strategy.root_device)


def build_tokens(source: TokenSource, device: torch.device | str = "cpu") -> Path:
    """Build (or complete, or find finished) the cache of `source` on this rank's device; returns its folder."""
    for module in source.models:
        module.to(device).eval()

    @torch.inference_mode()
    def encode(batch: dict[str, Tensor]) -> Tensor:
        # float32 whatever the trainer's precision, so that a cache doesn't depend on what it is made for
        with torch.autocast(torch.device(device).type, enabled=False):
            return source.encode({key: value.to(device) for key, value in batch.items()})

    return build_token_cache(
        source.folder,
        source.dataset,
        encode,
        tokenizer_fingerprint=source.tokenizer.fingerprint(),
        codebook_size=source.tokenizer.quantizer.codebook_size,
        shape=(source.tokenizer.quantizer.num_branches, source.tokenizer.quantizer.num_tokens),
        views=source.views,
        indices=source.indices,
        extra=source.extra,
        batch_size=source.batch_size,
        num_workers=source.num_workers,
    )
