"""Stops a training whose losses or weights are not finite, without waiting for the device more than needed."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from tessera.errors import TesseraError

REMEDY = (
    "continue from the last checkpoint with a lower optimizer.lr, a stage.gradient_clip, or trainer.precision=32-true"
)


class DivergedError(TesseraError, RuntimeError):
    """A loss or a weight is not finite; training on would only destroy the weights."""


class LossCheck:
    """Checks losses some time after they were computed.

    Their values are copied to the host in the background. By the time they are asked for, behind the backward pass and
    before the optimizer step, the copy has arrived while the device is still busy with the backward pass.
    """

    def __init__(self) -> None:
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

    def __call__(self, step: int) -> None:
        """Look at everything noted since the last call.

        Raises:
            DivergedError: names the first bad loss and the step.
        """
        waiting, self._waiting = self._waiting, []
        for names, values, event in waiting:
            if event is not None:
                event.synchronize()
            for name, value in zip(names, values.tolist(), strict=True):
                if not math.isfinite(value):
                    raise DivergedError(f"{name} is not finite at step {step} ({value}); {REMEDY}")


def check_weights(named: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Refuse to write down weights that are not finite: finite losses may have infinite gradients.

    Raises:
        DivergedError: names the first bad weight; the checkpoint at hand must not replace an earlier one.
    """
    names, values = zip(*named, strict=True)
    bad = ~torch.isfinite(torch.stack([value.detach().float().abs().amax() for value in values]))
    if bool(bad.any()):
        name = names[int(bad.nonzero()[0, 0])]
        raise DivergedError(f"weight {name} is not finite at step {step}, so no checkpoint is written; {REMEDY}")
