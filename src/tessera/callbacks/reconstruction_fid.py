"""rFID: reconstructions against the very images that entered the tokenizer."""

from tessera.callbacks.figure import warn_if_internal
from tessera.callbacks.pair_figures import PairFigures
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.pair_measure import PairMeasure


class ReconstructionFID(PairFigures):
    """Frechet distance of reconstructions to their inputs over the validation set.

    Args:
        extractor: of the features.
        num_samples, every_n_validations, prefix: see `FigureCallback`.

    Source: LlamaGen, XQ-GAN and RobusTok report it on ImageNet's 50 000 validation images.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        every_n_validations: int = 1,
        prefix: str = "val",
        num_samples: int | None = None,
    ):
        pairs = PairMeasure(["rFID"], extractor)
        super().__init__(pairs, every_n_validations=every_n_validations, prefix=prefix, num_samples=num_samples)
        warn_if_internal(extractor, "rFID")
