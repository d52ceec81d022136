"""Perturbations of quantised latents."""

from tessera.perturbation.base import Perturbation
from tessera.perturbation.nearest import NearestCodePerturbation, perturb_tokens, ranks, straight_through
from tessera.perturbation.schedule import LinearAnneal, annealed_count, linear_ramp

__all__ = [
    "LinearAnneal",
    "NearestCodePerturbation",
    "Perturbation",
    "annealed_count",
    "linear_ramp",
    "perturb_tokens",
    "ranks",
    "straight_through",
]
