"""Learning-rate schedules: pure functions of the optimizer step, and the factories a configuration chooses.

`lr(step)` is the rate of the step number `step` (0-based). A schedule has no state of its own, so that resuming needs
nothing but the step.
"""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tessera.errors import ConfigError


def warmup(step: float, warmup_steps: float) -> float:
    """Linear factor from 0 (at step 0) to 1 (from warmup_steps on)."""
    return step / warmup_steps if step < warmup_steps else 1.0


def decay_progress(step: float, warmup_steps: float, total_steps: float) -> float:
    """Share of the time after warm-up that is over, in [0, 1]."""
    return min(max((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0.0), 1.0)


def constant_lr(step: float, lr: float, warmup_steps: float, total_steps: float, min_lr: float) -> float:
    """lr after warm-up."""
    return lr * warmup(step, warmup_steps)


def cosine_lr(step: float, lr: float, warmup_steps: float, total_steps: float, min_lr: float) -> float:
    """Linear warm-up from 0, then half a cosine down to min_lr.

    lr(s) = lr s / w for s < w, else min_lr + (lr - min_lr) (1 + cos(pi (s - w) / (T - w))) / 2.
    Source: bytedance/1d-tokenizer, utils/lr_schedulers.py (RAR); its first step has rate 0.
    """
    if step < warmup_steps:
        return lr * warmup(step, warmup_steps)
    done = decay_progress(step, warmup_steps, total_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def linear_lr(step: float, lr: float, warmup_steps: float, total_steps: float, min_lr: float) -> float:
    """Linear warm-up from 0, then linearly down to min_lr."""
    if step < warmup_steps:
        return lr * warmup(step, warmup_steps)
    return lr + (min_lr - lr) * decay_progress(step, warmup_steps, total_steps)


class Schedule:
    """Base of the factories: called with (optimizer, total_steps), gives a torch scheduler stepped per optimizer step.

    Args:
        warmup_steps: optimizer steps of linear warm-up.
        warmup_fraction: the same as a fraction of training; give one of the two.
        min_lr: rate at the end of training.

    Raises:
        ConfigError: negative or contradictory values; min_lr above the optimizer's rate, which would raise the rate.
    """

    def __init__(self, warmup_steps: int = 0, warmup_fraction: float = 0.0, min_lr: float = 0.0):
        if warmup_steps < 0 or min_lr < 0 or not 0 <= warmup_fraction < 1:
            raise ConfigError(
                f"scheduler.warmup_steps={warmup_steps}, scheduler.min_lr={min_lr} must not be negative and "
                f"scheduler.warmup_fraction={warmup_fraction} must be in [0, 1)"
            )
        if warmup_steps and warmup_fraction:
            raise ConfigError("give scheduler.warmup_steps or scheduler.warmup_fraction, not both")
        self.warmup_steps, self.warmup_fraction, self.min_lr = warmup_steps, warmup_fraction, min_lr

    def lr(self, step: float, lr: float, warmup_steps: float, total_steps: float, min_lr: float) -> float:
        """Learning rate of a step."""
        raise NotImplementedError

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        start = self.warmup_steps or self.warmup_fraction * total_steps
        if start > total_steps:
            raise ConfigError(f"scheduler.warmup_steps={start} exceeds the {total_steps} steps of trainer.max_steps")

        def factor(base: float):
            if self.min_lr > base:
                raise ConfigError(f"scheduler.min_lr={self.min_lr} is above optimizer.lr={base}")
            return lambda step: self.lr(step, base, start, total_steps, self.min_lr) / base if base else 1.0

        return LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])


class ConstantSchedule(Schedule):
    """Warm-up, then constant; `min_lr` has no meaning here and must stay 0."""

    def __init__(self, warmup_steps: int = 0, warmup_fraction: float = 0.0):
        super().__init__(warmup_steps, warmup_fraction)

    lr = staticmethod(constant_lr)


class CosineSchedule(Schedule):
    """Warm-up, then half a cosine to min_lr (`cosine_lr`)."""

    lr = staticmethod(cosine_lr)


class LinearSchedule(Schedule):
    """Warm-up, then linear to min_lr (`linear_lr`)."""

    lr = staticmethod(linear_lr)
