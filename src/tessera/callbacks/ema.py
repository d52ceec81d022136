"""Exponential moving average of the modules a stage publishes."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from tessera.errors import ConfigError


def warmed_decay(update: int, decay: float) -> float:
    """Decay of the update-th averaging: min(decay, (1 + update) / (10 + update)), and 0 (a copy) up to the 0th."""
    return min(decay, (1 + update) / (10 + update)) if update > 0 else 0.0


@torch.no_grad()
def average(averaged: nn.Module, live: nn.Module, decay: float) -> None:
    """averaged <- decay * averaged + (1 - decay) * live for trained parameters; the others and buffers are copied."""
    pairs = list(zip(averaged.parameters(), live.parameters(), strict=True))
    trained = [pair for pair in pairs if pair[1].requires_grad]
    if trained:
        torch._foreach_lerp_(*(list(side) for side in zip(*trained, strict=True)), 1 - decay)
    copied = [pair for pair in pairs if not pair[1].requires_grad]
    for target, source in (*copied, *zip(averaged.buffers(), live.buffers(), strict=True)):
        target.copy_(source)


class EMA(Callback):
    """Averages `pl_module.averaged_modules()` after every optimizer step; validation and test see the averages.

    average <- decay * average + (1 - decay) * weights, from the initial weights on. Buffers and frozen weights are
    copied as they are. Give the decay, or the half-life: after that many steps (or that fraction of training) a weight
    counts half.

    Args:
        decay: in [0, 1).
        half_life_steps, half_life_fraction: alternatives to `decay`; exactly one of the three is given.
        every_n_steps: average only after every n-th optimizer step.
        warmup: let the decay of the k-th averaging rise as min(decay, (1 + k) / (10 + k)).
        warmup_delay: averagings before that, which copy the weights; k counts from there. TiTok has 1.

    Raises:
        ConfigError: none or several of the three given, or values out of range.
    """

    def __init__(
        self,
        decay: float | None = None,
        half_life_steps: float | None = None,
        half_life_fraction: float | None = None,
        every_n_steps: int = 1,
        warmup: bool = False,
        warmup_delay: int = 0,
    ):
        given = [value for value in (decay, half_life_steps, half_life_fraction) if value is not None]
        if len(given) != 1:
            raise ConfigError(
                "give exactly one of callbacks.ema.decay, callbacks.ema.half_life_steps and "
                "callbacks.ema.half_life_fraction"
            )
        if decay is not None and not 0 <= decay < 1:
            raise ConfigError(f"callbacks.ema.decay={decay} is outside [0, 1)")
        if (given[0] <= 0 and decay is None) or every_n_steps < 1:
            raise ConfigError("callbacks.ema: a half-life must be positive and every_n_steps at least 1")
        self.decay, self.half_life_steps, self.half_life_fraction = decay, half_life_steps, half_life_fraction
        if warmup_delay < 0 or (warmup_delay and not warmup):
            raise ConfigError(f"callbacks.ema.warmup_delay={warmup_delay} must not be negative, and needs warmup=true")
        self.every_n_steps, self.warmup, self.warmup_delay = every_n_steps, warmup, warmup_delay
        self.averages: dict[str, nn.Module] = {}
        self.full_decay = 0.0
        self.last_step = 0
        self._loaded: dict[str, dict[str, Tensor]] = {}
        self._live: dict[str, list[Tensor]] = {}

    def decay_for(self, total_steps: int) -> float:
        """The decay per averaging, for a training of that many steps."""
        if self.decay is not None:
            return self.decay
        steps = self.half_life_steps or self.half_life_fraction * total_steps
        return 0.5 ** (self.every_n_steps / max(steps, 1))

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self.half_life_fraction is not None and trainer.max_steps < 1:
            raise ConfigError("callbacks.ema.half_life_fraction needs trainer.max_steps")
        self.full_decay = self.decay_for(trainer.max_steps)
        self.averages = {name: copy.deepcopy(module) for name, module in pl_module.averaged_modules().items()}
        for name, averaged in self.averages.items():
            averaged.requires_grad_(False)
            if name in self._loaded:
                averaged.load_state_dict(self._loaded[name])
        self._loaded = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # Lightning restores the step of a resumed training only after on_fit_start
        self.last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # a batch that only accumulates gradients, or only trains the discriminator, is no step
        if step == self.last_step:
            return
        self.last_step = step
        if step % self.every_n_steps == 0:
            # a pure function of the step, so that resuming needs nothing else
            update = step // self.every_n_steps
            decay = warmed_decay(update - self.warmup_delay, self.full_decay) if self.warmup else self.full_decay
            for name, module in pl_module.averaged_modules().items():
                average(self.averages[name], module, decay)

    def _swap_in(self, pl_module: lightning.LightningModule) -> None:
        if self._live or not self.averages:
            return
        for name, module in pl_module.averaged_modules().items():
            self._live[name] = [value.detach().clone() for value in module.parameters()]
            _copy(module, list(self.averages[name].parameters()))

    def _swap_out(self, pl_module: lightning.LightningModule) -> None:
        for name, module in pl_module.averaged_modules().items() if self._live else ():
            _copy(module, self._live[name])
        self._live = {}

    @contextmanager
    def averaged(self, pl_module: lightning.LightningModule) -> Iterator[None]:
        """The module holds the averaged weights inside the context."""
        self._swap_in(pl_module)
        try:
            yield
        finally:
            self._swap_out(pl_module)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._swap_out(pl_module)

    on_test_start, on_test_end = on_validation_start, on_validation_end

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._swap_out(pl_module)

    def averaged_state_dict(self) -> dict[str, dict[str, Tensor]]:
        """State dict of each averaged module, by its name; {} before training."""
        return {name: dict(averaged.state_dict()) for name, averaged in self.averages.items()}

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._live:
            raise RuntimeError("a checkpoint during validation would store averaged weights as the raw ones")
        checkpoint["ema"] = self.averaged_state_dict()

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = checkpoint.get("ema", {})


def _copy(module: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), values, strict=True):
            parameter.copy_(value)


def ema_weights(checkpoint: dict[str, Any]) -> dict[str, dict[str, Tensor]] | None:
    """Averaged state dicts of a checkpoint by module name: the best so far, where early stopping has chosen them; None
    where it has none."""
    published = checkpoint.get("published")
    return published["weights"] if published is not None else checkpoint.get("ema") or None
