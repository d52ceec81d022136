"""`eval.py task=compare`: the figures of somebody's images against a reference, without a model."""

import logging
from collections.abc import Sequence
from typing import Any

from tessera.errors import ConfigError
from tessera.metrics.comparison import compare
from tessera.metrics.image_sets import open_images
from tessera.metrics.reference import load_reference
from tessera.run.build import make
from tessera.run.ranks import in_ranks
from tessera.run.subject import Subject

log = logging.getLogger(__name__)


class Comparison:
    """FID, sFID, IS, precision, recall and KID of a set of images, whoever made it, against another.

    Args:
        a: the images to measure: an .npz or .npy (`arr_0` uint8 (N, H, W, 3), the layout of ADM's tools), or a folder.
        b: the reference: the same, or an .npz with stored statistics, such as ADM's published files.
        figures: some of `tessera.metrics.comparison.FIGURES`; None: all that extractor and reference allow.
        batch_size: per process.
        reference_id: name of the reference in the figures; None: that of the file.
        cache: folder that keeps what was measured of the reference; None: measure each time.

    Raises:
        ConfigError: a or b is missing.
    """

    def __init__(
        self,
        a: str | None = None,
        b: str | None = None,
        figures: Sequence[str] | None = None,
        batch_size: int = 64,
        reference_id: str | None = None,
        cache: str | None = None,
    ):
        for key, value in (("a", a), ("b", b)):
            if value is None:
                raise ConfigError(f"task.{key} is required; give an .npz or .npy file, or a folder of images")
        if batch_size < 1:
            raise ConfigError(f"task.batch_size={batch_size} must be at least 1")
        self.a, self.b, self.figures, self.batch_size = a, b, figures, batch_size
        self.reference_id, self.cache = reference_id, cache

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Raises:
            ConfigError: no `metrics`; figures that extractor and reference don't allow.
            MissingFileError, DataError: files that are missing, or no images.
        """
        subject.require("metrics")
        extractor, generated = make(subject.cfg.metrics.features), open_images(self.a)

        def measure(device: Any) -> list[Any]:
            options = {"batch_size": self.batch_size, "device": device}
            reference = load_reference(self.b, extractor, self.reference_id, cache=self.cache, **options)
            return compare(generated, reference, extractor, self.figures, **options)

        figures = in_ranks(subject.trainer(), measure, extractor)
        for figure in figures:
            for warning in figure.warnings:
                log.warning("%s: %s", figure.label, warning)
        return {"a": self.a, "b": self.b, "figures": figures}
