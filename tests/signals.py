"""A training callback that interrupts the run it is in."""

import os
import signal
from pathlib import Path

import lightning


class SignalAt(lightning.pytorch.callbacks.Callback):
    """Sends a signal once, in the middle of a step; what `marker` (a file) says has happened isn't repeated.

    Args:
        step: global step.
        name: of the signal.
        to_parent: to the process that started this one (a launcher's, which tells all tasks) instead of this one.
    """

    def __init__(self, step: int, name: str, marker: str, to_parent: bool = False):
        self.step, self.signal, self.marker, self.to_parent = step, signal.Signals[name], Path(marker), to_parent

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.is_global_zero and trainer.global_step == self.step and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getppid() if self.to_parent else os.getpid(), self.signal)
