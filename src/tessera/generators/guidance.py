"""Weights of classifier-free guidance, one per step: logits = unconditional + weight (conditional - unconditional)."""

import math

from tessera.errors import ConfigError

SCHEDULES = ("constant", "linear", "ramp", "cosine", "power_cosine")


def guidance_weights(scale: float, power: float, num_steps: int, schedule: str = "power_cosine") -> list[float]:
    """The weight w_t of each step t = 0 .. T - 1.

    constant      w_t = s
    linear        w_t = 1 + (s - 1) t / T
    ramp          w_t = 1 + (s - 1) t / (T - 1): the last step gets s; of a single step w_0 = 1
    cosine        w_t = 1 + (s - 1) (1 - cos(pi t / T)) / 2
    power_cosine  w_t = 1 + (s - 1) (1 - cos(pi (t / T)^a)) / 2: the larger a, the later the rise; a = 0: constant

    A step is a token of RAR and Llama, a scale of VAR, and a round of unmasking of MaskGIT. Published code that writes
    conditional + c (conditional - unconditional) means s = 1 + c.

    Args:
        scale: s, the weight that guidance reaches.
        power: a; read by power_cosine alone.
        num_steps: T.
        schedule: one of `SCHEDULES`.

    Returns:
        T floats.

    Raises:
        ConfigError: another schedule.

    Source: power_cosine: RAR and TiTok (`generate` of bytedance/1d-tokenizer); linear: TiTok; ramp: VAR
        (FoundationVision/VAR); constant: IBQ (TencentARC/SEED-Voken).
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"sampling.guidance_schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if schedule == "constant":
        return [float(scale)] * num_steps
    last = max(num_steps - 1, 1) if schedule == "ramp" else num_steps
    shares = [step / last for step in range(num_steps)]
    if schedule in ("cosine", "power_cosine"):
        # 0 ** 0 is 1, which makes power 0 the constant schedule
        exponent = power if schedule == "power_cosine" else 1.0
        shares = [(1 - math.cos(math.pi * share**exponent)) / 2 for share in shares]
    return [1 + (scale - 1) * share for share in shares]
