"""Perturbations of quantised latents."""

from tessera.perturbation.base import Perturbation
from tessera.perturbation.code_neighbors import CodeNeighbors
from tessera.perturbation.codes import CodePerturbation, straight_through
from tessera.perturbation.gaussian import GaussianPerturbation
from tessera.perturbation.grid import PerturbationGrid
from tessera.perturbation.nearest import NearestCodePerturbation, perturb_tokens, ranks
from tessera.perturbation.random_codes import RandomCodePerturbation
from tessera.perturbation.schedule import LinearAnneal, annealed_count, linear_ramp

__all__ = [
    "CodeNeighbors",
    "CodePerturbation",
    "GaussianPerturbation",
    "LinearAnneal",
    "NearestCodePerturbation",
    "Perturbation",
    "PerturbationGrid",
    "RandomCodePerturbation",
    "annealed_count",
    "linear_ramp",
    "perturb_tokens",
    "ranks",
    "straight_through",
]
