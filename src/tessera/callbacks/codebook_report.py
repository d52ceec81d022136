"""How the validation set uses the codebooks, per branch and scale."""

import logging
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from tessera import distributed
from tessera.callbacks.codebook_collapse import MAX_COUNTERS, CollapseWatch
from tessera.callbacks.figure import FigureCallback, crop_id, validation_dataset
from tessera.callbacks.unique import Commit
from tessera.metrics.codebook import CodebookUsage, codebook_figures
from tessera.metrics.protocol import Figure, Protocol

log = logging.getLogger(__name__)

REPORTED = ("usage", "perplexity", "entropy_bits", "dead_codes")
# Latents that diagnostics look at, per codebook and call
DIAGNOSED = 128


class CodebookReport(FigureCallback):
    """Logs usage, perplexity, entropy and dead codes, and a histogram of the counts.

    Keys are `<prefix>/codebook/usage_branch0` and, with several scales, `<prefix>/codebook/usage_branch0_scale3`; a
    branch whose scales have codebooks of their own has the latter only. Usage grows with the number of tokens seen,
    which is part of the figure's protocol. A codebook that collapsed is warned about, with what to change. Codebooks
    that have `diagnostics` (IBQ) are looked at in the first batch, and the means over it logged as
    `<prefix>/codebook/gradient_path_branch0` and so on. Codebooks too large to be counted code by code (lookup-free
    ones of many bits) are left out.

    Args:
        every_n_validations, prefix: see `FigureCallback`.
        min_usage, min_perplexity, repeat_every: when to warn, see `CollapseWatch`.

    Attributes:
        collapsed: branches and scales found collapsed in the latest measurement.
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        prefix: str = "val",
        min_usage: float = 0.05,
        min_perplexity: float = 0.01,
        repeat_every: int = 10,
    ):
        super().__init__(every_n_validations, prefix)
        self.metric: CodebookUsage | None = None
        self.watch = CollapseWatch(min_usage, min_perplexity, repeat_every)
        self.collapsed: list[str] = []
        self.diagnoses: dict[str, list[Tensor]] = {}
        self._hooks: list[Any] = []

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        quantizer = pl_module.tokenizer.quantizer
        self._unhook()
        self.diagnoses = {}
        if quantizer.num_branches * len(quantizer.grids) * quantizer.codebook_size > MAX_COUNTERS:
            log.info("codebooks of %d codes are too large for a report of their usage", quantizer.codebook_size)
            self.metric = None
            return
        metric = CodebookUsage(quantizer.codebook_size, quantizer.num_branches, list(quantizer.grids))
        self.metric = metric.to(pl_module.device)
        for branch, structure in enumerate(quantizer.branches):
            for number, codebook in enumerate(structure.codebooks):
                if hasattr(codebook, "diagnostics"):
                    name = f"branch{branch}" + (f"_scale{number}" if len(structure.codebooks) > 1 else "")
                    self.diagnoses |= {f"{key}_{name}": [] for key in codebook.DIAGNOSTICS}
                    self._hooks.append(codebook.register_forward_hook(partial(self._diagnose, name)))

    def _diagnose(self, name: str, codebook: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        rows = inputs[0].detach()
        chosen = rows[:: -(-len(rows) // DIAGNOSED)]  # from all images of the batch
        for key, value in codebook.diagnostics(chosen).items():
            self.diagnoses[f"{key}_{name}"].append(value)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def measure(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
    ) -> Commit | None:
        self._unhook()  # one batch is enough
        if self.metric is None:
            return None
        tokens = self.needed(outputs, "tokens", "validation_step")
        return lambda mask: self.metric.update(tokens, mask)

    def finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> list[Figure]:
        if self.metric is None:
            return []
        counts = self.metric.compute().cpu().view(self.metric.counts.shape)
        shared = len(pl_module.tokenizer.quantizer.branches[0].codebooks) == 1
        if distributed.rank() == 0:
            log_histograms(trainer, f"{self.prefix}/codebook", counts, shared)
            self.collapsed = self.watch.check(counts, pl_module.tokenizer.quantizer, "validation")
        protocol = Protocol(
            crop=crop_id(validation_dataset(trainer)),
            samples=self.samples.unique,
            dtype="int64 counts",
            extra={"tokens": int(counts.sum()), "K": self.metric.codebook_size},
        )
        figures = codebook_figures(counts, shared) | self._diagnosed(pl_module.device)
        return [
            CodebookFigure(name, value, protocol)
            for name, value in figures.items()
            if name.startswith(REPORTED) or name in self.diagnoses
        ]

    def _diagnosed(self, device: torch.device) -> dict[str, float]:
        """Means over scales and processes, those without a batch left out."""
        if not self.diagnoses:
            return {}
        sums = [
            torch.tensor([float(sum(values)), float(len(values))], dtype=torch.float64)
            for values in self.diagnoses.values()
        ]
        totals = distributed.all_reduce_sum(torch.stack(sums).to(device)).cpu()
        return {name: float(total / n) for name, (total, n) in zip(self.diagnoses, totals, strict=True) if n > 0}


class CodebookFigure(Figure):
    """A figure of the codebooks: logged under `codebook/<name>`, its protocol beside it in results.json."""

    @property
    def key(self) -> str:
        return f"codebook/{self.name}"


def log_histograms(trainer: lightning.Trainer, key: str, counts: Tensor, shared: bool = True) -> None:
    """Histogram over codes of how often each occurs, for every codebook, where a logger can show one."""
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_histogram"):
            for branch, per_scale in enumerate(counts):
                name = f"{key}/counts_branch{branch}"
                rows = {name: per_scale.sum(0)} if shared else {f"{name}_scale{k}": r for k, r in enumerate(per_scale)}
                for tag, row in rows.items():
                    logger.experiment.add_histogram(tag, row, trainer.global_step)
