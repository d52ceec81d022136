"""`eval.py task=perturbation`: pFID of a tokenizer, as a whole and of single scales and branches."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tessera import distributed
from tessera.data import ImageDataset
from tessera.errors import ConfigError
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.image_sets import subset_numbers
from tessera.metrics.perturbed_fid import measure_perturbed, table_text
from tessera.metrics.protocol import Figure
from tessera.perturbation.grid import ALPHAS, PerturbationGrid
from tessera.quantizers import ProductQuantizer
from tessera.run.build import make
from tessera.run.ranks import in_ranks
from tessera.run.subject import Subject
from tessera.tokenizers import Tokenizer

log = logging.getLogger(__name__)


class PerturbedReconstruction:
    """pFID: the mean rFID over a grid of perturbation strengths, all images perturbed; see `PerturbationGrid`.

    Each image is encoded once for all settings and seeds of a figure, and decoded once per setting and seed.

    Args:
        alphas, deltas, seeds, neighbors_of: see `PerturbationGrid`.
        each_scale: besides the figure of all tokens, one of the tokens of each scale alone.
        each_branch: the same of each branch.
        num_samples: of the validation images, see `subset_numbers`; None: all. The number is part of the figure's name,
            as is every other deviation from the protocol.
        batch_size: per process.

    Raises:
        ConfigError: values out of range.

    Source: arXiv:2503.08354, section 3.
    """

    def __init__(
        self,
        alphas: Sequence[float] = ALPHAS,
        deltas: Sequence[int] | None = None,
        seeds: Sequence[int] = (0,),
        neighbors_of: str = "latent",
        each_scale: bool = False,
        each_branch: bool = False,
        num_samples: int | None = None,
        batch_size: int = 64,
    ):
        if batch_size < 1:
            raise ConfigError(f"task.batch_size={batch_size} must be at least 1")
        self.settings = {"alphas": alphas, "deltas": deltas, "seeds": seeds, "neighbors_of": neighbors_of}
        self.grid()
        self.each_scale, self.each_branch = each_scale, each_branch
        self.num_samples, self.batch_size = num_samples, batch_size

    def grid(self, **part: list[int]) -> PerturbationGrid:
        """The grid, of all tokens or of a part."""
        return PerturbationGrid(**self.settings, **part, key="task")

    def grids(self, quantizer: ProductQuantizer) -> list[PerturbationGrid]:
        """What is measured: all tokens, then each scale, then each branch.

        Raises:
            ConfigError: settings that don't fit the quantizer; a single scale or branch that would be measured again.
        """
        grids = [self.grid()]
        grids[0].check(quantizer)
        for key, name, wanted, count in (
            ("each_scale", "scales", self.each_scale, len(quantizer.grids)),
            ("each_branch", "branches", self.each_branch, quantizer.num_branches),
        ):
            if wanted and count == 1:
                raise ConfigError(f"task.{key}=true would measure the same again: the quantizer has one of {name}")
            if wanted:
                grids += [self.grid(**{name: [number]}) for number in range(count)]
        return grids

    def run(self, subject: Subject) -> dict[str, Any]:
        """Measure the tokenizer of a checkpoint.

        Raises:
            ConfigError: a generator's checkpoint; neither the checkpoint nor the command says which data and metrics;
                settings that don't fit the tokenizer or the data.
        """
        subject.require("data", "metrics")
        tokenizer, extractor, data = subject.tokenizer(), make(subject.cfg.metrics.features), subject.data()
        images = data.images("val")
        subset_numbers(len(images), self.num_samples, "task.num_samples")  # for its check
        grids = self.grids(tokenizer.quantizer)

        def measure(device: torch.device) -> list[Figure]:
            return list(self.measure(tokenizer, extractor, images, grids, device, data.num_workers))

        return {"figures": in_ranks(subject.trainer(), measure, tokenizer)}

    def measure(
        self,
        tokenizer: Tokenizer,
        extractor: FeatureExtractor,
        images: ImageDataset,
        grids: Sequence[PerturbationGrid],
        device: torch.device | str = "cpu",
        num_workers: int = 0,
    ) -> Iterator[Figure]:
        """A figure per grid; all processes call it and share the work, each image once."""
        sizes = {"batch_size": self.batch_size, "num_samples": self.num_samples, "num_workers": num_workers}
        for grid in grids:
            figure = measure_perturbed(tokenizer, images, extractor, grid, device=device, **sizes)
            if distributed.rank() == 0:
                log.info("%s\n%s", figure.label, table_text(figure))
            yield figure
