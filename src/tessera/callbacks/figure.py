"""Base of the callbacks that measure a figure during validation."""

import logging
from functools import cache
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from tessera.callbacks.unique import Commit, UniqueSamples
from tessera.errors import ConfigError, DataError
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.image_sets import subset_numbers
from tessera.metrics.protocol import Figure

log = logging.getLogger(__name__)


class FigureCallback(Callback):
    """Measures figures over a validation epoch, logs them and keeps them in `figures`.

    Metrics and extractors belong to the callback, so that they are neither trained nor saved with the model.
    All processes measure their share; sums are added up at the end of the epoch. Figures are logged as
    `<prefix>/<figure>` (also for `ModelCheckpoint(monitor=...)`) with the protocol in the name.

    Subclasses implement `begin`, `measure` and `finish`.

    Args:
        every_n_validations: 1 measures in every validation epoch, 3 in every third, starting with the first.
        prefix: of the log keys; give two callbacks of the same class different ones.
        num_samples: validation images to measure, see `subset_numbers`; None: all.

    Attributes:
        figures: of the latest measurement.
        announced: say them at the end of training.
    """

    announced = True

    def __init__(self, every_n_validations: int = 1, prefix: str = "val", num_samples: int | None = None):
        if every_n_validations < 1:
            raise ConfigError(f"every_n_validations={every_n_validations} must be at least 1")
        if num_samples is not None and num_samples < 2:
            raise ConfigError(f"{type(self).__name__}: num_samples={num_samples} must be at least 2, or null for all")
        self.every_n_validations, self.prefix, self.subset = every_n_validations, prefix, num_samples
        self.chosen: Tensor | None = None  # (N,) bool over the data set
        self.figures: list[Figure] = []
        self.validations = 0
        self.active = False
        self.samples = UniqueSamples()

    @property
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """The cadence continues where it was after a resume."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Reset the metrics, on the module's device."""

    def measure(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
    ) -> Commit | None:
        """Measure a batch; returns what adds it to the sums, or None where batches don't matter."""

    def finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> list[Figure]:
        """Figures over all processes; called by all of them."""
        raise NotImplementedError

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.active = False
        if trainer.sanity_checking:
            return
        self.active = self.validations % self.every_n_validations == 0
        self.validations += 1
        if self.active:
            self.samples = UniqueSamples()
            self.chosen = self._subset(trainer)
            self.begin(trainer, pl_module)

    def _subset(self, trainer: lightning.Trainer) -> Tensor | None:
        if self.subset is None:
            return None
        chosen = torch.zeros(len(validation_dataset(trainer)), dtype=torch.bool)
        chosen[subset_numbers(len(chosen), self.subset, f"{type(self).__name__}: num_samples")] = True
        return chosen

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self.active:
            return
        outputs = outputs if isinstance(outputs, dict) else {}
        if self.chosen is not None:
            rows = self.chosen[batch["index"].cpu()]
            if not rows.any():
                return
            outputs, batch = _rows(outputs, rows), _rows(batch, rows)
        commit = self.measure(trainer, pl_module, outputs, batch)
        if commit is not None:
            if "index" not in batch:
                raise DataError(f"{type(self).__name__} needs batches with `index`, the data set index of each sample")
            self.samples.add(batch["index"], commit)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self.active:
            return
        self.samples.finish()
        self.figures = self.finish(trainer, pl_module)
        for figure in self.figures:
            # equal on all ranks already; sync_dist only keeps Lightning from warning
            self.log(f"{self.prefix}/{figure.key}", figure.value, sync_dist=True)

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for figure in self.figures if self.announced and trainer.is_global_zero else ():
            log.info(figure.describe())

    def needed(self, values: dict[str, Tensor], key: str, source: str) -> Tensor:
        """`values[key]`, or an error that names this callback."""
        if key not in values:
            raise ConfigError(
                f"{type(self).__name__} needs `{key}` from {source}, which this stage does not give; "
                "remove the callback from `callbacks`, or use it with a tokenizer's stage"
            )
        return values[key]


def _rows(values: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """A batch with the chosen (B,) rows alone."""
    return {
        key: value[rows.to(value.device)] if isinstance(value, Tensor) and value.shape[:1] == rows.shape else value
        for key, value in values.items()
    }


def validation_dataset(trainer: lightning.Trainer) -> Any:
    """The data set behind the (first) validation loader, None if there is none."""
    loaders = trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, list | tuple) and loaders else loaders
    return getattr(loader, "dataset", None)


def crop_id(dataset: Any) -> str:
    """Identity of the crop that makes the images, "" where the data set doesn't say."""
    return str(getattr(dataset, "crop_id", ""))


def warn_if_internal(extractor: FeatureExtractor, name: str) -> None:
    """Say once that figures of a small classifier's features are no image quality."""
    if not extractor.is_image_quality:
        _say_internal(name, extractor.name)


@cache
def _say_internal(name: str, extractor: str) -> None:
    log.info("%s[%s] compares models inside this project; it is not an image-quality measure", name, extractor)
