"""`eval.py task=generation`: the figures of a generator's images, sampled now, or saved before."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tessera.data.samples import TOKENS
from tessera.errors import ConfigError, DataError
from tessera.metrics.comparison import FIGURES, KEEPS_FEATURES, check_figures, chosen_figures
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.generated import Draws, TokenFile, check_classes, generated_figures, measure_generated
from tessera.metrics.image_sets import DatasetImageSet, ImageSet, open_images
from tessera.metrics.protocol import Figure
from tessera.metrics.reference import Reference, check_reference, load_reference
from tessera.metrics.set_measure import measure_set
from tessera.run.build import make
from tessera.run.load import check_classes as check_data_classes
from tessera.run.ranks import in_ranks
from tessera.run.subject import Subject

# KID is for few samples, and keeps all features
DEFAULT_FIGURES = tuple(name for name in FIGURES if name != "KID")


class Generation:
    """gFID, sFID, IS, precision, recall and KID of generated images, from one pass of the extractor.

    The images are, in this order: those of `images`; those of the tokens in `tokens`, decoded by the tokenizer; or the
    samples 0, 1, ... of the checkpoint's generator, class-balanced, which are those of `task=sample` and, with the same
    seed, those of the callback `gfid`.

    Args:
        figures: some of `tessera.metrics.comparison.FIGURES`; None: all but KID that extractor and reference allow.
        num_samples: to generate, or of the file's first tokens; None: `metrics.num_samples`, or all of the file.
        classes: of the samples, in turn; None: all. A choice is part of the figures' names.
        tokens: safetensors file with `tokens` (N, P, L) int64 and `labels` (N,).
        images: .npz or .npy file, or a folder, of finished images.
        batch_size: per process.
        reference: what they are compared with, see `load_reference`; None: `metrics.reference`, or else the training
            images of the data set.
        reference_id: name of the reference in the figures' names; None: its own.
        cache: folder that keeps what was measured of the reference; None: measure it each time.

    Raises:
        ConfigError: settings that exclude each other, or a size below 1.
    """

    def __init__(
        self,
        figures: Sequence[str] | None = None,
        num_samples: int | None = None,
        classes: Sequence[int] | None = None,
        tokens: str | None = None,
        images: str | None = None,
        batch_size: int = 64,
        reference: str | None = None,
        reference_id: str | None = None,
        cache: str | None = None,
    ):
        if tokens is not None and images is not None:
            raise ConfigError("task.tokens and task.images exclude each other; give one of them, or neither to sample")
        if classes is not None and (tokens is not None or images is not None or not classes):
            raise ConfigError("task.classes must list classes, and has no use with task.tokens or task.images")
        if images is not None and num_samples is not None:
            raise ConfigError("task.num_samples has no use with task.images, of which all are measured")
        for key, value, least in (("num_samples", num_samples, 2), ("batch_size", batch_size, 1)):
            if value is not None and value < least:
                raise ConfigError(f"task.{key}={value} must be at least {least}")
        self.figures, self.num_samples, self.classes = figures, num_samples, classes
        self.tokens, self.images, self.batch_size = tokens, images, batch_size
        self.reference, self.reference_id, self.cache = reference, reference_id, cache

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Raises:
            ConfigError: no `metrics`, or no checkpoint or data where they are needed; figures that extractor and
                reference don't allow; classes that the generator doesn't have.
            CheckpointError: a tokenizer of another token space.
            MissingFileError, DataError: files that are missing, or of other content.
        """
        subject.require("metrics")
        extractor = make(subject.cfg.metrics.features)
        check_figures(self.figures or (), extractor)
        reference = self.reference or subject.cfg.metrics.get("reference")
        if reference is not None:
            check_reference(reference, extractor)
        if self.images is not None:
            return self._of_images(subject, extractor, reference)
        return self._of_tokens(subject, extractor, reference)

    def _of_images(self, subject: Subject, extractor: FeatureExtractor, reference: str | None) -> dict[str, Any]:
        images = open_images(self.images)
        labels = images.labels if images.labels is not None else _labels_beside(images, Path(self.images))
        source = self._reference(subject, reference)

        def measure(device: torch.device) -> list[Figure]:
            wanted, against = self._against(source, extractor, device)
            keep = bool(KEEPS_FEATURES & set(wanted))
            measured = measure_set(images, extractor, self.batch_size, keep, "IS" in wanted, device)
            settings = {"images": self.images}
            return generated_figures(
                measured, against, extractor, wanted, labels, device, images.size, settings=settings
            )

        return {"images": self.images, "figures": in_ranks(subject.trainer(), measure)}

    def _of_tokens(self, subject: Subject, extractor: FeatureExtractor, reference: str | None) -> dict[str, Any]:
        num_classes = None
        settings: dict[str, Any] = {"tokens": self.tokens, "weights": str(subject.cfg.weights)}
        if self.tokens is not None:
            models = tokenizer = subject.decoder()
            samples: Draws | TokenFile = TokenFile(self.tokens, self.num_samples, "task")
            source = self._reference(subject, reference)
        else:
            models = subject.generation()
            tokenizer, num_classes = models.tokenizer, models.generator.num_classes
            check_classes("task.classes", self.classes, num_classes)
            source = self._reference(subject, reference)
            if isinstance(source, DatasetImageSet):
                check_data_classes(models.generator, source.dataset)
            count = self.num_samples or int(subject.cfg.metrics.num_samples)
            samples = Draws(models.generate_tokens, count, num_classes, self.classes)
            settings |= {"seed": models.seed, "sampling": str(models.sampling)}

        def measure(device: torch.device) -> list[Figure]:
            wanted, against = self._against(source, extractor, device)
            measured = measure_generated(samples, tokenizer.detokenize, extractor, wanted, self.batch_size, device)
            return generated_figures(
                measured,
                against,
                extractor,
                wanted,
                samples.labels,
                device,
                size=(tokenizer.resolution,) * 2,
                num_classes=num_classes,
                classes=samples.classes,
                settings=settings,
            )

        return {"tokens": self.tokens, "figures": in_ranks(subject.trainer(), measure, models)}

    def _reference(self, subject: Subject, reference: str | None) -> str | ImageSet:
        if reference is not None:
            return reference
        data = subject.data()
        return DatasetImageSet(data.images("train"), num_workers=data.num_workers)

    def _against(
        self, source: str | ImageSet, extractor: FeatureExtractor, device: torch.device
    ) -> tuple[list[str], Reference]:
        """The figures to measure and what to measure them against; all processes call it together."""
        keep = bool(KEEPS_FEATURES & set(self.figures or DEFAULT_FIGURES))
        found = load_reference(source, extractor, self.reference_id, keep, self.cache, self.batch_size, device)
        wanted = chosen_figures(self.figures, extractor, found)
        return [name for name in wanted if self.figures is not None or name in DEFAULT_FIGURES], found


def _labels_beside(images: ImageSet, path: Path) -> Tensor | None:
    """Classes of images that `task=sample` has written, from the file of their tokens in the same folder."""
    tokens = path.parent / TOKENS
    if not tokens.is_file():
        return None
    with safe_open(tokens, framework="pt") as file:
        labels = file.get_tensor("labels") if "labels" in file.keys() else None  # noqa: SIM118
    if labels is not None and len(labels) != len(images):
        raise DataError(f"{path} holds {len(images)} images but {tokens} {len(labels)} labels; sample them again")
    return labels
