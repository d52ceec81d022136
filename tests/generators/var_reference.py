"""Builds small VARs on quantizers of any kind, and samples from them the plain way: all scales again at every scale."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from golden_cases import Golden
from tessera.generators import VAR, SamplingConfig
from tessera.generators.sampling import probabilities
from tessera.quantizers import BSQCodebook, MultiScaleQuantizer, ProductQuantizer, ResidualQuantizer, VQCodebook

VQ = partial(VQCodebook, codebook_size=11, l2_normalize=False, search="cosine")
GRIDS = [1, (1, 2), (2, 2), (2, 3)]
STRUCTURES = {
    "multiscale": partial(MultiScaleQuantizer, codebook=VQ, grids=GRIDS),
    "equal_scales": partial(MultiScaleQuantizer, codebook=VQ, grids=[1, 1, 3, 3]),
    "own_codebooks": partial(
        MultiScaleQuantizer, codebook=VQ, grids=GRIDS, shared_codebook=False, phi_convs=0, gain=0.8
    ),
    "binary": partial(MultiScaleQuantizer, codebook=partial(BSQCodebook, bits=4), grids=GRIDS),
    "many_scales": partial(MultiScaleQuantizer, codebook=VQ, grids=[1, 1, 2, 2, 2, 3, 3, 3, 4, 4]),
    "residual": partial(ResidualQuantizer, codebook=VQ, depth=3, grid=(2, 2)),
}


def small_quantizer(structure: str = "multiscale", branches: int = 1, seed: int = 0) -> ProductQuantizer:
    torch.manual_seed(seed)
    return ProductQuantizer(STRUCTURES[structure], branches, 4 * branches).eval()


def small_var(structure: str = "multiscale", branches: int = 1, seed: int = 0, **options: Any) -> VAR:
    """A small VAR in eval mode, bound, every parameter random."""
    quantizer = small_quantizer(structure, branches)
    sizes = {"depth": 2, "hidden_size": 16, "num_heads": 2, "mlp_size": 24, "drop_path": 0.0}
    model = VAR(**VAR.sizes(quantizer, 4), **sizes | options).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    model.bind(quantizer)
    return model


def small_batch(model: VAR, count: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (B, P, L) and labels (B,)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, model.num_branches, model.num_tokens)
    tokens = torch.randint(0, model.codebook_size, shape, generator=generator)
    return tokens, torch.randint(0, model.num_classes, (count,), generator=generator)


@torch.no_grad()
def plain_generate(
    model: VAR,
    labels: Tensor,
    sampling: SamplingConfig,
    draw: Callable[[Tensor, int], Tensor],
    teacher: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """Tokens (B, P, L). No cache: both halves run over all scales at every scale and are combined behind the head.

    Places not drawn yet hold token 0: a scale doesn't see later ones.
    """
    tokens = torch.zeros(len(labels), model.num_branches, model.num_tokens, dtype=torch.int64)
    dropped = torch.ones(len(labels), dtype=torch.bool)
    weights, end = sampling.guidance_weights(len(model.grids)), 0
    for scale, size in enumerate(model.scale_sizes):
        sites = slice(end, end := end + size)
        logits = model(tokens, model.condition_ids(labels))[:, :, sites]
        if weights is not None:
            unconditional = model(tokens, model.condition_ids(labels, dropped))[:, :, sites]
            logits = unconditional + weights[scale] * (logits - unconditional)
        temperature = sampling.temperatures(len(model.grids))[scale]
        drawn = draw(probabilities(logits, sampling, temperature), scale)
        if teacher is not None:
            drawn = torch.where(keep[:, :, sites], teacher[:, :, sites], drawn)
        tokens[:, :, sites] = drawn
    return tokens


def branch_key(name: str, branches: int, branch: int, scale: int) -> str:
    """Golden files name a branch only where there are several: idx_3, idx_p1_3."""
    return f"{name}_{scale}" if branches == 1 else f"{name}_p{branch}_{scale}"


def recorded(values: dict[str, Tensor], name: str, model: VAR, scale: int) -> Tensor:
    """Recorded values of all branches at a scale, side by side on axis 1."""
    keys = [branch_key(name, model.num_branches, branch, scale) for branch in range(model.num_branches)]
    return torch.stack([values[key] for key in keys], 1)


def recorded_tokens(file: Golden, model: VAR, prefix: str = "") -> Tensor:
    """(B, P, L) of a file's inputs idx_*."""
    parts = [recorded(file.input, f"{prefix}idx", model, scale) for scale in range(len(model.grids))]
    return torch.cat(parts, 2)
