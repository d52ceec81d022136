"""Exponential moving average of the modules a stage publishes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tessera.errors import ConfigError


class EMA(Callback):
    """Averages `pl_module.averaged_modules()` after every optimizer step; validation and test see the averages.

    average <- decay * average + (1 - decay) * weights, from the initial weights on. Buffers are copied as they are.
    Give the decay, or the half-life: after that many steps (or that fraction of training) a weight counts half.

    Args:
        decay: in [0, 1).
        half_life_steps, half_life_fraction: alternatives to `decay`; exactly one of the three is given.
        every_n_steps: average only after every n-th optimizer step.

    Raises:
        ConfigError: none or several of the three given, or values out of range.
    """

    def __init__(
        self,
        decay: float | None = None,
        half_life_steps: float | None = None,
        half_life_fraction: float | None = None,
        every_n_steps: int = 1,
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
        self.every_n_steps = every_n_steps
        self.averages: dict[str, AveragedModel] = {}
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
        average = get_ema_multi_avg_fn(self.decay_for(trainer.max_steps))
        self.averages = {
            name: AveragedModel(module, multi_avg_fn=average, use_buffers=False)
            for name, module in pl_module.averaged_modules().items()
        }
        for name, averaged in self.averages.items():
            averaged.requires_grad_(False)
            # the first update would copy the weights; the average starts from the initial ones instead
            averaged.n_averaged.fill_(1)
            if name in self._loaded:
                averaged.module.load_state_dict(self._loaded[name])
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
            for name, module in pl_module.averaged_modules().items():
                self.averages[name].update_parameters(module)

    def _swap_in(self, pl_module: lightning.LightningModule) -> None:
        if self._live or not self.averages:
            return
        for name, module in pl_module.averaged_modules().items():
            self._live[name] = [value.detach().clone() for value in module.parameters()]
            _copy(module, list(self.averages[name].module.parameters()))

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
        return {name: dict(averaged.module.state_dict()) for name, averaged in self.averages.items()}

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
    """Averaged state dicts of a checkpoint by module name; None where it has none."""
    return checkpoint.get("ema") or None
