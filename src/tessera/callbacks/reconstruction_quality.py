"""PSNR, SSIM and LPIPS of reconstructions over the validation set."""

from tessera.callbacks.pair_figures import PairFigures
from tessera.metrics.lpips import LPIPSDistance
from tessera.metrics.pair_measure import PairMeasure


class ReconstructionQuality(PairFigures):
    """Mean per-image PSNR and SSIM, and LPIPS where its network is given, both sides rounded to uint8.

    Args:
        ssim_window: "uniform7" or "gauss11"; part of the figure's name.
        infinite: what exact reconstructions count in the PSNR, see `PSNR`.
        lpips: network of the LPIPS; None: no LPIPS.
        num_samples, every_n_validations, prefix: see `FigureCallback`.
    """

    def __init__(
        self,
        ssim_window: str = "uniform7",
        infinite: str | float = "exclude",
        lpips: LPIPSDistance | None = None,
        every_n_validations: int = 1,
        prefix: str = "val",
        num_samples: int | None = None,
    ):
        pairs = PairMeasure(None, None, lpips, ssim_window, infinite)
        super().__init__(pairs, every_n_validations=every_n_validations, prefix=prefix, num_samples=num_samples)
