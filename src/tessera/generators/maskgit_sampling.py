"""Sampling by rounds of unmasking: settings, the schedule of masks, and the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.generators.inference import evaluating, float32_head, guided
from tessera.generators.sampling import Rng, SamplingConfig, probabilities
from tessera.rng import SampleRng, as_sample_rng

if TYPE_CHECKING:
    from tessera.generators.maskgit import MaskGIT

CONFIDENCES = ("logit", "log_prob")


@dataclass(frozen=True)
class MaskGITSampling(SamplingConfig):
    """Settings of sampling by rounds of unmasking.

    The softmax temperature of the base class divides the logits; top-k and top-p then remove codes. The published
    annealing of the softmax, 0.5 + 0.8 (1 - rho), is temperature=1.3 with temperature_end=0.5.

    Args:
        num_steps: T, rounds.
        gumbel_temperature: tau >= 0; round t adds tau (1 - rho) times Gumbel noise to the logits and to the
            confidences, rho = (t + 1) / T. 0: the most probable codes, and no randomness at all.
        confidence: what decides which tokens stay: "logit" of the drawn code, as published, or its "log_prob".

    Raises:
        ConfigError: a value out of range.

    Source: Chang et al. 2022 (arXiv:2202.04200); `generate` of modeling/maskgit.py, bytedance/1d-tokenizer.
    """

    num_steps: int = 8
    gumbel_temperature: float = 3.0
    confidence: str = "logit"

    def __post_init__(self) -> None:
        super().__post_init__()
        if int(self.num_steps) != self.num_steps or self.num_steps < 1:
            raise ConfigError(f"sampling.num_steps={self.num_steps} must be a whole number of at least 1")
        if not (math.isfinite(self.gumbel_temperature) and self.gumbel_temperature >= 0):
            raise ConfigError(f"sampling.gumbel_temperature={self.gumbel_temperature} must be at least 0 (0: no noise)")
        if self.confidence not in CONFIDENCES:
            raise ConfigError(
                f"sampling.confidence={self.confidence!r} is unknown; choose one of {', '.join(CONFIDENCES)}"
            )


def gumbel(uniform: Tensor) -> Tensor:
    """Map uniforms in [0, 1) to Gumbel noise -log(-log u), both arguments at least 1e-20."""
    return uniform.clamp_min(1e-20).log_().neg_().clamp_min_(1e-20).log_().neg_()


def mask_share(progress: float) -> float:
    """Share of the tokens that is masked at progress rho in [0, 1]: arccos(rho) / (pi / 2)."""
    return math.acos(progress) / (math.pi / 2)


def masks_left(free: Tensor, masked: Tensor, share: float) -> Tensor:
    """How many tokens stay masked after a round that isn't the last.

    Args:
        free: (B, 1) int64, tokens that the sampler fills.
        masked: (B, 1) int64, of these the ones masked so far.
        share: of the free tokens, that is to be masked.

    Returns:
        (B, 1) int64: floor(share free), but at least one fewer than before and at least one.
    """
    wanted = (free.double() * share).floor().long()
    return torch.minimum(torch.minimum(wanted, masked - 1).clamp_min(1), masked)


def least(values: Tensor, count: Tensor) -> Tensor:
    """Whether an entry is among the `count` (B, 1) smallest of its row; values (B, N) -> (B, N) bool.

    Of equal entries the first count as smaller, so that each row gets exactly its count.
    """
    order = values.argsort(dim=1, stable=True)
    chosen = torch.arange(values.shape[1], device=values.device) < count
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def generate_masked(
    model: MaskGIT,
    labels: Tensor,
    sampling: MaskGITSampling,
    teacher: Tensor | None = None,
    keep: Tensor | None = None,
    rng: Rng = None,
) -> Tensor:
    """Fill all tokens in T rounds; arguments as in `MaskGIT.generate`, already checked.

    Each round draws every masked token and masks the least confident ones again. Counts of masks are kept per sample
    and on the device: no round waits for the host. Both halves of guidance run as one batch and are combined before
    the head; in a round of weight 1 the unconditional half doesn't run.
    """
    device = model.lm_head.weight.device
    labels, batch = labels.to(device), len(labels)
    shape = (batch, model.num_branches, model.num_tokens)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    if batch == 0:
        return tokens
    masked = torch.ones(shape, dtype=torch.bool, device=device)
    if keep is not None:
        masked = ~keep.to(device)
        tokens = torch.where(masked, tokens, teacher.to(device))
    free = masked.flatten(1).sum(1, keepdim=True)
    left = free
    steps = int(sampling.num_steps)
    weights = sampling.guidance_weights(steps) or [1.0] * steps
    temperatures = sampling.temperatures(steps)
    source = _source(rng, batch, device)
    with evaluating(model):
        head = float32_head(model.lm_head)
        conditions = model.condition_ids(labels)
        without = torch.full_like(conditions, model.none_id)
        for step in range(steps):
            progress = (step + 1) / steps
            noise = sampling.gumbel_temperature * (1 - progress)
            features = _features(model, tokens, masked, conditions, without, weights[step])
            logits = head(features).unflatten(-1, (model.num_branches, model.codebook_size)).transpose(1, 2)
            logits = _filtered(logits, sampling, temperatures[step])
            drawn = logits
            if noise > 0:
                drawn = drawn + noise * gumbel(_uniform(source, f"sample/{step}", logits.shape, device))
            drawn = drawn.argmax(-1)
            tokens = torch.where(masked, drawn, tokens)
            if step + 1 < steps:
                confidence = logits.gather(-1, drawn[..., None])[..., 0]
                if sampling.confidence == "log_prob":
                    confidence = confidence - logits.logsumexp(-1)
                if noise > 0:
                    confidence = confidence + noise * gumbel(_uniform(source, f"confidence/{step}", shape, device))
                left = masks_left(free, left, mask_share(progress))
                masked = least(confidence.masked_fill(~masked, torch.inf).flatten(1), left).view(shape)
    return tokens


def _features(
    model: MaskGIT, tokens: Tensor, masked: Tensor, conditions: Tensor, without: Tensor, weight: float
) -> Tensor:
    """(B, L, d) features of a round, guided."""
    if weight == 1:
        return model.features(tokens, masked, conditions)
    both = model.features(tokens.repeat(2, 1, 1), masked.repeat(2, 1, 1), torch.cat([conditions, without]))
    return guided(both, weight)


def _filtered(logits: Tensor, sampling: MaskGITSampling, temperature: float) -> Tensor:
    """Logits / temperature, -inf where top-k or top-p removes a code."""
    scaled = logits / temperature
    if not sampling.top_k and sampling.top_p in (None, 1.0):
        return scaled
    return scaled.masked_fill(probabilities(logits, sampling, temperature) == 0, -torch.inf)


def _source(rng: Rng, batch: int, device: torch.device) -> SampleRng:
    if callable(rng):
        raise ConfigError(
            "MaskGIT draws more than codes, so rng can't be a function of probabilities; give a torch.Generator or an "
            "object with uniform(stream, *shape), such as tessera.rng.IndexedRng"
        )
    return as_sample_rng(rng, batch, device)


def _uniform(source: SampleRng, stream: str, shape: torch.Size | tuple[int, ...], device: torch.device) -> Tensor:
    uniform = source.uniform(stream, *shape[1:])
    if uniform.shape[0] != shape[0]:
        raise ConfigError(
            f"rng draws for {uniform.shape[0]} samples but {shape[0]} labels were given; give the random source one "
            "index per label"
        )
    return uniform.to(device)
