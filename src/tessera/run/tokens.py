"""Token caches that a run needs: made once, in parallel ranks, before training starts (those of pairs: pairs.py)."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from tessera.data import ImageDataset, build_token_cache
from tessera.data.views import Views
from tessera.tokenizers import Tokenizer

Encode = Callable[[dict[str, Tensor]], Any]


@dataclass(kw_only=True)
class TokenSource:
    """How to make the tokens of one data-set split.

    Attributes:
        folder: of the cache, named by content so that equal tokens are made once.
        dataset: the split's data set.
        tokenizer: defines the token space.
        encode: batch of images, labels and indices on the device -> what `fill` stores; here (B, P, L) int64.
        models: the modules `encode` runs; moved to the device for building.
        batch_size: of `encode`.
        num_workers: processes that read images.
        views: crops of each image.
    """

    folder: Path
    dataset: Any
    tokenizer: Tokenizer
    encode: Encode
    models: list[nn.Module]
    batch_size: int
    num_workers: int = 0
    views: Views = field(default_factory=Views)

    def token_space(self) -> dict[str, Any]:
        """What a cache's manifest says about the tokenizer."""
        quantizer = self.tokenizer.quantizer
        return {
            "tokenizer_fingerprint": self.tokenizer.fingerprint(),
            "codebook_size": quantizer.codebook_size,
            "shape": (quantizer.num_branches, quantizer.num_tokens),
        }

    def fill(self, encode: Encode) -> Path:
        """Build (or complete, or find finished) the cache, with `encode` made ready for the device."""
        return build_token_cache(
            self.folder,
            self.dataset,
            encode,
            **self.token_space(),
            views=self.views,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )


def content_key(*facts: Any) -> str:
    """12 hex digits that name a cache by what determines its content."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def tokens_of_images(
    root: Path, dataset: ImageDataset, tokenizer: Tokenizer, views: Views | str, batch_size: int, num_workers: int = 0
) -> TokenSource:
    """Each image's own tokens (pretokenisation for generator training)."""
    views = Views.of(views)
    drawn = dataset.random_view_id if views.kind == "random" else None
    name = f"images-{content_key(tokenizer.fingerprint(), dataset.fingerprint(), vars(views), drawn)}"

    def encode(batch: dict[str, Tensor]) -> Tensor:
        return tokenizer.tokenize(batch["image"])

    return TokenSource(
        folder=root / name,
        dataset=dataset,
        tokenizer=tokenizer,
        encode=encode,
        models=[tokenizer],
        batch_size=batch_size,
        num_workers=num_workers,
        views=views,
    )


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
    def encode(batch: dict[str, Tensor]) -> Any:
        # float32 whatever the trainer's precision, so that a cache doesn't depend on what it is made for
        with torch.autocast(torch.device(device).type, enabled=False):
            return source.encode({key: value.to(device) for key, value in batch.items()})

    return source.fill(encode)
