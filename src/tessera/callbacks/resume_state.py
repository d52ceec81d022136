"""Random-number states in checkpoints, so that a resumed training continues exactly; and validation leaves no trace."""

import logging
import random
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from tessera import distributed

log = logging.getLogger(__name__)


def rng_state() -> dict[str, Any]:
    """States of the global generators of torch (CPU and CUDA), numpy and Python, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, spare = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(internal), spare],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda"]])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, spare = state["python"]
    random.setstate((version, tuple(internal), spare))


class ResumeState(Callback):
    """Saves the random-number states of all processes with each checkpoint and restores them when training resumes.

    They are restored at the start of the first batch, after everything that set-up draws. Validation runs on a copy:
    whether and how often a run is validated does not change its training.
    """

    def __init__(self) -> None:
        self._resumed: list[dict[str, Any]] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        own = self._before_validation or rng_state()
        states = [own]
        if distributed.is_distributed():
            states = [None] * distributed.world_size()
            torch.distributed.all_gather_object(states, own)
        checkpoint["rng_states"] = states

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._resumed = checkpoint.get("rng_states")

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._resumed is None:
            return
        if len(self._resumed) == distributed.world_size():
            set_rng_state(self._resumed[distributed.rank()])
        elif distributed.rank() == 0:
            log.warning(
                "the checkpoint holds the random-number states of %d processes, but this run has %d: draws that belong "
                "to samples continue, those of dropout start anew",
                len(self._resumed),
                distributed.world_size(),
            )
        self._resumed = None

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._before_validation = rng_state()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._before_validation is not None:
            set_rng_state(self._before_validation)
            self._before_validation = None
