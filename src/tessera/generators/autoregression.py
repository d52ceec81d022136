"""The loop of generators that predict one position after another."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tessera.generators.base import Generator
from tessera.generators.inference import evaluating, guided
from tessera.generators.sampling import Rng, SamplingConfig, make_draw, probabilities


class Decoder(Protocol):
    """Feeds tokens to a model in eval mode; made for R rows of conditions, R a multiple of B."""

    def start(self) -> Tensor:
        """(R, d) features that predict the first token."""
        ...

    def step(self, tokens: Tensor, index: int) -> Tensor:
        """Feed token number `index` (B, P), row r that of sample r mod B; (R, d) features that predict the next."""
        ...

    def logits(self, features: Tensor) -> Tensor:
        """(B, d) features -> (B, P, K) float32; affine."""
        ...


def sample_sequence(
    model: Generator,
    decoder: Callable[[Tensor], Decoder],
    labels: Tensor,
    sampling: SamplingConfig,
    teacher: Tensor | None = None,
    keep: Tensor | None = None,
    rng: Rng = None,
) -> Tensor:
    """Sample tokens one position after another.

    Both halves of guidance run as one batch and are combined before the head, which is affine, so that the head runs
    once per sample. Without guidance, or where every weight is 1, the unconditional half doesn't run.

    Args:
        model: the generator.
        decoder: makes the decoder for (R,) condition ids.
        labels, sampling, rng: as in `Generator.generate`, already checked.
        teacher, keep: likewise, but in the order of prediction.

    Returns:
        (B, P, L) int64 in the order of prediction.
    """
    device = next(model.parameters()).device
    labels, batch = labels.to(device), len(labels)
    tokens = torch.empty(batch, model.num_branches, model.num_tokens, dtype=torch.int64, device=device)
    if batch == 0:
        return tokens
    if teacher is not None:
        teacher, keep = teacher.to(device), keep.to(device)
    weights, temperatures = sampling.guidance_weights(model.num_tokens), sampling.temperatures(model.num_tokens)
    draw = make_draw(rng, batch, device)
    with evaluating(model):
        conditions = model.condition_ids(labels)
        if weights is not None:
            conditions = torch.cat([conditions, torch.full_like(conditions, model.none_id)])
        steps = decoder(conditions)
        for index in range(model.num_tokens):
            features = steps.start() if index == 0 else steps.step(tokens[:, :, index - 1], index - 1)
            if weights is not None:
                features = guided(features, weights[index])
            drawn = draw(probabilities(steps.logits(features), sampling, temperatures[index]), index)
            if teacher is not None:
                drawn = torch.where(keep[:, :, index], teacher[:, :, index], drawn)
            tokens[:, :, index] = drawn
    return tokens
