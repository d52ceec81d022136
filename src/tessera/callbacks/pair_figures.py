"""Base of the callbacks that compare reconstructions with the very images that entered the tokenizer."""

from typing import Any

import lightning
from torch import Tensor

from tessera.callbacks.figure import FigureCallback, crop_id, validation_dataset
from tessera.callbacks.unique import Commit
from tessera.metrics.pair_measure import PairMeasure
from tessera.metrics.protocol import Figure


class PairFigures(FigureCallback):
    """Measures pairs, and only pairs: statistics of another set or crop can't be used by mistake.

    Args:
        pairs: what is measured.
        options: see `FigureCallback`.
    """

    def __init__(self, pairs: PairMeasure, **options: Any):
        super().__init__(**options)
        self.pairs = pairs

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.pairs.begin(pl_module.device)

    def measure(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
    ) -> Commit:
        images = self.needed(batch, "image", "the data")
        reconstructions = self.needed(outputs, "reconstruction", "validation_step")
        return self.pairs.measure(reconstructions, images, batch.get("index"))

    def finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> list[Figure]:
        return self.pairs.finish(self.samples.unique, crop_id(validation_dataset(trainer)))
