"""gFID and its company: generated images against the training images."""

from collections.abc import Sequence
from pathlib import Path

import lightning
import torch

from tessera.callbacks.figure import FigureCallback, warn_if_internal
from tessera.errors import ConfigError
from tessera.metrics.comparison import KEEPS_FEATURES, check_figures, chosen_figures
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.generated import Draws, TokenFile, check_classes, generated_figures, measure_generated
from tessera.metrics.image_sets import DatasetImageSet
from tessera.metrics.protocol import Figure
from tessera.metrics.reference import Reference, check_reference, load_reference


class GenerationFID(FigureCallback):
    """Frechet distance of generated images to the training images, and other figures of the same images.

    Sample number i has class i mod C (or of the chosen ones, in turn) and random draws of its own, so the set does not
    depend on batch size or the number of processes. With `tokens` the images of a fixed file are decoded instead: two
    decoders compared on the same tokens differ by no sampling noise.

    Args:
        extractor: of the features.
        num_samples: images to generate; None with `tokens`: all in the file.
        batch_size: per process.
        classes: of the samples; None: all. A choice is part of the figures' names.
        seed: which set of samples: numbers seed * num_samples and up.
        tokens: safetensors file with `tokens` (N, P, L) int64 and `labels` (N,).
        save_tokens: where to write the generated tokens as such a file.
        reference: what the images are compared with, see `load_reference`; None: the data module's training images,
            without augmentation.
        reference_id: name of the reference in the figures' names; None: the file's, or `<data set>-train`.
        cache: folder that keeps what was measured of the reference, by content; None: measure it in each run.
        figures: some of `tessera.metrics.comparison.FIGURES`; FID is named gFID.
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
        figures: Sequence[str] = ("FID",),
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
        if tokens is not None and save_tokens is not None:
            raise ConfigError("callbacks.gfid.save_tokens has nothing to save when callbacks.gfid.tokens is given")
        if not figures:
            raise ConfigError("callbacks.gfid.figures is empty; remove the callback instead")
        # early, so that what is wrong is found before training
        check_figures(figures, extractor)
        self.file = None if tokens is None else TokenFile(tokens, num_samples, "callbacks.gfid")
        if reference is not None:
            check_reference(reference, extractor)
        self.extractor, self.num_samples, self.batch_size = extractor, num_samples, batch_size
        self.classes, self.seed, self.tokens, self.save_tokens = classes, seed, tokens, save_tokens
        self.source, self.reference_id, self.cache = reference, reference_id, cache
        self.wanted = list(figures)
        self.reference: Reference | None = None
        warn_if_internal(extractor, "gFID")

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        # before training, not at the first validation
        if self.classes is not None and (generator := getattr(pl_module, "generator", None)) is not None:
            check_classes("callbacks.gfid.classes", self.classes, generator.num_classes)

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.file is None and not hasattr(pl_module, "generate_tokens"):
            raise ConfigError(
                "callbacks.gfid needs a stage with a generator, or a file of tokens (callbacks.gfid.tokens)"
            )
        self.extractor.to(pl_module.device)

    @torch.no_grad()
    def finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> list[Figure]:
        device = pl_module.device
        if self.reference is None:
            self.reference = self._measured_reference(trainer, device)
            chosen_figures(self.wanted, self.extractor, self.reference)  # for its check, before the work
        samples = self.file or self._draws(trainer, pl_module)
        measured = measure_generated(
            samples,
            pl_module.tokenizer.detokenize,
            self.extractor,
            self.wanted,
            self.batch_size,
            device,
            self.save_tokens,
        )
        return generated_figures(
            measured,
            self.reference,
            self.extractor,
            self.wanted,
            samples.labels,
            device,
            size=(pl_module.tokenizer.resolution,) * 2,
            classes=samples.classes,
            settings={
                "seed": self.seed,
                "tokens": None if samples.path is None else str(samples.path),
                "sampling": str(getattr(pl_module, "sampling", None)),
            },
        )

    def _draws(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> Draws:
        found = getattr(pl_module.generator, "num_classes", None)
        if not found and getattr(trainer, "datamodule", None) is not None:
            found = getattr(trainer.datamodule.reference_loader("train").dataset, "num_classes", None)
        if not found:
            raise ConfigError("callbacks.gfid can't tell the number of classes: the generator has no `num_classes`")
        offset = self.seed * self.num_samples
        return Draws(pl_module.generate_tokens, self.num_samples, int(found), self.classes, offset)

    def _measured_reference(self, trainer: lightning.Trainer, device: torch.device) -> Reference:
        source = self.source
        if source is None:
            if getattr(trainer, "datamodule", None) is None:
                raise ConfigError("callbacks.gfid.reference is needed where the trainer has no data module")
            loader = trainer.datamodule.reference_loader("train")
            source = DatasetImageSet(loader.dataset, num_workers=loader.num_workers)
        keep = bool(KEEPS_FEATURES & set(self.wanted))
        return load_reference(source, self.extractor, self.reference_id, keep, self.cache, self.batch_size, device)
