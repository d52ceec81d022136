"""`eval.py task=reconstruction`: how well a tokenizer reconstructs a data set, and how it uses its codebooks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tessera import distributed
from tessera.callbacks.codebook_report import countable, counts_of, usage_figures
from tessera.data import from_uint8
from tessera.errors import ConfigError
from tessera.metrics.codebook import CodebookUsage
from tessera.metrics.image_sets import DatasetImageSet, subset_numbers
from tessera.metrics.pair_measure import PAIR_FIGURES, PairMeasure
from tessera.metrics.protocol import Figure
from tessera.run.build import make
from tessera.run.ranks import in_ranks
from tessera.run.subject import Subject

USAGE = "usage"


class Reconstruction:
    """rFID, PSNR, SSIM, LPIPS and codebook usage, from one pass over the images.

    They are the figures that the callbacks `rfid`, `quality` and `codebook_report` measure in training. rFID is taken
    against the very images that entered the tokenizer, which is why there is no reference to choose.

    Args:
        figures: some of `PAIR_FIGURES` and "usage"; None: all that there are (LPIPS where `metrics.lpips` gives its
            network, usage where there are codebooks that can be counted).
        split: of the data set, train or val.
        num_samples: images, see `subset_numbers`; None: all of the split.
        batch_size: per process.
        ssim_window: "uniform7" or "gauss11"; part of the figure's name.

    Raises:
        ConfigError: an unknown figure; a size below 1.
    """

    def __init__(
        self,
        figures: Sequence[str] | None = None,
        split: str = "val",
        num_samples: int | None = None,
        batch_size: int = 64,
        ssim_window: str = "uniform7",
    ):
        if batch_size < 1:
            raise ConfigError(f"task.batch_size={batch_size} must be at least 1")
        known = (*PAIR_FIGURES, USAGE)
        for name in figures or ():
            if name not in known:
                raise ConfigError(f"task.figures: {name!r} is unknown; choose from {', '.join(known)}")
        self.figures, self.split, self.num_samples = figures, split, num_samples
        self.batch_size, self.ssim_window = batch_size, ssim_window

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure.

        Raises:
            ConfigError: a generator's checkpoint; neither the checkpoint nor the command says which data and metrics;
                a figure whose network or codebook isn't there; more samples than images.
        """
        subject.require("data", "metrics")
        tokenizer = subject.tokenizer()
        data = subject.data()
        dataset = data.images(self.split)
        subset_numbers(len(dataset), self.num_samples, "task.num_samples")  # for its check
        images = DatasetImageSet(dataset, self.num_samples, data.num_workers)
        pairs, usage = self.measures(subject, tokenizer)

        def measure(device: torch.device) -> list[Figure]:
            return self.measure(tokenizer, images, pairs, usage, device)

        figures = in_ranks(subject.trainer(), measure, tokenizer)
        return {"split": self.split, "figures": figures}

    def measures(self, subject: Subject, tokenizer: nn.Module) -> tuple[PairMeasure | None, CodebookUsage | None]:
        """What collects the figures of pairs and of codebooks; None where none of them is wanted."""
        quantizer = tokenizer.quantizer
        wanted = None if self.figures is None else [name for name in self.figures if name != USAGE]
        pairs = None
        if wanted is None or wanted:
            networks = make(subject.cfg.metrics.features), make(subject.cfg.metrics.get("lpips"))
            pairs = PairMeasure(wanted, *networks, ssim_window=self.ssim_window)
        if self.figures is not None and USAGE not in self.figures:
            return pairs, None
        if not countable(quantizer):
            if self.figures is not None:
                raise ConfigError("task.figures: usage needs codebooks that can be counted code by code; leave it out")
            return pairs, None
        return pairs, CodebookUsage(quantizer.codebook_size, quantizer.num_branches, list(quantizer.grids))

    def measure(
        self,
        tokenizer: nn.Module,
        images: DatasetImageSet,
        pairs: PairMeasure | None,
        usage: CodebookUsage | None,
        device: torch.device,
    ) -> list[Figure]:
        """The figures; all processes call it and share the work, each image once."""
        if pairs is not None:
            pairs.begin(device)
        if usage is not None:
            usage.to(device).reset()
        own = distributed.share(len(images))
        for places, levels in images.batches(own.start, own.stop, self.batch_size):
            inputs = from_uint8(levels.to(device))
            output = tokenizer(inputs)
            if pairs is not None:
                pairs.update(output.reconstruction.clamp(-1, 1), inputs, images.numbers[places])
            if usage is not None:
                usage.update(output.tokens)
        figures = [] if pairs is None else pairs.finish(len(images), images.crop)
        if usage is not None:
            figures += usage_figures(counts_of(usage), tokenizer.quantizer, len(images), images.crop)
        return figures
