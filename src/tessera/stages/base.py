"""What all trainings share: manual optimisation with honest step counts, schedules, clipping, logging."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tessera.errors import ConfigError, TesseraError
from tessera.rng import IndexedRng

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


class DivergedError(TesseraError, RuntimeError):
    """A loss is not finite; training on would only destroy the weights."""


class Unregistered:
    """Holds a frozen module outside of a LightningModule's parameters, state dict and train mode.

    `get(device)` moves it where it is needed.
    """

    def __init__(self, module: nn.Module | None):
        if module is not None:
            module.requires_grad_(False).eval()
        self.module = module
        self.device: torch.device | None = None

    def get(self, device: torch.device) -> Any:
        """The module on `device`, in eval mode."""
        if self.module is not None and self.device != device:
            self.module.to(device)
            self.device = device
        return self.module


def _nothing() -> None:
    pass


class Stage(lightning.LightningModule):
    """Base of the trainings.

    One training step counts as one global step, whatever the number of optimizers; with gradient accumulation, one
    window of batches does. Windows may span epochs.

    Args:
        gradient_clip: maximal gradient norm per optimizer; None: off.
        accumulate_grad_batches: batches per optimizer step.
        seed: of the draws that belong to samples.

    Raises:
        ConfigError: values out of range.
    """

    def __init__(self, gradient_clip: float | None, accumulate_grad_batches: int, seed: int):
        super().__init__()
        self.automatic_optimization = False
        if gradient_clip is not None and gradient_clip <= 0:
            raise ConfigError(f"stage.gradient_clip={gradient_clip} must be positive, or null to switch clipping off")
        if accumulate_grad_batches < 1:
            raise ConfigError(f"stage.accumulate_grad_batches={accumulate_grad_batches} must be at least 1")
        self.gradient_clip, self.accumulate_grad_batches, self.seed = gradient_clip, accumulate_grad_batches, seed
        # batches of the open window: a resumed run must not close it early
        self.register_buffer("window", torch.zeros((), dtype=torch.int64))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        return max(1, int(self.trainer.estimated_stepping_batches) // self.accumulate_grad_batches)

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(self.trainer.global_step / self.total_steps, 1.0)

    def sample_rng(self, batch: dict[str, Tensor]) -> IndexedRng:
        """Draws of this step's samples: the same for any batch size and number of processes."""
        return IndexedRng(self.seed, batch["index"], step=self.trainer.global_step)

    def averaged_modules(self) -> dict[str, nn.Module]:
        """The modules that the EMA callback averages, by their name in this module."""
        raise NotImplementedError

    def all_optimizers(self) -> list[LightningOptimizer]:
        """The optimizers; all but the first are kept from counting as global steps.

        Lightning counts every optimizer's steps (Lightning-AI/pytorch-lightning#17958) through hooks that its loop
        installs anew for each batch.
        """
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        for optimizer in optimizers[1:]:
            optimizer._on_before_step = optimizer._on_after_step = _nothing
        return optimizers

    def all_schedulers(self) -> list[LRScheduler]:
        """The learning-rate schedulers, in the optimizers' order."""
        found = self.lr_schedulers()
        return found if isinstance(found, list) else [found] if found is not None else []

    def open_window(self) -> bool:
        """Count a batch; whether it completes an accumulation window, so that the optimizers step."""
        if self.accumulate_grad_batches == 1:
            return True
        full = int(self.window) + 1 >= self.accumulate_grad_batches
        self.window.fill_(0 if full else int(self.window) + 1)
        return full

    def backward_and_step(self, loss: Tensor, number: int, step: bool) -> None:
        """Backward pass of `loss` and, where `step`, an update by optimizer and scheduler `number`."""
        optimizer = self.all_optimizers()[number]
        self.manual_backward(loss / self.accumulate_grad_batches)
        if step:
            optimizer.step()
            optimizer.zero_grad()
            self.all_schedulers()[number].step()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip: Lightning calls this after a GradScaler has unscaled the gradients, also in manual optimisation."""
        if self.gradient_clip is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.gradient_clip)

    def log_losses(self, losses: dict[str, Tensor], prefix: str = "train/loss") -> None:
        """Log named scalars and stop where one isn't finite.

        Raises:
            DivergedError: names the term and the step.
        """
        values = torch.stack([value.detach().float() for value in losses.values()])
        if not bool(torch.isfinite(values).all()):
            bad = [
                name for name, value in zip(losses, values.tolist(), strict=True) if value != value or abs(value) > 3e38
            ]
            raise DivergedError(
                f"{prefix}/{bad[0]} is not finite at step {self.trainer.global_step}; continue from the last checkpoint "
                "with a lower optimizer.lr, stage.gradient_clip, or trainer.precision=32-true"
            )
        self.log_dict({f"{prefix}/{name}": value.detach() for name, value in losses.items()})

    def log_rates(self, names: list[str]) -> None:
        """Log the learning rates as train/lr/<name>."""
        for name, optimizer in zip(names, self.all_optimizers(), strict=False):
            self.log(f"train/lr/{name}", optimizer.param_groups[0]["lr"])


def merged_weights(defaults: dict[str, float], given: dict[str, float] | None) -> dict[str, float]:
    """Loss weights with the given ones replaced.

    Raises:
        ConfigError: an unknown name (the nearest known one is suggested) or a negative weight.
    """
    for name, value in (given or {}).items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(defaults)}"
            raise ConfigError(f"stage.loss_weights.{name} is unknown; {hint}")
        if value < 0:
            raise ConfigError(f"stage.loss_weights.{name}={value} must not be negative")
    return {**defaults, **(given or {})}
