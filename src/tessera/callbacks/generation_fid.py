"""gFID: generated images against the statistics of the training images."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tessera import distributed
from tessera.callbacks.figure import FigureCallback, crop_id, warn_if_internal
from tessera.errors import ConfigError, DataError, MissingFileError
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.fid import FrechetDistance
from tessera.metrics.protocol import Figure, Protocol, expected_bias
from tessera.metrics.statistics import Statistics, cached_statistics

log = logging.getLogger(__name__)


def balanced_labels(index: Tensor, num_classes: int) -> Tensor:
    """Class of sample number `index`: 0, 1, ..., C-1, 0, ... (any C consecutive samples cover all C)."""
    return index % num_classes


def check_classes(callback: str, classes: Sequence[int] | None, num_classes: int) -> None:
    """Refuse chosen classes that a generator doesn't have.

    Raises:
        ConfigError: names the callback.
    """
    for label in classes or ():
        if not 0 <= label < num_classes:
            raise ConfigError(
                f"callbacks.{callback}.classes has {label}, outside of the generator's classes [0, {num_classes})"
            )


def shard(count: int, rank: int, world: int) -> range:
    """Contiguous share of `count` samples; together the shares hold every sample once."""
    return range(count * rank // world, count * (rank + 1) // world)


class GenerationFID(FigureCallback):
    """Frechet distance of generated images to the training images.

    Sample number i has class i mod C (or of the chosen ones, in turn) and random draws of its own, so the set does not
    depend on batch size or the number of processes. With `tokens` the images of a fixed file are decoded instead: two
    decoders compared on the same tokens differ by no sampling noise.

    Args:
        extractor: of the features.
        num_samples: images to generate; None with `tokens`: all in the file.
        batch_size: per process.
        classes: of the samples; None: all. A choice is part of the figure's name.
        seed: which set of samples: numbers seed * num_samples and up.
        tokens: safetensors file with `tokens` (N, P, L) int64 and `labels` (N,).
        save_tokens: where to write the generated tokens as such a file.
        reference: .npz statistics; None: of the data module's training images, without augmentation.
        reference_id: name of the reference in the figure's name; None: the file's, or `<data set>-train`.
        cache: folder that keeps computed reference statistics by content; None: compute them in each run.
        every_n_validations, prefix: see `FigureCallback`.

    Source: openai/guided-diffusion, evaluations; 50 per class as in LlamaGen and VAR.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        num_samples: int | None = None,
        batch_size: int = 64,
        classes: Sequence[int] | None = None,
        seed: int = 0,
        tokens: str | Path | None = None,
        save_tokens: str | Path | None = None,
        reference: str | Path | None = None,
        reference_id: str | None = None,
        cache: str | Path | None = None,
        every_n_validations: int = 1,
        prefix: str = "val",
    ):
        super().__init__(every_n_validations, prefix)
        if num_samples is None and tokens is None:
            raise ConfigError("callbacks.gfid.num_samples is needed unless callbacks.gfid.tokens gives a token file")
        if num_samples is not None and num_samples < 2:
            raise ConfigError(f"callbacks.gfid.num_samples={num_samples} must be at least 2")
        if batch_size < 1:
            raise ConfigError(f"callbacks.gfid.batch_size={batch_size} must be at least 1")
        if classes is not None and (tokens is not None or not classes):
            raise ConfigError("callbacks.gfid.classes must list classes, and has no use with callbacks.gfid.tokens")
        if tokens is not None and not Path(tokens).is_file():
            raise MissingFileError(f"callbacks.gfid.tokens={tokens} does not exist")
        if tokens is not None and save_tokens is not None:
            raise ConfigError("callbacks.gfid.save_tokens has nothing to save when callbacks.gfid.tokens is given")
        if reference is not None:
            # early, so that a wrong file is found before training
            Statistics.load(reference, extractor.identity)
        self.extractor, self.num_samples, self.batch_size = extractor, num_samples, batch_size
        self.classes, self.seed = classes, seed
        self.tokens, self.save_tokens, self.cache = tokens, save_tokens, cache
        self.reference, self.reference_id = reference, reference_id
        self.statistics: Statistics | None = None
        warn_if_internal(extractor, "gFID")

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        # before training, not at the first validation
        if self.classes is not None and (generator := getattr(pl_module, "generator", None)) is not None:
            check_classes("gfid", self.classes, generator.num_classes)

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.tokens is None and not hasattr(pl_module, "generate_tokens"):
            raise ConfigError(
                "callbacks.gfid needs a stage with a generator, or a file of tokens (callbacks.gfid.tokens)"
            )
        self.extractor.to(pl_module.device)

    @torch.no_grad()
    def finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> list[Figure]:
        if self.statistics is None:
            self.statistics = self._reference_statistics(trainer, pl_module.device)
        metric = FrechetDistance(self.extractor.num_features, self.statistics).to(pl_module.device)
        kept: list[tuple[Tensor, Tensor]] = []
        for index, tokens, labels in self._batches(trainer, pl_module):
            metric.update(self.extractor(pl_module.tokenizer.detokenize(tokens)), real=False, index=index)
            kept.append((tokens.cpu(), labels.cpu()))
        value, reference, fake = metric.summary()
        labels = self._gather(kept)
        counts = torch.bincount(labels)
        if fake.n != len(labels):
            raise DataError(f"{len(labels)} samples were generated but {fake.n} measured")
        extra = {
            "classes": int((counts > 0).sum()),
            "per_class": sorted({int(count) for count in counts if count > 0}),
            "seed": self.seed,
            "chosen": self.classes and list(self.classes),
            "tokens": None if self.tokens is None else str(self.tokens),
            "sampling": str(getattr(pl_module, "sampling", None)),
        }
        protocol = Protocol(
            extractor=self.extractor.name,
            weights_id=self.extractor.weights_id,
            resize=self.extractor.resize,
            crop=crop_id(self._reference_dataset(trainer)),
            reference=reference.source,
            reference_samples=reference.n,
            samples=fake.n,
            extra=extra,
            in_label=("classes",) if self.classes else (),
        )
        return [Figure("gFID", value, protocol, {"expected_bias": expected_bias(fake.sigma, fake.n, reference.n)})]

    def _batches(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(sample numbers, tokens, labels) of this process's share."""
        device = pl_module.device
        rank, world = distributed.rank(), distributed.world_size()
        if self.tokens is not None:
            with safe_open(self.tokens, framework="pt") as file:
                if not {"tokens", "labels"} <= set(file.keys()):
                    raise DataError(f"callbacks.gfid.tokens={self.tokens} lacks `tokens` or `labels`")
                tokens, labels = file.get_slice("tokens"), file.get_slice("labels")
                available = tokens.get_shape()[0]
                if (self.num_samples or 0) > available:
                    raise DataError(
                        f"callbacks.gfid.num_samples={self.num_samples} but {self.tokens} holds {available}"
                    )
                own = shard(self.num_samples or available, rank, world)
                for start in range(own.start, own.stop, self.batch_size):
                    rows = slice(start, min(start + self.batch_size, own.stop))
                    index = torch.arange(rows.start, rows.stop, device=device)
                    yield index, tokens[rows].to(device), labels[rows].to(device)
            return
        own, offset = shard(self.num_samples, rank, world), self.seed * self.num_samples
        num_classes = self._num_classes(trainer, pl_module)
        classes = torch.tensor(list(self.classes or range(num_classes)), device=device)
        for start in range(own.start, own.stop, self.batch_size):
            index = torch.arange(start, min(start + self.batch_size, own.stop), device=device)
            labels = classes[balanced_labels(index, len(classes))]
            yield index, pl_module.generate_tokens(labels, index + offset), labels

    def _num_classes(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> int:
        generator = getattr(pl_module, "generator", None)
        found = getattr(generator, "num_classes", None) or getattr(
            self._reference_dataset(trainer), "num_classes", None
        )
        if not found:
            raise ConfigError("callbacks.gfid can't tell the number of classes: the generator has no `num_classes`")
        return int(found)

    def _gather(self, kept: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Labels of all processes; rank 0 saves the tokens where asked."""
        labels = torch.cat([labels for _, labels in kept] or [torch.empty(0, dtype=torch.int64)])
        tokens = torch.cat([tokens for tokens, _ in kept]) if kept and self.save_tokens is not None else None
        if distributed.is_distributed():
            gathered: list = [None] * distributed.world_size()
            torch.distributed.all_gather_object(gathered, (labels, tokens))
            labels = torch.cat([part for part, _ in gathered])
            parts = [part for _, part in gathered if part is not None]
            tokens = torch.cat(parts) if parts else None
        if tokens is not None and distributed.rank() == 0:
            Path(self.save_tokens).parent.mkdir(parents=True, exist_ok=True)
            save_file({"tokens": tokens.contiguous(), "labels": labels.contiguous()}, self.save_tokens)
            log.info("generated tokens in %s", self.save_tokens)
        return labels

    def _reference_dataset(self, trainer: lightning.Trainer) -> object:
        if self.reference is not None or getattr(trainer, "datamodule", None) is None:
            return None
        return trainer.datamodule.reference_loader("train").dataset

    def _reference_statistics(self, trainer: lightning.Trainer, device: torch.device) -> Statistics:
        """Statistics of the reference, from its file, the cache, or the training images."""
        if self.reference is not None:
            statistics = Statistics.load(self.reference, self.extractor.identity)
            statistics.source = self.reference_id or statistics.source
            return statistics
        if getattr(trainer, "datamodule", None) is None:
            raise ConfigError("callbacks.gfid.reference is needed where the trainer has no data module")
        loader = trainer.datamodule.reference_loader("train")
        dataset = loader.dataset
        name = self.reference_id or f"{getattr(dataset, 'name', type(dataset).__name__.lower())}-train"

        def compute() -> Statistics:
            metric = FrechetDistance(self.extractor.num_features, sides=("real",)).to(device)
            for batch in loader:
                metric.update(self.extractor(batch["image"].to(device)), real=True, index=batch["index"])
            with metric.sync_context():
                found = metric.statistics(real=True)
            if hasattr(dataset, "__len__") and found.n != len(dataset):
                raise DataError(
                    f"the reference statistics cover {found.n} samples of {len(dataset)}; the data module's "
                    "reference_loader must give every image exactly once over all processes"
                )
            log.info("reference statistics of %s from %d images", name, found.n)
            return Statistics(found.mu, found.sigma, found.n, self.extractor.identity, name)

        statistics = cached_statistics(self.cache, dataset.fingerprint(), self.extractor.identity, compute)
        statistics.source = name
        return statistics
