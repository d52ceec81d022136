"""Learning-rate schedules: pure functions of the optimizer step, and the factories a configuration chooses.

`lr(step)` is the rate of the step number `step` (0-based). A schedule has no state of its own, so that resuming needs
nothing but the step.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tessera.errors import ConfigError

HELD_SHAPES = ("linear", "cosine", "exponential")


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


def held_factor(
    step: float,
    warmup_steps: float,
    total_steps: float,
    warmup_factor: float,
    end_factor: float,
    hold: float = 0.0,
    shape: str = "linear",
    knee: float | None = None,
) -> float:
    """Share of the rate: linear warm-up from warmup_factor, 1 for a while, then down to end_factor at the last step.

    m(s) = warmup_factor + (1 - warmup_factor) s / w for s < w. With q = (s - w) / (T - 1 - w) and e = end_factor: 1
    where q < hold, else with r = (q - hold) / (1 - hold)

    cosine       m = e + (1 - e) (1 + cos(pi r)) / 2
    linear       m = e + (1 - e) (1 - r); with a knee k in two straight parts, through (k, m_k) with m_k halfway
                 between 1 and the single line: m_k = (1 + e + (1 - e) (1 - k)) / 2
    exponential  m = e^r

    Source: FoundationVision/VAR, utils/lr_control.py, whose cos, lin00, lin0, lin, lin<T> and exp are cosine, linear
        (hold 0, 0.05 and 0.15), linear with knee T, and exponential (hold 0.15); TencentARC/SEED-Voken,
        cond_transformer_llama.py (IBQ), for lin0.
    """
    if step < warmup_steps:
        return warmup_factor + (1 - warmup_factor) * step / warmup_steps
    done = (decay_progress(step, warmup_steps, total_steps - 1) - hold) / (1 - hold)
    if done < 0:
        return 1.0
    if shape == "cosine":
        return end_factor + (1 - end_factor) * (0.5 + 0.5 * math.cos(math.pi * done))
    if shape == "exponential":
        return math.exp(done * math.log(end_factor))
    if knee is None:
        return end_factor + (1 - end_factor) * (1 - done)
    middle = (1 + end_factor + (1 - end_factor) * (1 - knee)) / 2
    if done < knee:
        return 1 + (middle - 1) * done / knee
    return end_factor + (middle - end_factor) * (1 - done) / (1 - knee)


def epoch_cosine_lr(epoch: int, lr: float, warmup_epochs: int, epochs: int, min_lr: float, warmup_lr: float) -> float:
    """Rate during an epoch: linear warm-up from warmup_lr, then the cosine of epoch / epochs, which knows no warm-up.

    lr(e) = warmup_lr + (lr - warmup_lr) e / w for e < w, else min_lr + (lr - min_lr) (1 + cos(pi e / E)) / 2.
    Source: timm's cosine schedule stepped per epoch, as XQ-GAN and RobusTok use it.
    """
    if epoch < warmup_epochs:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup_epochs
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1.0)))


def drop_lr(step: float, lr: float, warmup_steps: float, drop_steps: Sequence[float], factor: float) -> float:
    """Linear warm-up from 0, then lr times factor for each drop that lies behind: lr factor^|{d : s >= d}|."""
    # drops given as fractions of training miss their step by rounding
    passed = sum(step >= drop - 1e-6 * max(drop, 1.0) for drop in drop_steps)
    return lr * warmup(step, warmup_steps) * factor**passed


def cosine_weight_decay(step: float, total_steps: float, start: float, end: float) -> float:
    """Half a cosine from start to end at the last step: end + (start - end) (1 + cos(pi s / (T - 1))) / 2.

    Source: TencentARC/SEED-Voken, cond_transformer_llama.py, which then writes it into the groups without decay, too.
    """
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(step / max(total_steps - 1, 1), 1.0)))


class _RateAndDecay(LambdaLR):
    """LambdaLR that also moves the weight decay of the groups that have one."""

    def __init__(self, optimizer: Optimizer, factors: list[Any], end_weight_decay: float, total_steps: int):
        self.end_weight_decay, self.total_steps = end_weight_decay, total_steps
        for group in optimizer.param_groups:
            group.setdefault("initial_weight_decay", group.get("weight_decay", 0.0))
        super().__init__(optimizer, factors)

    def step(self, *arguments: Any) -> None:
        super().step(*arguments)
        for group in self.optimizer.param_groups:
            if start := group["initial_weight_decay"]:
                step = self.last_epoch
                group["weight_decay"] = cosine_weight_decay(step, self.total_steps, start, self.end_weight_decay)


class Schedule:
    """Base of the factories: called with (optimizer, total_steps), gives a torch scheduler stepped per optimizer step.

    Args:
        warmup_steps: optimizer steps of linear warm-up.
        warmup_fraction: the same as a fraction of training, rounded to steps; give one of the two.
        min_lr: rate at the end of training.
        end_weight_decay: to which the weight decay moves along half a cosine, in the parameter groups that have one;
            None: it stays.

    Raises:
        ConfigError: negative or contradictory values; min_lr above the optimizer's rate, which would raise the rate.
    """

    def __init__(
        self,
        warmup_steps: int = 0,
        warmup_fraction: float = 0.0,
        min_lr: float = 0.0,
        end_weight_decay: float | None = None,
    ):
        if warmup_steps < 0 or min_lr < 0 or not 0 <= warmup_fraction < 1:
            raise ConfigError(
                f"scheduler.warmup_steps={warmup_steps}, scheduler.min_lr={min_lr} must not be negative and "
                f"scheduler.warmup_fraction={warmup_fraction} must be in [0, 1)"
            )
        if warmup_steps and warmup_fraction:
            raise ConfigError("give scheduler.warmup_steps or scheduler.warmup_fraction, not both")
        if end_weight_decay is not None and end_weight_decay < 0:
            raise ConfigError(f"scheduler.end_weight_decay={end_weight_decay} must not be negative")
        self.warmup_steps, self.warmup_fraction, self.min_lr = warmup_steps, warmup_fraction, min_lr
        self.end_weight_decay = end_weight_decay

    def lr(self, step: float, lr: float, warmup_steps: float, total_steps: float, min_lr: float) -> float:
        """Learning rate of a step."""
        raise NotImplementedError

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        start = self.warmup_steps or round(self.warmup_fraction * total_steps)
        if start > total_steps:
            raise ConfigError(f"scheduler.warmup_steps={start} exceeds the {total_steps} steps of trainer.max_steps")

        def factor(base: float):
            if self.min_lr > base:
                raise ConfigError(f"scheduler.min_lr={self.min_lr} is above optimizer.lr={base}")
            return lambda step: self.lr(step, base, start, total_steps, self.min_lr) / base if base else 1.0

        factors = [factor(group["lr"]) for group in optimizer.param_groups]
        if self.end_weight_decay is not None:
            return _RateAndDecay(optimizer, factors, self.end_weight_decay, total_steps)
        return LambdaLR(optimizer, factors)


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


class HeldSchedule(Schedule):
    """Warm-up, constant for a while, then down to a share of the rate at the last step (`held_factor`).

    Args:
        shape: of the way down: linear, cosine or exponential.
        hold: share of the steps after warm-up in which the rate stays, in [0, 1).
        knee: share of the way down at which a linear one becomes less steep, in (0, 1); None: nowhere.
        warmup_factor: the rate of a warm-up's first step, as a share of the optimizer's rate.
        end_factor: the rate of the last step, as a share of the optimizer's rate; above 0 for exponential.
        warmup_steps, warmup_fraction, end_weight_decay: see `Schedule`.

    Raises:
        ConfigError: values out of range, another shape, a knee in another shape than linear.
    """

    def __init__(
        self,
        shape: str = "linear",
        hold: float = 0.05,
        knee: float | None = None,
        warmup_factor: float = 0.005,
        end_factor: float = 0.01,
        warmup_steps: int = 0,
        warmup_fraction: float = 0.0,
        end_weight_decay: float | None = None,
    ):
        super().__init__(warmup_steps, warmup_fraction, end_weight_decay=end_weight_decay)
        if shape not in HELD_SHAPES:
            raise ConfigError(f"scheduler.shape={shape!r} is unknown; choose one of {', '.join(HELD_SHAPES)}")
        if not (0 <= hold < 1 and 0 <= warmup_factor <= 1 and 0 <= end_factor <= 1):
            raise ConfigError(
                f"scheduler.hold={hold} must be in [0, 1), scheduler.warmup_factor={warmup_factor} and "
                f"scheduler.end_factor={end_factor} in [0, 1]"
            )
        if knee is not None and (shape != "linear" or not 0 < knee < 1):
            raise ConfigError(f"scheduler.knee={knee} must be in (0, 1) and needs shape=linear; set it to null")
        if shape == "exponential" and end_factor == 0:
            raise ConfigError("scheduler.end_factor=0 is never reached exponentially; give a positive one")
        self.shape, self.hold, self.knee = shape, hold, knee
        self.warmup_factor, self.end_factor = warmup_factor, end_factor

    def lr(self, step: float, lr: float, warmup_steps: float, total_steps: float, min_lr: float) -> float:
        return lr * held_factor(
            step, warmup_steps, total_steps, self.warmup_factor, self.end_factor, self.hold, self.shape, self.knee
        )


class EpochCosineSchedule(Schedule):
    """A rate per epoch: warm-up epochs from `warmup_lr`, then half a cosine to `min_lr` (`epoch_cosine_lr`).

    Args:
        epochs: equal parts into which the steps are cut.
        warmup_epochs: of linear warm-up, which the cosine's time includes.
        warmup_lr: rate of the first epoch of a warm-up.
        min_lr: rate at the end.

    Raises:
        ConfigError: values out of range.
    """

    def __init__(self, epochs: int, warmup_epochs: int = 1, warmup_lr: float = 1e-5, min_lr: float = 0.0):
        super().__init__(min_lr=min_lr)
        if epochs < 1 or not 0 <= warmup_epochs <= epochs or warmup_lr < 0:
            raise ConfigError(
                f"scheduler.epochs={epochs} must be at least 1, scheduler.warmup_epochs={warmup_epochs} between 0 and "
                f"it, and scheduler.warmup_lr={warmup_lr} not negative"
            )
        self.epochs, self.warmup_epochs, self.warmup_lr = epochs, warmup_epochs, warmup_lr

    def lr(self, step: float, lr: float, warmup_steps: float, total_steps: float, min_lr: float) -> float:
        epoch = int(step * self.epochs // total_steps)
        return epoch_cosine_lr(epoch, lr, self.warmup_epochs, self.epochs, min_lr, self.warmup_lr)


class DropSchedule(Schedule):
    """Warm-up, then a constant rate that drops by a factor at given times (`drop_lr`).

    Args:
        drop_fractions: times as fractions of training.
        drop_steps: times as steps; give one of the two.
        factor: of each drop.
        warmup_steps, warmup_fraction: see `Schedule`.

    Raises:
        ConfigError: neither or both kinds of times, or values out of range.
    """

    def __init__(
        self,
        drop_fractions: Sequence[float] | None = None,
        drop_steps: Sequence[int] | None = None,
        factor: float = 0.1,
        warmup_steps: int = 0,
        warmup_fraction: float = 0.0,
    ):
        super().__init__(warmup_steps, warmup_fraction)
        if (drop_fractions is None) == (drop_steps is None):
            raise ConfigError("give one of scheduler.drop_fractions and scheduler.drop_steps")
        if not 0 < factor <= 1 or any(not 0 <= f <= 1 for f in drop_fractions or ()) or min(drop_steps or [0]) < 0:
            raise ConfigError(
                f"scheduler.factor={factor} must be in (0, 1], scheduler.drop_fractions={drop_fractions} in [0, 1] and "
                f"scheduler.drop_steps={drop_steps} not negative"
            )
        self.drop_fractions, self.drop_steps, self.factor = drop_fractions, drop_steps, factor

    def lr(self, step: float, lr: float, warmup_steps: float, total_steps: float, min_lr: float) -> float:
        drops = self.drop_steps if self.drop_steps is not None else [f * total_steps for f in self.drop_fractions]
        return drop_lr(step, lr, warmup_steps, drops, self.factor)
