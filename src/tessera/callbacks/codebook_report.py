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

    announced = False  # many, one per scale

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
        if not countable(quantizer):
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
        quantizer = pl_module.tokenizer.quantizer
        counts, shared = counts_of(self.metric), shared_codebooks(quantizer)
        if distributed.rank() == 0:
            log_histograms(trainer, f"{self.prefix}/codebook", counts, shared)
            self.collapsed = self.watch.check(counts, quantizer, "validation")
        crop = crop_id(validation_dataset(trainer))
        found = usage_figures(counts, quantizer, self.samples.unique, crop)
        protocol = found[0].protocol
        diagnosed = self._diagnosed(pl_module.device)
        return found + [CodebookFigure(name, value, protocol) for name, value in diagnosed.items()]

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


def countable(quantizer: nn.Module) -> bool:
    """Whether a quantizer has codebooks, and not too large ones to be counted code by code."""
    if quantizer.num_tokens == 0:  # a continuous bottleneck
        return False
    return quantizer.num_branches * len(quantizer.grids) * quantizer.codebook_size <= MAX_COUNTERS


def shared_codebooks(quantizer: nn.Module) -> bool:
    """Whether the scales of a branch have one codebook."""
    return len(quantizer.branches[0].codebooks) == 1


def counts_of(metric: CodebookUsage) -> Tensor:
    """(P, S, K) int64 counts over all processes, on the CPU; all of them call it."""
    return metric.compute().cpu().view(metric.counts.shape)


def usage_figures(counts: Tensor, quantizer: nn.Module, samples: int, crop: str) -> list[Figure]:
    """Usage, perplexity, entropy and dead codes of each codebook, and of each scale.

    Args:
        counts: (P, S, K) of each code.
        quantizer: whose codes were counted.
        samples: images behind the counts.
        crop: id of the crop that made them.
    """
    protocol = Protocol(
        crop=crop,
        samples=samples,
        dtype="int64 counts",
        extra={"tokens": int(counts.sum()), "K": counts.shape[-1]},
    )
    figures = codebook_figures(counts, shared_codebooks(quantizer))
    return [CodebookFigure(name, value, protocol) for name, value in figures.items() if name.startswith(REPORTED)]


def log_histograms(trainer: lightning.Trainer, key: str, counts: Tensor, shared: bool = True) -> None:
    """Histogram over codes of how often each occurs, for every codebook, where a logger can show one."""
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_histogram"):
            for branch, per_scale in enumerate(counts):
                name = f"{key}/counts_branch{branch}"
                rows = {name: per_scale.sum(0)} if shared else {f"{name}_scale{k}": r for k, r in enumerate(per_scale)}
                for tag, row in rows.items():
                    logger.experiment.add_histogram(tag, row, trainer.global_step)
