"""Early stopping of decoder post-training on gFID of fixed tokens, which keeps the best weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from tessera.callbacks.ema import EMA
from tessera.callbacks.generation_fid import GenerationFID
from tessera.errors import ConfigError
from tessera.metrics.protocol import Figure

log = logging.getLogger(__name__)


class EarlyStopping(Callback):
    """Stops training when gFID of the averaged weights has not fallen for a while, and publishes the best ones.

    It measures before the first step, then regularly between batches, so that whatever checkpoint is written after a
    batch holds the decision: continuing from it stops at the same step with the same weights. The best averaged weights
    (or the live ones, without an EMA) go into each checkpoint as `published`; `tessera.run.load` loads these where
    averaged weights are asked for. If training never helps, they are those that it began with.

    Args:
        gfid: how to measure; with a file of fixed tokens, so that differences are free of sampling noise. It takes no
            part in validation.
        patience: measurements in a row without a new lowest value, after which training stops.
        every_n_steps: optimizer steps between two measurements.
        min_delta: how much lower than the best a value must be to count.

    Attributes:
        published: `weights` (state dicts by name), `value` and `step` of the best one.

    Raises:
        ConfigError: values out of range.

    Source: RobusTok (arXiv:2509.12474) finds that post-training for longer can raise gFID again.
    """

    def __init__(self, gfid: GenerationFID, patience: int, every_n_steps: int, min_delta: float = 0.0):
        if gfid.tokens is None:
            raise ConfigError("early_stopping needs the fixed tokens of callbacks.gfid.tokens")
        for key, value in (("patience", patience), ("every_n_steps", every_n_steps)):
            if value < 1:
                raise ConfigError(f"early_stopping.{key}={value} must be at least 1")
        if min_delta < 0:
            raise ConfigError(f"early_stopping.min_delta={min_delta} must not be negative")
        self.gfid, self.patience, self.every_n_steps, self.min_delta = gfid, patience, every_n_steps, min_delta
        self.published: dict[str, Any] | None = None
        self.waited = 0
        self.measured_step = -1

    @property
    def exhausted(self) -> bool:
        """Whether training is to stop."""
        return self.waited >= self.patience

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.published is None:
            self._measure(trainer, pl_module)
        trainer.should_stop = trainer.should_stop or self.exhausted

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # a batch may be no step; the last one may be none of the regular ones
        if step != self.measured_step and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self._measure(trainer, pl_module)
            trainer.should_stop = trainer.should_stop or self.exhausted

    def _measure(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        step = self.measured_step = trainer.global_step
        ema = next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)
        with ema.averaged(pl_module) if ema is not None else nullcontext(), evaluating(pl_module):
            self.gfid.begin(trainer, pl_module)
            figures = self.gfid.finish(trainer, pl_module)
            self._judge(next(figure for figure in figures if figure.name == "gFID"), step, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.gfid.prefix}/{figure.key}": figure.value for figure in figures}, step)

    def _judge(self, figure: Figure, step: int, pl_module: lightning.LightningModule) -> None:
        best = self.published
        text = f"{figure.label} = {figure.value:.4f}"
        if best is not None and not figure.value < best["value"] - self.min_delta:
            self.waited += 1
            log.info("step %d: %s; the lowest is %.4f of step %d", step, text, best["value"], best["step"])
            return
        self.waited = 0
        self.published = {"weights": copies(pl_module), "value": figure.value, "step": step}
        log.info("step %d: %s, the lowest so far", step, text)

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.published is not None:
            state = {"waited": self.waited, "measured_step": self.measured_step}
            checkpoint["published"] = {**self.published, **state}

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if (found := checkpoint.get("published")) is not None:
            self.published = {key: found[key] for key in ("weights", "value", "step")}
            self.waited, self.measured_step = found["waited"], found["measured_step"]


def copies(pl_module: lightning.LightningModule) -> dict[str, dict[str, Tensor]]:
    """State dicts of the modules that a stage publishes, copied, by name."""
    return {
        name: {key: value.detach().clone() for key, value in module.state_dict().items()}
        for name, module in pl_module.averaged_modules().items()
    }


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """All parts in eval mode inside the context, and in their own after it."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
