"""Pictures of what the models do: reconstructions of the same images every time, and samples per class."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from tessera import distributed
from tessera.callbacks.figure import FigureCallback
from tessera.data import tile, write_png
from tessera.errors import ConfigError
from tessera.metrics.generated import check_classes
from tessera.metrics.protocol import Figure
from tessera.perturbation.grid import scaled_deltas, site_draws
from tessera.perturbation.nearest import perturb_tokens, ranks

log = logging.getLogger(__name__)


def log_image(trainer: lightning.Trainer, key: str, image: Tensor) -> None:
    """Hand an image (3, H, W) uint8 to every logger that can show one."""
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key, [image.permute(1, 2, 0).numpy()], step=trainer.global_step)
        elif hasattr(logger.experiment, "add_image"):
            logger.experiment.add_image(key, image, trainer.global_step)


class ImageGrid(FigureCallback):
    """Shows image grids in the logger and writes them as PNG files.

    Stages that reconstruct give `reconstruction`: one row each of inputs, reconstructions and reconstructions
    from perturbed tokens, of the first `num_images` validation images. Stages with a generator give
    `samples`: one column per class. The images and random draws are the same every time.

    Args:
        num_images: images per reconstruction grid.
        samples_per_class: rows of the sample grid; 0 shows none.
        num_classes: columns of the sample grid, at most the number of classes.
        classes: of the columns instead; None: the first `num_classes`.
        alpha, delta: of the perturbed row; delta None: the middle one of the pFID grid. alpha 0 leaves the
            row out.
        folder: of the PNG files; None: `images` in the trainer's root folder.
        every_n_validations, prefix: see `FigureCallback`; the prefix also begins file names.
    """

    def __init__(
        self,
        num_images: int = 8,
        samples_per_class: int = 4,
        num_classes: int = 10,
        classes: Sequence[int] | None = None,
        alpha: float = 0.7,
        delta: int | None = None,
        folder: str | Path | None = None,
        every_n_validations: int = 1,
        prefix: str = "val",
    ):
        super().__init__(every_n_validations, prefix)
        for key, value, low in (
            ("num_images", num_images, 1),
            ("samples_per_class", samples_per_class, 0),
            ("num_classes", num_classes, 1),
            ("delta", delta if delta is not None else 1, 1),
        ):
            if value < low:
                raise ConfigError(f"callbacks.image_grid.{key}={value} must be at least {low}")
        if not 0 <= alpha <= 1:
            raise ConfigError(f"callbacks.image_grid.alpha={alpha} is outside [0, 1]")
        if classes is not None and not classes:
            raise ConfigError("callbacks.image_grid.classes is empty; list classes, or set it to null")
        self.num_images, self.samples_per_class = num_images, samples_per_class
        self.num_classes, self.classes = num_classes, classes
        self.alpha, self.delta, self.folder = alpha, delta, folder
        self.rows: list[Tensor] = []
        self.shown = 0
        self.paths: list[Path] = []

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if self.classes is not None and (generator := getattr(pl_module, "generator", None)) is not None:
            check_classes("callbacks.image_grid.classes", self.classes, generator.num_classes)

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.rows, self.shown = [], 0

    @torch.no_grad()
    def measure(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
    ) -> None:
        missing = self.num_images - self.shown
        # the first process has the first images
        if missing <= 0 or "reconstruction" not in outputs or distributed.rank() != 0:
            return
        images = batch["image"][:missing]
        parts = [images, outputs["reconstruction"][:missing]]
        if self.alpha > 0:
            parts.append(self._perturbed(pl_module.tokenizer, images, batch["index"][:missing]))
        self.rows.append(torch.stack([part.float().cpu() for part in parts]))  # (parts, b, 3, H, W)
        self.shown += len(images)

    def _perturbed(self, tokenizer: Any, images: Tensor, index: Tensor) -> Tensor:
        """Reconstructions from perturbed tokens, in [-1, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            z = tokenizer.encode(images).float()
            quantizer = tokenizer.quantizer
            deltas = scaled_deltas(quantizer.codebook_size)
            delta = min(self.delta or deltas[len(deltas) // 2], quantizer.codebook_size)
            neighbors = quantizer.neighbors(z, delta)
            nearest = neighbors[..., 0]
            site, rank = site_draws(0, index.to(images.device), *nearest.shape[1:])
            return tokenizer.detokenize(perturb_tokens(nearest, neighbors, site, ranks(rank, delta), self.alpha))

    @torch.no_grad()
    def finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> list[Figure]:
        if distributed.rank() != 0:  # drawing takes no collective
            return []
        if self.rows:
            rows = torch.cat(self.rows, dim=1)
            self._show(trainer, "reconstruction", tile(rows.flatten(0, 1), rows.shape[1]))
        if self.samples_per_class and getattr(pl_module, "generator", None) is not None:
            classes = self.classes or range(min(self.num_classes, pl_module.generator.num_classes))
            labels = torch.tensor(list(classes), device=pl_module.device).repeat(self.samples_per_class)
            # sample numbers of their own range, apart from those that gFID measures
            index = torch.arange(len(labels), device=pl_module.device) + (1 << 40)
            images = pl_module.tokenizer.detokenize(pl_module.generate_tokens(labels, index))
            self._show(trainer, "samples", tile(images.float().cpu(), len(classes)))
        return []

    def _show(self, trainer: lightning.Trainer, name: str, image: Tensor) -> None:
        log_image(trainer, f"{self.prefix}/{name}", image)
        folder = Path(self.folder) if self.folder is not None else Path(trainer.default_root_dir) / "images"
        path = folder / f"{self.prefix.replace('/', '_')}_{name}_step{trainer.global_step:08d}.png"
        # small images are unreadable at their own size
        write_png(path, image, scale=max(1, 512 // max(image.shape[1:])))
        self.paths.append(path)
        log.info("%s: %s", name, path)
