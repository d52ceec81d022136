"""How the strength of a perturbation falls during training: pure functions of progress."""

import math

from tessera.errors import ConfigError


def linear_ramp(position: float, start: float, end: float, end_ratio: float) -> float:
    """1 before `start`, `end_ratio` from `end` on, a straight line between.

    ratio(p) = 1 - (p - start) / (end - start) * (1 - end_ratio)

    The units of position, start and end are free but equal. The public code's ramp multiplies by end_ratio
    where this one has (1 - end_ratio): it runs to 1 - end_ratio and jumps at `end`, except for end_ratio =
    0.5, the published setting, where the two are the same. It also divides by zero for start = end; here that
    is a step.

    Source: `get_random_ratio` of the public RobusTok code (qiuk2/RobusTok), corrected.
    """
    if position < start:
        return 1.0
    if position >= end:
        return float(end_ratio)
    return 1.0 - (position - start) / (end - start) * (1.0 - end_ratio)


def annealed_count(ratio: float, count: int) -> int:
    """floor(ratio * count), at least 1."""
    return max(1, math.floor(ratio * count))


class LinearAnneal:
    """Ratio by which a strength is multiplied at a given progress of training.

    Args:
        start: progress in [0, 1] at which the ratio begins to fall from 1.
        end: progress in [start, 1] from which on it is `end_ratio`.
        end_ratio: in [0, 1].

    Raises:
        ConfigError: a value out of range, or end before start.

    Source: RobusTok (arXiv 2509.12474), annealing; its main training has start 0.2, end 0.6, end_ratio 0.5.
    """

    def __init__(self, start: float, end: float, end_ratio: float):
        key = "perturbation.schedule"
        for name, value in (("start", start), ("end", end), ("end_ratio", end_ratio)):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"{key}.{name}={value} is outside [0, 1]; times are fractions of the whole training")
        if end < start:
            raise ConfigError(f"{key}.end={end} lies before {key}.start={start}")
        self.start, self.end, self.end_ratio = start, end, end_ratio

    def __call__(self, progress: float) -> float:
        """Ratio in [end_ratio, 1] at `progress` in [0, 1]."""
        return linear_ramp(progress, self.start, self.end, self.end_ratio)
