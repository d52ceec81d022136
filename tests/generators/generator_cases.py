"""Every generator, small: what the tests common to all go through. A new generator is one line in CASES."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from tessera.generators import (
    RAR,
    VAR,
    Generator,
    Llama,
    MaskGITSampling,
    MaskGITUViT,
    MaskGITViT,
    RARSampling,
    SamplingConfig,
)
from tessera.quantizers import MultiScaleQuantizer, ProductQuantizer, SingleGridQuantizer, VQCodebook

CODES, CLASSES = 11, 4


class GeneratorCase(NamedTuple):
    """Class and its options (no dropout; class_dropout 0.1), whether its tokens lie on several scales, and settings.

    Attributes:
        sampling: with guidance, and every schedule that the generator follows.
        sequential: whether each step's tokens are drawn from probabilities given all earlier tokens.
    """

    make: Callable[..., Generator]
    options: dict[str, Any]
    multiscale: bool = False
    sampling: SamplingConfig = SamplingConfig(1.1, guidance_scale=3.0, guidance_power=1.5, temperature_end=0.9)
    sequential: bool = True


WIDTH = {"hidden_size": 16, "depth": 2, "num_heads": 2}
RAR_SIZES = {**WIDTH, "mlp_size": 24, "dropout": 0.0, "attention_dropout": 0.0}
RAR_SIZES |= {"extra_positions": 2, "extra_timesteps": 2}
LLAMA_SIZES = {**WIDTH, "mlp_multiple": 8, "token_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0}
VAR_SIZES = {**WIDTH, "mlp_size": 24}
MASKGIT_SIZES = {**WIDTH, "mlp_size": 24, "dropout": 0.0, "attention_dropout": 0.0}
ROUNDS = MaskGITSampling(
    1.1, guidance_scale=3.0, guidance_schedule="linear", temperature_end=0.9, num_steps=4, gumbel_temperature=9.0
)
FILTERED_ROUNDS = MaskGITSampling(guidance_scale=3.0, guidance_power=1.5, top_k=9, top_p=0.95, confidence="log_prob")
RAMP = SamplingConfig(1.1, guidance_scale=3.0, guidance_schedule="ramp", top_k=9, top_p=0.95)

CASES: dict[str, GeneratorCase] = {
    "rar": GeneratorCase(RAR, RAR_SIZES),
    "rar_random": GeneratorCase(RAR, RAR_SIZES, sampling=RARSampling(guidance_scale=3.0, top_k=9, order="random")),
    "rar_scales": GeneratorCase(RAR, RAR_SIZES, multiscale=True),
    "llama": GeneratorCase(Llama, LLAMA_SIZES),
    "llama_scales": GeneratorCase(Llama, LLAMA_SIZES, multiscale=True),
    "maskgit": GeneratorCase(MaskGITViT, MASKGIT_SIZES, sampling=ROUNDS, sequential=False),
    "maskgit_uvit": GeneratorCase(
        MaskGITUViT, {**MASKGIT_SIZES, "depth": 3}, multiscale=True, sampling=FILTERED_ROUNDS, sequential=False
    ),
    "var": GeneratorCase(VAR, VAR_SIZES, multiscale=True, sampling=RAMP),
    "var_shared": GeneratorCase(
        VAR,
        {**VAR_SIZES, "shared_modulation": True, "normalized_attention": False, "drop_path": 0.0},
        multiscale=True,
        sampling=RAMP,
    ),
}
ALL = [(name, branches) for name in CASES for branches in (1, 2)]


def quantizer(multiscale: bool, branches: int = 1, codes: int = CODES, grid: int = 3) -> ProductQuantizer:
    """On a square grid; of several scales: 1, 2 and grid cells wide."""
    structure = partial(MultiScaleQuantizer, grids=[1, 2, grid]) if multiscale else SingleGridQuantizer
    branch = partial(structure, codebook=partial(VQCodebook, codebook_size=codes))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = ProductQuantizer(branch, branches=branches, dim=4 * branches)
    made.bind_grid((grid, grid))
    return made.eval()


def build(name: str, branches: int = 1, random: bool = True, seed: int = 0, **options: Any) -> Generator:
    """The generator of a case in eval mode, bound to a `quantizer`; `architecture` is set, as training does.

    Args:
        random: all parameters random, as at initialisation many outputs are constant.
        options: replace those of the case.
    """
    case = CASES[name]
    tokens = quantizer(case.multiscale, branches)
    arguments = {**case.options, **options, **case.make.sizes(tokens, CLASSES)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = case.make(**arguments).eval()
    if random:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in parameter_name else 0.0, 0.3, generator=generator)
    model.bind(tokens)
    model.architecture = {"_target_": f"tessera.generators.{case.make.__name__}", **arguments}
    return model


def batch(model: Generator, count: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens (count, P, L) and labels (count,)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, model.num_branches, model.num_tokens)
    tokens = torch.randint(0, model.codebook_size, shape, generator=generator)
    return tokens, torch.randint(0, model.num_classes, (count,), generator=generator)
