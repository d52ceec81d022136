"""`eval.py task=compare`: the figures of somebody's images against a reference, without a model."""

from collections.abc import Sequence
from typing import Any

import torch

from tessera.errors import ConfigError
from tessera.metrics.comparison import KEEPS_FEATURES, compare, compare_pairs
from tessera.metrics.image_sets import open_images
from tessera.metrics.protocol import Figure
from tessera.metrics.reference import load_reference
from tessera.run.build import make
from tessera.run.ranks import in_ranks
from tessera.run.subject import Subject


class Comparison:
    """FID, sFID, IS, precision, recall and KID of a set of images, whoever made it, against another.

    Args:
        a: the images to measure: an .npz or .npy (`arr_0` uint8 (N, H, W, 3), the layout of ADM's tools), or a folder.
        b: the reference: the same, or an .npz with stored statistics, such as ADM's published files.
        pairs: a are reconstructions of b, image by image: rFID, PSNR, SSIM, and LPIPS where `metrics.lpips` gives its
            network.
        figures: some of `tessera.metrics.comparison.FIGURES`, or of `PAIR_FIGURES`; None: all that extractor and
            reference allow.
        batch_size: per process.
        reference_id: name of the reference in the figures; None: that of the file.
        cache: folder that keeps what was measured of the reference; None: measure each time.

    Raises:
        ConfigError: a or b is missing; a reference_id for pairs, whose reference is their inputs.
    """

    def __init__(
        self,
        a: str | None = None,
        b: str | None = None,
        pairs: bool = False,
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
        if pairs and reference_id is not None:
            raise ConfigError("task.reference_id has no use with task.pairs=true, where the reference is the inputs")
        self.a, self.b, self.pairs, self.figures, self.batch_size = a, b, pairs, figures, batch_size
        self.reference_id, self.cache = reference_id, cache

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Raises:
            ConfigError: no `metrics`; figures that extractor and reference don't allow.
            MissingFileError, DataError: files that are missing, or no images; pairs that don't belong together.
        """
        subject.require("metrics")
        extractor, images = make(subject.cfg.metrics.features), open_images(self.a)
        lpips = make(subject.cfg.metrics.get("lpips")) if self.pairs else None

        def measure(device: torch.device) -> list[Figure]:
            options = {"batch_size": self.batch_size, "device": device}
            if self.pairs:
                return compare_pairs(images, open_images(self.b), extractor, lpips, self.figures, **options)
            keep = self.figures is None or bool(KEEPS_FEATURES & set(self.figures))
            reference = load_reference(self.b, extractor, self.reference_id, keep, self.cache, **options)
            return compare(images, reference, extractor, self.figures, **options)

        return {"a": self.a, "b": self.b, "pairs": self.pairs, "figures": in_ranks(subject.trainer(), measure)}
