"""PSNR and SSIM of reconstructions over the validation set."""

import lightning
from torch import Tensor

from tessera.callbacks.figure import FigureCallback, crop_id, validation_dataset
from tessera.callbacks.unique import Commit
from tessera.metrics.protocol import Figure, Protocol
from tessera.metrics.reconstruction import PSNR, SSIM


class ReconstructionQuality(FigureCallback):
    """Mean per-image PSNR and SSIM, both sides rounded to uint8.

    Args:
        ssim_window: "uniform7" or "gauss11"; part of the figure's name.
        infinite: what exact reconstructions count in the PSNR, see `PSNR`.
        every_n_validations, prefix: see `FigureCallback`.
    """

    def __init__(
        self,
        ssim_window: str = "uniform7",
        infinite: str | float = "exclude",
        every_n_validations: int = 1,
        prefix: str = "val",
    ):
        super().__init__(every_n_validations, prefix)
        self.psnr, self.ssim = PSNR(infinite=infinite), SSIM(window=ssim_window)

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for metric in (self.psnr, self.ssim):
            metric.to(pl_module.device).reset()

    def measure(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
    ) -> Commit:
        images = self.needed(batch, "image", "the data")
        reconstruction = self.needed(outputs, "reconstruction", "validation_step")
        values = [(metric, metric.values(reconstruction, images)) for metric in (self.psnr, self.ssim)]

        def commit(mask: Tensor) -> None:
            for metric, per_image in values:
                metric.add(per_image, mask)

        return commit

    def finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> list[Figure]:
        with self.psnr.sync_context():
            perfect = int(self.psnr.perfect)
        psnr, ssim = float(self.psnr.compute()), float(self.ssim.compute())
        common = {
            "crop": crop_id(validation_dataset(trainer)),
            "samples": self.samples.unique,
            "dtype": "float64",
        }
        extra = {"perfect_images": perfect, "infinite": self.psnr.infinite}
        return [
            Figure("PSNR", psnr, Protocol(**common, extra=extra)),
            Figure("SSIM", ssim, Protocol(**common, extractor=self.ssim.window)),
        ]
