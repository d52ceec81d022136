"""Stops a training whose losses or weights are not finite, without waiting for the device more than needed."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tessera.distributed import all_reduce_sum
from tessera.errors import ConfigError, TesseraError

REMEDY = "with a lower optimizer.lr, a stage.gradient_clip, or trainer.precision=32-true"


class DivergedError(TesseraError, RuntimeError):
    """A loss or a weight is not finite, or a loss exploded; training on would only destroy the weights."""


def last_checkpoint(trainer: Any) -> Path | None:
    """The newest checkpoint of this training, or the one that it continues; None before the first.

    Checkpoints are only written of finite weights (`check_weights`).
    """
    written = {Path(trainer.ckpt_path)} if trainer.ckpt_path and Path(trainer.ckpt_path).is_file() else set()
    for callback in trainer.checkpoint_callbacks:
        names = (getattr(callback, key, None) for key in ("path", "last_model_path", "best_model_path"))
        written |= {Path(name) for name in names if name and Path(name).is_file()}
    return max(written, key=lambda path: path.stat().st_mtime, default=None)


def remedy(trainer: Any) -> str:
    """What to do after a training that diverged."""
    path = last_checkpoint(trainer)
    return f"{'start anew' if path is None else f'continue from ckpt={path}'} {REMEDY}"


class LossCheck:
    """Checks losses some time after they were computed.

    Their values are copied to the host in the background. By the time they are asked for, behind the backward pass and
    before the optimizer step, the copy has arrived while the device is still busy with the backward pass.

    Args:
        limit: absolute value above which a loss counts as exploded.

    Raises:
        ConfigError: a limit that isn't positive.
    """

    def __init__(self, limit: float = 1e8) -> None:
        if not limit > 0:
            raise ConfigError(f"stage.loss_limit={limit} must be positive")
        self.limit = limit
        self._waiting: list[tuple[list[str], Tensor, torch.cuda.Event | None]] = []

    def add(self, names: Iterable[str], values: Iterable[Tensor]) -> None:
        """Note scalars (with or without graph) under their log keys."""
        stacked = torch.stack([value.detach().float() for value in values])
        event = None
        if stacked.is_cuda:
            stacked = stacked.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((list(names), stacked, event))

    def __call__(self, trainer: Any) -> None:
        """Look at everything noted since the last call.

        Raises:
            DivergedError: names the first bad loss, the step and the last good checkpoint.
        """
        waiting, self._waiting = self._waiting, []
        for names, values, event in waiting:
            if event is not None:
                event.synchronize()
            for name, value in zip(names, values.tolist(), strict=True):
                if not abs(value) <= self.limit:
                    found = "exploded" if math.isfinite(value) else "is not finite"
                    raise DivergedError(f"{name} {found} at step {trainer.global_step} ({value}); {remedy(trainer)}")


def check_weights(named: Iterable[tuple[str, Tensor]], trainer: Any) -> None:
    """Refuse to write down weights that are not finite: finite losses may have infinite gradients.

    Raises:
        DivergedError: names the first bad weight; the checkpoint at hand must not replace an earlier one.
    """
    names, values = zip(*named, strict=True)
    bad = ~torch.isfinite(torch.stack([_largest(value.detach()) for value in values]))
    if any(isinstance(value, DTensor) for value in values):  # each process has seen its part
        bad = all_reduce_sum(bad.int()) > 0
    if bool(bad.any()):
        name = names[int(bad.nonzero()[0, 0])]
        raise DivergedError(
            f"weight {name} is not finite at step {trainer.global_step}, so no checkpoint is written; {remedy(trainer)}"
        )


def _largest(value: Tensor) -> Tensor:
    """Largest magnitude in a tensor, or in this process's part of it."""
    own = value.to_local() if isinstance(value, DTensor) else value
    return own.float().abs().amax() if own.numel() else own.new_zeros((), dtype=torch.float32)
