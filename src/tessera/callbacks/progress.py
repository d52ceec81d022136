"""Progress: a bar on a terminal, plain lines in a log file."""

import logging
import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar

from tessera.errors import ConfigError

log = logging.getLogger(__name__)


def progress_display(every_seconds: float = 30.0, refresh_rate: int = 1, plain: bool | None = None) -> ProgressBar:
    """The progress display that fits where the output goes.

    Args:
        every_seconds: between two lines of the plain display.
        refresh_rate: of the bar, in batches.
        plain: lines instead of a bar; None: where standard error is no terminal.
    """
    if plain is None:
        plain = not sys.stderr.isatty()
    return PlainProgress(every_seconds) if plain else TQDMProgressBar(refresh_rate=refresh_rate)


class PlainProgress(ProgressBar):
    """Logs step, speed and the logged scalars now and then.

    Args:
        every_seconds: between two lines; the first and the last step always get one.
    """

    def __init__(self, every_seconds: float = 30.0):
        super().__init__()
        if every_seconds < 0:
            raise ConfigError(f"callbacks.progress.every_seconds={every_seconds} must not be negative")
        self.every_seconds = every_seconds
        self.enabled = True
        self.last_time, self.last_step = 0.0, 0
        self.start_time, self.start_step = 0.0, 0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.start_time, self.start_step = time.monotonic(), trainer.global_step
        self.last_time, self.last_step = float("-inf"), -1

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now, step = time.monotonic(), trainer.global_step
        last = step == trainer.max_steps
        if not self.enabled or step == self.last_step or not (last or now - self.last_time >= self.every_seconds):
            return
        self.last_time, self.last_step = now, step
        speed = (step - self.start_step) / max(now - self.start_time, 1e-9)
        total = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
        log.info("step %d%s, %.2f steps/s%s", step, total, speed, self._scalars(trainer, pl_module))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.enabled and not trainer.sanity_checking:
            values = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("val")}
            log.info("validation at step %d%s", trainer.global_step, _format(values))

    def _scalars(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> str:
        values = self.get_metrics(trainer, pl_module)
        values.pop("v_num", None)
        return _format(values)


def _format(values: dict[str, Any]) -> str:
    shown = [f"{key} {float(value):.4g}" for key, value in sorted(values.items()) if not isinstance(value, str)]
    return ": " + ", ".join(shown) if shown else ""
