"""Builds RAR from golden files and samples from it the plain way: the whole prefix again at every step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from golden_cases import Golden
from tessera.generators import RAR, SamplingConfig
from tessera.generators.orders import raster_orders
from tessera.generators.sampling import probabilities
from tessera.zoo import from_public


def golden_rar(case: Golden) -> RAR:
    """RAR of a golden file."""
    return from_public(case.metadata["family"], case.config, case.weights)


def public_sampling(options: dict[str, float]) -> SamplingConfig:
    """Our settings for those of the public `generate`, which writes "no guidance" as scale 0."""
    return SamplingConfig(
        temperature=options["randomize_temperature"],
        guidance_scale=options["guidance_scale"] or None,
        guidance_power=options["guidance_scale_pow"],
    )


def small_rar(seed: int = 0, **sizes: Any) -> RAR:
    """A small RAR in eval mode, every parameter random (at initialisation the blocks are the identity)."""
    options = dict(codebook_size=11, num_tokens=9, num_classes=4, hidden_size=16, depth=2, num_heads=2, mlp_size=24)
    options |= dict(extra_positions=2, extra_timesteps=2)
    model = RAR(**options | sizes).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3, generator=generator)
    return model


@torch.no_grad()
def plain_generate(
    model: RAR,
    labels: Tensor,
    sampling: SamplingConfig,
    draw: Callable[[Tensor, int], Tensor],
    teacher: Tensor | None = None,
    keep: Tensor | None = None,
    orders: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Tokens (B, P, L) by place, and per step the conditional and unconditional logits (B, P, K).

    No cache, no folded table; both halves run apart at every step and are combined behind the head.
    """
    orders = raster_orders(len(labels), model.num_tokens) if orders is None else orders
    every = torch.arange(len(labels))
    tokens = torch.zeros(len(labels), model.num_branches, 0, dtype=torch.int64)
    dropped = torch.ones(len(labels), dtype=torch.bool)
    weights = sampling.guidance_weights(model.num_tokens)
    conditional, unconditional = [], []
    for step in range(model.num_tokens):
        conditional.append(model(tokens, model.condition_ids(labels), orders)[:, -1])
        unconditional.append(model(tokens, model.condition_ids(labels, dropped), orders)[:, -1])
        logits = conditional[-1]
        if weights is not None:
            logits = unconditional[-1] + weights[step] * (conditional[-1] - unconditional[-1])
        drawn = draw(probabilities(logits, sampling), step)
        if teacher is not None:
            place = orders[:, step]
            drawn = torch.where(keep[every, :, place], teacher[every, :, place], drawn)
        tokens = torch.cat([tokens, drawn[:, :, None]], 2)
    return torch.empty_like(tokens).scatter_(2, orders[:, None].expand_as(tokens), tokens), conditional, unconditional
