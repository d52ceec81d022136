"""How a token is drawn from logits: guidance weights, temperature, top-k and top-p, and the draw itself."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.rng import SampleRng, as_sample_rng, exponential

Draw = Callable[[Tensor, int], Tensor]  # (probabilities (B, P, K), step) -> (B, P) int64
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
        top_k: keep the k most probable codes; 0 or None: all. More than the codebook has means all.
        top_p: in (0, 1]; of those keep the smallest set that holds this share of the probability; 1 or None:
            all.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 1.0
    guidance_scale: float | None = None
    guidance_power: float = 0.0
    top_k: int | None = 0
    top_p: float | None = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(
                f"sampling.temperature={self.temperature} must be positive; "
                "use sampling.top_k=1 to take the most probable code"
            )
        scale = self.guidance_scale
        if scale is not None and not (math.isfinite(scale) and scale > 0):
            raise ConfigError(f"sampling.guidance_scale={scale} must be positive; use null to switch guidance off")
        if not (math.isfinite(self.guidance_power) and self.guidance_power >= 0):
            raise ConfigError(
                f"sampling.guidance_power={self.guidance_power} must be at least 0 (0: constant guidance)"
            )
        if self.top_k is not None and (int(self.top_k) != self.top_k or self.top_k < 0):
            raise ConfigError(f"sampling.top_k={self.top_k} must be a whole number of at least 0 (0: all codes)")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling.top_p={self.top_p} is outside (0, 1] (1: all codes)")

    def guidance_weights(self, num_tokens: int) -> list[float] | None:
        """Weight of guidance at each step, or None where guidance changes nothing (every weight 1)."""
        if self.guidance_scale is None or self.guidance_scale == 1:
            return None
        return guidance_weights(self.guidance_scale, self.guidance_power, num_tokens)


def guidance_weights(scale: float, power: float, num_tokens: int) -> list[float]:
    """Power-cosine guidance weights.

    w_t = 1 + (scale - 1) * (1 - cos(pi * (t / L) ** power)) / 2,  t = 0 .. L - 1

    Args:
        scale: the weight reached at t = L.
        power: > 0: w_0 = 1 and the rise is the later the larger it is; 0: every weight is `scale`.
        num_tokens: L.

    Returns:
        L floats.

    Source: RAR, `generate` of bytedance/1d-tokenizer modeling/rar.py.
    """
    # 0 ** 0 is 1, which makes power 0 the constant schedule
    return [1 + (scale - 1) * (1 - math.cos(math.pi * (step / num_tokens) ** power)) / 2 for step in range(num_tokens)]


def probabilities(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Distribution to draw from: softmax of logits / temperature, restricted to top-k and then top-p.

    Args:
        logits: (..., K) float; the softmax runs in float32.
        sampling: temperature, top_k and top_p are read.

    Returns:
        (..., K) float32, each row summing to 1. With top_k exactly min(top_k, K) codes stay (ties: those
        `torch.topk` takes); with top_p at least the most probable one.
    """
    scaled = logits.float() / sampling.temperature
    size = scaled.shape[-1]
    top_k = min(sampling.top_k or size, size)
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    if top_k == size and top_p == 1.0:
        return scaled.softmax(-1)
    # only the k best are sorted; without top_k that is the whole row
    best, codes = scaled.topk(top_k, dim=-1)
    kept = best.softmax(-1)
    if top_p < 1.0:
        # a code stays while the more probable ones together hold less than top_p; the first always does
        before = kept.cumsum(-1) - kept
        kept = kept.masked_fill(before >= top_p, 0.0)
        kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(scaled).scatter_(-1, codes, kept)


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
