"""The checkpoint that training continues from: written regularly, at the end, and when a signal stops the run."""

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint

from tessera import distributed
from tessera.errors import ConfigError

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: every n steps, at the end, and on the first SIGINT, SIGTERM, or SIGUSR2 (which announces a
    cluster's time limit), which stops the run.

    It is written between batches only, after all other callbacks have seen the batch (Lightning calls checkpoint
    callbacks last), so that continuing from it is exact. A second signal stops at once. In a distributed run the
    processes agree on the batch to stop at every `check_every_batches`.

    Args:
        folder: of the checkpoint.
        every_n_steps: optimizer steps between two checkpoints.
        check_every_batches: how often several processes compare notes about signals.

    Attributes:
        stopped_by: name of the signal that stopped the run, e.g. "SIGTERM"; None.
    """

    def __init__(self, folder: str | Path, every_n_steps: int = 1000, check_every_batches: int = 10):
        if every_n_steps < 1 or check_every_batches < 1:
            raise ConfigError("callbacks.checkpoint: every_n_steps and check_every_batches must be at least 1")
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps, self.check_every_batches = every_n_steps, check_every_batches
        self.stopped_by: str | None = None
        self._received: int | None = None
        self._saved_step = 0
        self._batches = 0
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            raise KeyboardInterrupt
        self._received = number
        name = signal.Signals(number).name
        log.warning("%s: stopping after this batch with a checkpoint; once more stops at once", name)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._received, self.stopped_by, self._saved_step, self._batches = None, None, trainer.global_step, 0
        try:
            # after Lightning's own handlers, which would stop in the middle of a batch
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        except ValueError:
            log.info("not in the main thread: signals are not handled")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _signal(self, device: torch.device) -> int:
        """The signal that any process has received, 0 if none; agreed upon where there are several."""
        received = self._received or 0
        if not distributed.is_distributed():
            return received
        # counted over epochs, which may be shorter than the interval
        self._batches += 1
        if self._batches % self.check_every_batches:
            return 0
        flag = torch.tensor(received, device=device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return int(flag)

    @staticmethod
    def _ends(trainer: lightning.Trainer) -> bool:
        """Whether this is the last batch: by steps, by another callback's decision, or by epochs."""
        if trainer.global_step == trainer.max_steps or trainer.should_stop:
            return True
        return trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, stop = trainer.global_step, self._signal(pl_module.device)
        due = step != self._saved_step and (step % self.every_n_steps == 0 or self._ends(trainer))
        if due or (stop and self.stopped_by is None):
            trainer.save_checkpoint(self.path)
            self._saved_step = step
        if stop and self.stopped_by is None:
            self.stopped_by = signal.Signals(stop).name
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # stop now, not after a validation
            log.warning("stopped by %s at step %d; continue with ckpt=auto (%s)", self.stopped_by, step, self.path)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._restore()
