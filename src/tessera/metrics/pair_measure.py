"""Figures of reconstructions against the very images they are reconstructions of, from one pass over the pairs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.metrics.checks import extractor_warnings, sample_warnings
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.fid import FrechetDistance
from tessera.metrics.lpips import LPIPS, LPIPSDistance
from tessera.metrics.protocol import Figure, Protocol
from tessera.metrics.reconstruction import PSNR, SSIM

PAIR_FIGURES = ("rFID", "PSNR", "SSIM", "LPIPS")


class PairMeasure:
    """Collects rFID, PSNR, SSIM and LPIPS batch by batch; each process adds its own samples.

    Args:
        figures: some of `PAIR_FIGURES`; None: all that extractor and network allow.
        extractor: of the rFID; None: no rFID.
        lpips: network of the LPIPS; None: no LPIPS.
        ssim_window: "uniform7" or "gauss11"; part of the figure's name.
        infinite: what exact reconstructions count in the PSNR, see `PSNR`.

    Raises:
        ConfigError: a figure that is unknown, or lacks its network.
    """

    def __init__(
        self,
        figures: Sequence[str] | None = None,
        extractor: FeatureExtractor | None = None,
        lpips: LPIPSDistance | None = None,
        ssim_window: str = "uniform7",
        infinite: str | float = "exclude",
    ):
        absent = {"rFID": extractor is None, "LPIPS": lpips is None}
        chosen = [name for name in PAIR_FIGURES if not absent.get(name)] if figures is None else list(figures)
        for name in chosen:
            if name not in PAIR_FIGURES:
                raise ConfigError(f"figures: {name!r} is unknown; choose from {', '.join(PAIR_FIGURES)}")
            if absent.get(name):
                remedy = "metrics=..." if name == "rFID" else "metrics/lpips=alex or vgg beside metrics=..."
                raise ConfigError(f"figures: {name} needs its network; choose {remedy}, or leave {name} out")
        self.chosen = chosen
        self.extractor = extractor if "rFID" in chosen else None
        self.distance = None if self.extractor is None else FrechetDistance(self.extractor.num_features)
        self.pairwise: dict[str, PSNR | SSIM | LPIPS] = {}
        if "PSNR" in chosen:
            self.pairwise["PSNR"] = PSNR(infinite=infinite)
        if "SSIM" in chosen:
            self.pairwise["SSIM"] = SSIM(window=ssim_window)
        if "LPIPS" in chosen:
            self.pairwise["LPIPS"] = LPIPS(lpips)

    def begin(self, device: torch.device | str) -> None:
        """Start anew, on a device."""
        for metric in (self.distance, *self.pairwise.values()):
            if metric is not None:
                metric.to(device).reset()
        if self.extractor is not None:
            self.extractor.to(device)

    def measure(self, reconstructions: Tensor, inputs: Tensor, index: Tensor | None) -> Callable[[Tensor], None]:
        """Measure a batch.

        Args:
            reconstructions, inputs: (B, 3, H, W) in [-1, 1], or uint8.
            index: (B,) int64 identities of the samples, for messages; None: the row numbers.

        Returns:
            What adds the batch, given a (B,) bool mask of the samples that count.

        Raises:
            DataError: images out of range; when it is added: features that are not finite (the sample is named).
        """
        values = [(metric, metric.values(reconstructions, inputs)) for metric in self.pairwise.values()]
        sides = None if self.extractor is None else (self.extractor(inputs), self.extractor(reconstructions))

        def add(mask: Tensor) -> None:
            for metric, per_image in values:
                metric.add(per_image, mask)
            if sides is not None:
                self.distance.update(sides[0], real=True, mask=mask, index=index)
                self.distance.update(sides[1], real=False, mask=mask, index=index)

        return add

    def update(self, reconstructions: Tensor, inputs: Tensor, index: Tensor | None = None) -> None:
        """Measure a batch and add all of it; arguments and errors as `measure`."""
        self.measure(reconstructions, inputs, index)(torch.ones(len(inputs), dtype=torch.bool))

    def finish(self, samples: int, crop: str) -> list[Figure]:
        """The figures over all processes, which must all call it.

        Args:
            samples: number of pairs over all processes.
            crop: id of the crop that made the inputs.
        """
        found = {name: self._pairwise(name, samples, crop) for name in self.pairwise}
        if self.distance is not None:
            found["rFID"] = self._rfid(samples, crop)
        return [found[name] for name in self.chosen]

    def _pairwise(self, name: str, samples: int, crop: str) -> Figure:
        metric, common = self.pairwise[name], {"crop": crop, "samples": samples}
        value = float(metric.compute())
        if name == "LPIPS":
            return Figure(name, value, Protocol(**common, flavour=metric.flavour, weights_id=metric.weights_id))
        common["dtype"] = "float64"
        if name == "SSIM":
            return Figure(name, value, Protocol(**common, flavour=metric.window))
        with metric.sync_context():
            perfect = int(metric.perfect)
        return Figure(name, value, Protocol(**common, extra={"perfect_images": perfect, "infinite": metric.infinite}))

    def _rfid(self, samples: int, crop: str) -> Figure:
        protocol = Protocol(
            **self.extractor.protocol_fields,
            crop=crop,
            reference_samples=samples,
            samples=samples,
        )
        warnings = sample_warnings(samples, self.extractor.num_features)
        warnings += extractor_warnings(self.extractor.name, self.extractor.is_image_quality)
        return Figure("rFID", self.distance.summary()[0], protocol, warnings=warnings)
