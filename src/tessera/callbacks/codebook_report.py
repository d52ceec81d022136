"""How the validation set uses the codebooks, per branch and scale."""

import lightning
from torch import Tensor

from tessera import distributed
from tessera.callbacks.figure import FigureCallback, crop_id, validation_dataset
from tessera.callbacks.unique import Commit
from tessera.metrics.codebook import CodebookUsage, codebook_figures
from tessera.metrics.protocol import Figure, Protocol

REPORTED = ("usage", "perplexity", "entropy_bits", "dead_codes")


class CodebookReport(FigureCallback):
    """Logs usage, perplexity, entropy and dead codes, and a histogram of the counts.

    Keys are `<prefix>/codebook/usage_branch0` and, with several scales,
    `<prefix>/codebook/usage_branch0_scale3`. Usage grows with the number of tokens seen, which is part of the
    figure's protocol.

    Args:
        every_n_validations, prefix: see `FigureCallback`.
    """

    def __init__(self, every_n_validations: int = 1, prefix: str = "val"):
        super().__init__(every_n_validations, prefix)
        self.metric: CodebookUsage | None = None

    def begin(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        quantizer = pl_module.tokenizer.quantizer
        metric = CodebookUsage(quantizer.codebook_size, quantizer.num_branches, list(quantizer.grids))
        self.metric = metric.to(pl_module.device)

    def measure(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Tensor],
    ) -> Commit:
        tokens = self.needed(outputs, "tokens", "validation_step")
        return lambda mask: self.metric.update(tokens, mask)

    def finish(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> list[Figure]:
        counts = self.metric.compute().cpu().view(self.metric.counts.shape)
        if distributed.rank() == 0:
            log_histograms(trainer, f"{self.prefix}/codebook", counts)
        protocol = Protocol(
            crop=crop_id(validation_dataset(trainer)),
            samples=self.samples.unique,
            dtype="int64 counts",
            extra={"tokens": int(counts.sum()), "K": self.metric.codebook_size},
        )
        return [
            CodebookFigure(name, value, protocol)
            for name, value in codebook_figures(counts).items()
            if name.startswith(REPORTED)
        ]


class CodebookFigure(Figure):
    """A figure of the codebooks: logged under `codebook/<name>`, its protocol beside it in results.json."""

    @property
    def key(self) -> str:
        return f"codebook/{self.name}"


def log_histograms(trainer: lightning.Trainer, key: str, counts: Tensor) -> None:
    """Histogram over codes of how often each occurs, for every branch, where a logger can show one."""
    for logger in trainer.loggers:
        if hasattr(logger.experiment, "add_histogram"):
            for branch, per_scale in enumerate(counts):
                logger.experiment.add_histogram(f"{key}/counts_branch{branch}", per_scale.sum(0), trainer.global_step)
