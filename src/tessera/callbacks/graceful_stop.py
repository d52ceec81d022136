"""Stopping by Ctrl-C or SIGTERM with a checkpoint that training continues from exactly."""

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from tessera import distributed

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop(Callback):
    """On the first SIGINT or SIGTERM: finish the batch, write `last.ckpt`, stop. On the second: stop at once.

    A batch is never cut short, so the checkpoint is not between the optimizer steps of a GAN. In a distributed run the
    processes agree on the batch every `check_every_batches`.

    Args:
        folder: of the checkpoint.
        check_every_batches: how often several processes compare notes.

    Attributes:
        stopped_by: name of the signal, e.g. "SIGTERM"; None.
    """

    def __init__(self, folder: str | Path, check_every_batches: int = 10):
        self.folder, self.check_every_batches = Path(folder), check_every_batches
        self.stopped_by: str | None = None
        self._received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            raise KeyboardInterrupt
        self._received = number
        log.warning(
            "%s: stopping after this batch with a checkpoint; once more stops at once", signal.Signals(number).name
        )

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._received, self.stopped_by = None, None
        try:
            # after Lightning's own handlers, which would stop in the middle of a batch
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        except ValueError:
            log.info("not in the main thread: signals are not handled")

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        received = self._received or 0
        if distributed.is_distributed():
            if (batch_idx + 1) % self.check_every_batches:
                return
            flag = torch.tensor(received, device=pl_module.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            received = int(flag)
        if not received or self.stopped_by is not None:
            return
        self.stopped_by = signal.Signals(received).name
        path = self.folder / "last.ckpt"
        trainer.save_checkpoint(path)
        trainer.should_stop = True
        trainer.limit_val_batches = 0  # stop now, not after a validation
        log.warning(
            "stopped by %s at step %d; continue with ckpt=auto (%s)", self.stopped_by, trainer.global_step, path
        )

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._restore()
