"""pFID during validation."""

from collections.abc import Sequence

import lightning
from torch import Tensor

from tessera.callbacks.figure import FigureCallback, crop_id, validation_dataset, warn_if_internal
from tessera.callbacks.unique import Commit
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.perturbed_fid import PerturbedFrechet
from tessera.metrics.protocol import Figure
from tessera.perturbation.grid import ALPHAS, PerturbationGrid


class PerturbedFID(FigureCallback):
    """Mean rFID over a grid of perturbation strengths, all images perturbed: see `PerturbationGrid`.

    Args:
        extractor: of the features.
        alphas, deltas, seeds, neighbors_of, scales, branches: see `PerturbationGrid`; named in the figure's label where
            they differ from the protocol.
        num_samples, every_n_validations, prefix: see `FigureCallback`.

    Raises:
        ConfigError: values out of range; before the first validation also: settings that do not fit the tokenizer.

    Source: arXiv:2503.08354, section 3; common random numbers are ours.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        alphas: Sequence[float] = ALPHAS,
        deltas: Sequence[int] | None = None,
        seeds: Sequence[int] = (0,),
        neighbors_of: str = "latent",
        scales: Sequence[int] | None = None,
        branches: Sequence[int] | None = None,
        num_samples: int | None = None,
        every_n_validations: int = 1,
        prefix: str = "val",
    ):
        super().__init__(every_n_validations, prefix, num_samples)
        self.grid = PerturbationGrid(alphas, deltas, seeds, neighbors_of, scales, branches)
        self.sums = PerturbedFrechet(extractor, self.grid)
        warn_if_internal(extractor, "pFID")

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Refuse impossible settings before training starts, not in the first validation."""
        self.grid.check(pl_module.tokenizer.quantizer)

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.sums.begin(pl_module.tokenizer, pl_module.device)

    def measure(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
    ) -> Commit:
        images = self.needed(batch, "image", "the data")
        # under mixed precision the validation step's latents are rounded; the protocol is float32
        usable = trainer.precision in ("32-true", "64-true")
        return self.sums.measure(pl_module.tokenizer, images, batch["index"], outputs.get("z") if usable else None)

    def finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> list[Figure]:
        crop = crop_id(validation_dataset(trainer))
        return [self.sums.figure(pl_module.tokenizer, self.samples.unique, crop)]
