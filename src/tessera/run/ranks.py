"""Runs a function once in every process of a trainer."""

from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader


class _Once(lightning.LightningModule):
    """A prediction of one step, which does the work."""

    def __init__(self, work: Callable[[torch.device], Any], models: nn.Module | None):
        super().__init__()
        self.work, self.models = work, models

    def predict_dataloader(self) -> DataLoader:
        return DataLoader([0])

    def predict_step(self, batch: Any, batch_index: int) -> torch.Tensor:
        self.work(self.device)
        return torch.zeros(())


def in_ranks(trainer: lightning.Trainer, work: Callable[[torch.device], Any], models: nn.Module | None = None) -> Any:
    """Call `work(device)` in every process, inside its process group, in inference mode and the trainer's precision.

    Args:
        trainer: starts the processes.
        work: gets the process's device.
        models: moved to the device, and to the trainer's precision, first.

    Returns:
        What `work` returned in this process.
    """
    results: list[Any] = []
    module = _Once(lambda device: results.append(work(device)), models)
    trainer.predict(module, return_predictions=False)
    return results[0]
