"""`eval.py task=perturbation`: pFID of a tokenizer, as a whole and of single scales and branches."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import lightning
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tessera import distributed
from tessera.callbacks.unique import UniqueSamples
from tessera.data import ImageDataModule
from tessera.data.sampler import EvalBatches
from tessera.errors import ConfigError
from tessera.metrics.features import FeatureExtractor
from tessera.metrics.image_sets import subset_numbers
from tessera.metrics.perturbed_fid import PerturbedFrechet, table_text
from tessera.metrics.protocol import Figure
from tessera.perturbation.grid import ALPHAS, PerturbationGrid
from tessera.quantizers import ProductQuantizer
from tessera.run.build import make
from tessera.run.subject import Subject
from tessera.tokenizers import Tokenizer

log = logging.getLogger(__name__)


class GridPass(lightning.LightningModule):
    """Measures one grid on images over all processes.

    Attributes:
        figure: the result.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        extractor: FeatureExtractor,
        grid: PerturbationGrid,
        crop: str,
        loader: Callable[[], DataLoader],
    ):
        super().__init__()
        self.tokenizer, self.crop = tokenizer.eval(), crop
        self.predict_dataloader = loader
        self.sums = PerturbedFrechet(extractor, grid)
        self.samples = UniqueSamples()
        self.figure: Figure | None = None

    def on_predict_epoch_start(self) -> None:
        self.samples = UniqueSamples()
        self.sums.begin(self.tokenizer, self.device)

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        self.samples.add(batch["index"], self.sums.measure(self.tokenizer, batch["image"], batch["index"]))
        return batch["index"]

    def on_predict_epoch_end(self) -> None:
        self.samples.finish()
        self.figure = self.sums.figure(self.tokenizer, self.samples.unique, self.crop)


class Chosen(Dataset):
    """Some samples of a data set that is read by lists of numbers."""

    def __init__(self, source: Dataset, numbers: list[int]):
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return self.source[[self.numbers[row] for row in rows]]


class PerturbedReconstruction:
    """pFID: the mean rFID over a grid of perturbation strengths, all images perturbed; see `PerturbationGrid`.

    Each image is encoded once for all settings and seeds of a figure, and decoded once per setting and seed.

    Args:
        alphas, deltas, seeds, neighbors_of: see `PerturbationGrid`.
        each_scale: besides the figure of all tokens, one of the tokens of each scale alone.
        each_branch: the same of each branch.
        num_samples: of the validation images, see `subset_numbers`; None: all. The number is part of the figure's name,
            as is every other deviation from the protocol.
        batch_size: per process; None: as the data's evaluation.

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
        batch_size: int | None = None,
    ):
        if batch_size is not None and batch_size < 1:
            raise ConfigError(f"task.batch_size={batch_size} must be at least 1, or null")
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
        """Measure the tokenizer of a checkpoint; see `measure`."""
        subject.require("data", "metrics")
        tokenizer, extractor = subject.tokenizer(), make(subject.cfg.metrics.features)
        return {"figures": self.measure(tokenizer, extractor, subject.data(), subject.trainer())}

    def measure(
        self, tokenizer: Tokenizer, extractor: FeatureExtractor, data: ImageDataModule, trainer: lightning.Trainer
    ) -> list[Figure]:
        """Measure a tokenizer.

        Args:
            tokenizer: frozen; not modified.
            extractor: of the features.
            data: whose validation images are taken.
            trainer: its processes share the work; all of them must call.

        Returns:
            One figure per grid, see `grids`.

        Raises:
            ConfigError: settings that don't fit the tokenizer or the data.
        """
        grids = self.grids(tokenizer.quantizer)
        images = data.images("val").without_augmentation()
        numbers = subset_numbers(len(images), self.num_samples, "task.num_samples").tolist()
        chosen, figures = Chosen(images, numbers), []

        def loader() -> DataLoader:  # called when the processes run: the sampler looks at their number
            batches = EvalBatches(len(chosen), self.batch_size or data.eval_batch_size)
            return DataLoader(chosen, batch_size=None, sampler=batches, num_workers=data.num_workers)

        for grid in grids:
            module = GridPass(tokenizer, extractor, grid, str(images.crop_id), loader)
            trainer.predict(module, return_predictions=False)
            figures.append(module.figure)
            if distributed.rank() == 0:
                log.info("%s\n%s", module.figure.label, table_text(module.figure))
        return figures
