"""Builds small Llamas, and samples from one the plain way: the whole prefix again at every step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tessera.generators import Llama, SamplingConfig
from tessera.generators.sampling import probabilities


def small_llama(seed: int = 0, **sizes: Any) -> Llama:
    """A small Llama in eval mode, every parameter random (at initialisation all logits are 0)."""
    options = dict(codebook_size=11, num_tokens=9, num_classes=4, grids=[(3, 3)], hidden_size=16, depth=2, num_heads=2)
    model = Llama(**options | dict(mlp_multiple=8) | sizes).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


@torch.no_grad()
def plain_generate(
    model: Llama,
    labels: Tensor,
    sampling: SamplingConfig,
    draw: Callable[[Tensor, int], Tensor],
    teacher: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Tokens (B, P, L), and per step the logits (2B, P, K), conditional ones first.

    No cache; both halves run at every step and are combined behind the head.
    """
    tokens = torch.zeros(len(labels), model.num_branches, 0, dtype=torch.int64)
    dropped = torch.ones(len(labels), dtype=torch.bool)
    weights, temperatures = sampling.guidance_weights(model.num_tokens), sampling.temperatures(model.num_tokens)
    seen = []
    for step in range(model.num_tokens):
        conditional = model(tokens, model.condition_ids(labels))[:, -1]
        unconditional = model(tokens, model.condition_ids(labels, dropped))[:, -1]
        seen.append(torch.cat([conditional, unconditional]))
        logits = conditional
        if weights is not None:
            logits = unconditional + weights[step] * (conditional - unconditional)
        drawn = draw(probabilities(logits, sampling, temperatures[step]), step)
        if teacher is not None:
            drawn = torch.where(keep[:, :, step], teacher[:, :, step], drawn)
        tokens = torch.cat([tokens, drawn[:, :, None]], 2)
    return tokens, seen
