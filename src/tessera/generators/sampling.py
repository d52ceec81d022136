"""How a token is drawn from logits: settings, temperature, top-k and top-p, and the draw itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.generators.guidance import SCHEDULES, guidance_weights
from tessera.rng import SampleRng, as_sample_rng, exponential

Draw = Callable[[Tensor, int], Tensor]  # (probabilities (B, ..., K), step) -> (B, ...) int64
Rng = SampleRng | torch.Generator | Draw | None


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of autoregressive sampling.

    Args:
        temperature: > 0; logits are divided by it.
        guidance_scale: > 0, the weight that classifier-free guidance reaches; None: no guidance. The public
            RAR code writes "no guidance" as 0; that is refused here, since a weight of 0 would mean
            unconditional samples.
        guidance_power: >= 0; exponent of the power-cosine rise, 0: constant guidance.
        top_k: keep the k most probable codes, and those as probable as the last of them; 0 or None: all.
        top_p: in (0, 1]; of those keep the smallest set that holds this share of the probability; 1 or None:
            all.
        guidance_schedule: how the weight gets there over the steps (`tessera.generators.guidance`).
        temperature_end: > 0, the temperature of the last step, to which it moves in equal parts:
            T_t = temperature + (temperature_end - temperature) (t + 1) / T; None: constant.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 1.0
    guidance_scale: float | None = None
    guidance_power: float = 0.0
    top_k: int | None = 0
    top_p: float | None = 1.0
    guidance_schedule: str = "power_cosine"
    temperature_end: float | None = None

    def __post_init__(self) -> None:
        for name in ("temperature", "temperature_end"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(
                    f"sampling.{name}={value} must be positive; use sampling.top_k=1 to take the most probable code"
                )
        scale = self.guidance_scale
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ConfigError(f"sampling.guidance_scale={scale} must be positive; use null to switch guidance off")
        if not (math.isfinite(self.guidance_power) and self.guidance_power >= 0):
            raise ConfigError(
                f"sampling.guidance_power={self.guidance_power} must be at least 0 (0: constant guidance)"
            )
        if self.guidance_schedule not in SCHEDULES:
            raise ConfigError(
                f"sampling.guidance_schedule={self.guidance_schedule!r} is unknown; choose one of "
                f"{', '.join(SCHEDULES)}"
            )
        if self.guidance_power and self.guidance_schedule != "power_cosine":
            raise ConfigError(
                f"sampling.guidance_power={self.guidance_power} has no effect on guidance_schedule="
                f"{self.guidance_schedule}; set it to 0, or choose power_cosine"
            )
        if self.top_k is not None and (int(self.top_k) != self.top_k or self.top_k < 0):
            raise ConfigError(f"sampling.top_k={self.top_k} must be a whole number of at least 0 (0: all codes)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p={self.top_p} is outside (0, 1] (1: all codes)")

    @property
    def is_guided(self) -> bool:
        """Whether guidance changes anything."""
        return self.guidance_scale not in (None, 1)

    def guidance_weights(self, num_steps: int) -> list[float] | None:
        """Weight of guidance at each step, or None where every weight is 1."""
        if not self.is_guided:
            return None
        return guidance_weights(self.guidance_scale, self.guidance_power, num_steps, self.guidance_schedule)

    def temperatures(self, num_steps: int) -> list[float]:
        """Temperature of each step."""
        if self.temperature_end is None:
            return [self.temperature] * num_steps
        change = self.temperature_end - self.temperature
        return [self.temperature + change * (step + 1) / num_steps for step in range(num_steps)]


def probabilities(logits: Tensor, sampling: SamplingConfig, temperature: float | None = None) -> Tensor:
    """Distribution to draw from: softmax of logits / temperature, restricted to top-k and then top-p.

    Args:
        logits: (..., K) float; the softmax runs in float32.
        sampling: top_k and top_p are read.
        temperature: of this step; None: `sampling.temperature`.

    Returns:
        (..., K) float32, each row summing to 1. Codes as probable as the last of the top k stay with it. With top_p
        those go that hold at most 1 - top_p together with the less probable ones, but never the most probable; of
        equal ones, the later counts as the more probable.

    Source: VAR (arXiv:2404.02905), whose order of the two filters and treatment of ties this is.
    """
    scaled = logits.float() / (sampling.temperature if temperature is None else temperature)
    size = scaled.shape[-1]
    top_k = min(sampling.top_k or size, size)
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    if top_k == size and top_p == 1.0:
        return scaled.softmax(-1)
    # only the k best are sorted, and the others are compared with the last of them
    best, places = scaled.topk(top_k, dim=-1)
    if top_k < size:
        scaled = scaled.masked_fill(scaled < best[..., -1:], -torch.inf)
    probs = scaled.softmax(-1)
    if top_p == 1.0:
        return probs
    probs = probs.masked_fill(~_nucleus(scaled, best, probs.gather(-1, places), top_p), 0.0)
    return probs / probs.sum(-1, keepdim=True)


def _nucleus(scaled: Tensor, best: Tensor, ordered: Tensor, top_p: float) -> Tensor:
    """Which codes top-p keeps, (..., K) bool: all but the least probable ones that together hold at most 1 - top_p.

    The sums run from the least probable code up, so that of codes right at the limit, as equal ones may lie, the
    published ones stay. Codes as large as the last of the k best, of which there may be more than k, are counted
    without sorting them.

    Args:
        scaled: (..., K) float32 logits, -inf where top-k removed a code.
        best: (..., k) the largest of them in falling order.
        ordered: (..., k) their probabilities.
    """
    last, share = best[..., -1:], ordered[..., -1:].double()
    limit = 1 - top_p
    lowest = (scaled == last).sum(-1, keepdim=True)
    fitting = (limit / share).floor()
    fitting = fitting + (((fitting + 1) * share).float() <= limit)
    # infinitely many fit where their probability is 0
    dropped = torch.minimum(fitting, lowest).long()
    higher = best > last
    held = (lowest * share).float() + ordered.where(higher, 0.0).flip(-1).cumsum(-1)
    dropped = dropped + (higher.flip(-1) & (held <= limit)).sum(-1, keepdim=True)
    kept = ((scaled >= last).sum(-1, keepdim=True) - dropped).clamp_min(1)
    least = best.gather(-1, kept.clamp_max(best.shape[-1]) - 1)
    above = (best > least).sum(-1, keepdim=True)
    equal = scaled == least
    rank = equal.flip(-1).cumsum(-1).flip(-1)  # from 1, the last code first
    return (scaled > least) | (equal & (rank <= kept - above))


def race(probs: Tensor, uniform: Tensor) -> Tensor:
    """One draw from each distribution by an exponential race: argmax_k p_k / q_k, q_k ~ Exp(1).

    The same rule by which `torch.multinomial` draws one sample; it needs no host synchronisation.

    Args:
        probs: (..., K) float32.
        uniform: (..., K) float32 in [0, 1).

    Returns:
        (...,) int64.
    """
    return (probs / exponential(uniform)).argmax(-1)


def make_draw(rng: Rng, batch_size: int, device: torch.device) -> Draw:
    """The function that draws the tokens of one step.

    Args:
        rng: a function of (probs (B, P, K), step), used as it is; or a source of draws, read from the stream
            "sample/<step>" for the exponential race. None: torch's global generator.
        batch_size: B.
        device: where probabilities live.

    Raises:
        ConfigError: the source draws for another number of samples.
    """
    if callable(rng):
        return rng
    source = as_sample_rng(rng, batch_size, device)

    def draw(probs: Tensor, step: int) -> Tensor:
        uniform = source.uniform(f"sample/{step}", *probs.shape[1:])
        if uniform.shape[0] != batch_size:
            raise ConfigError(
                f"rng draws for {uniform.shape[0]} samples but {batch_size} labels were given; give the "
                "random source one index per label"
            )
        return race(probs, uniform.to(probs.device))

    return draw
