"""rFID: reconstructions against the very images that entered the tokenizer."""

import lightning
from torch import Tensor

from tessera.callbacks.figure import FigureCallback, frechet_protocol, warn_if_internal
from tessera.callbacks.unique import Commit
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.fid import FrechetDistance
from tessera.metrics.protocol import Figure


class ReconstructionFID(FigureCallback):
    """Frechet distance of reconstructions to their inputs over the validation set.

    Takes pairs only: external statistics of another set or crop can't be used by mistake.

    Args:
        extractor: of the features.
        every_n_validations, prefix: see `FigureCallback`.

    Source: LlamaGen, XQ-GAN and RobusTok report it on ImageNet's 50 000 validation images.
    """

    def __init__(self, extractor: FeatureExtractor, every_n_validations: int = 1, prefix: str = "val"):
        super().__init__(every_n_validations, prefix)
        self.extractor = extractor
        self.metric = FrechetDistance(extractor.num_features)
        warn_if_internal(extractor, "rFID")

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.extractor.to(pl_module.device)
        self.metric.to(pl_module.device).reset()

    def measure(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
    ) -> Commit:
        real = self.extractor(self.needed(batch, "image", "the data"))
        fake = self.extractor(self.needed(outputs, "reconstruction", "validation_step"))

        def commit(mask: Tensor) -> None:
            self.metric.update(real, real=True, mask=mask, index=batch["index"])
            self.metric.update(fake, real=False, mask=mask, index=batch["index"])

        return commit

    def finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> list[Figure]:
        value, _, _ = self.metric.summary()
        return [Figure("rFID", value, frechet_protocol(self.extractor, trainer, self.samples))]
