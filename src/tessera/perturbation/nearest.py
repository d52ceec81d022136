"""Latent perturbation by nearest codes (RobusTok): the decoder learns to bear a generator's mistakes."""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor, where

from tessera.errors import ConfigError
from tessera.perturbation.base import Schedule
from tessera.perturbation.code_neighbors import CodeNeighbors
from tessera.perturbation.codes import CodePerturbation, Loop
from tessera.perturbation.schedule import annealed_count
from tessera.quantizers.product import ProductQuantizer
from tessera.quantizers.structure import ScaleTokens
from tessera.rng import SampleRng, integers

NeighborsOf = Literal["latent", "code"]


def perturb_tokens(
    tokens: Tensor, neighbors: Tensor, site_uniform: Tensor, rank: Tensor, alpha: float | Tensor
) -> Tensor:
    """Replace tokens by one of their neighbours.

    token' = neighbors[rank] where site_uniform < alpha, else token.

    For the same draws the sets of replaced sites are nested in alpha.

    Args:
        tokens: (B, P, L) int64.
        neighbors: (B, P, L, k) int64, nearest first; k beyond the largest rank is not read.
        site_uniform: (B, P, L) float in [0, 1).
        rank: (B, P, L) int64 in [0, k); 0 picks the nearest code, usually the token itself.
        alpha: share of sites to re-draw, in [0, 1].

    Returns:
        (B, P, L) int64.
    """
    return where(site_uniform < alpha, ranked(neighbors, rank), tokens)


def ranked(neighbors: Tensor, rank: Tensor) -> Tensor:
    """(...) int64: of neighbours (..., k) the one of rank (...)."""
    return neighbors.gather(-1, rank.unsqueeze(-1)).squeeze(-1)


def ranks(rank_uniform: Tensor, delta: int) -> Tensor:
    """Uniform draws in [0, 1) -> int64 ranks floor(v * delta) in [0, delta)."""
    return integers(rank_uniform, delta)


def check_neighbors_of(key: str, value: str) -> None:
    """Refuse an unknown neighbour rule.

    Raises:
        ConfigError: it is; `key` says which setting.
    """
    if value not in get_args(NeighborsOf):
        raise ConfigError(f"{key}={value!r} is unknown; choose latent or code")


class NearestCodePerturbation(CodePerturbation):
    """Re-draws a share alpha of the tokens of a share beta of the images among their delta nearest codes.

    A re-drawn token may keep its value (rank 0), so alpha * (1 - 1/delta) of an image's tokens really change. Only the
    selected images' neighbours are searched. With alpha, beta or the annealed strength 0, or delta 1, nothing is
    computed at all.

    Args:
        alpha: share of tokens re-drawn in a selected image, in [0, 1].
        beta: share of images selected, in [0, 1].
        delta: nearest codes to draw from, in [1, codebook_size].
        schedule: progress -> ratio multiplying alpha and delta (delta rounded down, at least 1); None:
            constant.
        neighbors_of: "latent" (codes nearest to the latent, as in the public code) or "code" (nearest to the
            assigned code, the paper's eq. 4; see `CodeNeighbors`).
        delta_schedule: replaces `schedule` for delta; None: the same.
        loop, scale_weights, joint: see `CodePerturbation`.
        beta_schedule: progress -> ratio multiplying beta; None: constant, as published.

    Raises:
        ConfigError: a value out of range, or an unknown neighbors_of or loop.

    Source: RobusTok (arXiv 2509.12474), section on latent perturbation, and `latent_perturbation.py` of
        qiuk2/RobusTok, which re-draws where u <= alpha; here u < alpha, so that alpha = 0 never perturbs.
    """

    def __init__(
        self,
        alpha: float,
        beta: float,
        delta: int,
        schedule: Schedule | None = None,
        neighbors_of: NeighborsOf = "latent",
        delta_schedule: Schedule | None = None,
        loop: Loop = "open",
        scale_weights: Sequence[float] | None = None,
        joint: bool = False,
        beta_schedule: Schedule | None = None,
    ):
        super().__init__(alpha, beta, schedule, beta_schedule, loop, scale_weights, joint)
        if int(delta) != delta or delta < 1:
            raise ConfigError(
                f"perturbation.delta={delta} must be a whole number of at least 1 (1: perturbation is off)"
            )
        check_neighbors_of("perturbation.neighbors_of", neighbors_of)
        self.delta, self.neighbors_of = int(delta), neighbors_of
        self.delta_schedule = delta_schedule or schedule
        self.code_neighbors = CodeNeighbors(self.delta)

    def check(self, quantizer: ProductQuantizer) -> None:
        """Refuse also a codebook smaller than delta.

        Raises:
            ConfigError: delta exceeds the codebook size; see `CodePerturbation.check`.
        """
        super().check(quantizer)
        if self.delta > quantizer.codebook_size:
            raise ConfigError(
                f"perturbation.delta={self.delta} exceeds the {quantizer.codebook_size} codes of the "
                "quantizer; lower it (published: about K / 41 in training) or raise "
                "quantizer.branch.codebook.codebook_size"
            )

    def strength(self, progress: float) -> dict[str, float]:
        """ "alpha", "beta" and "delta" at `progress` in [0, 1] of training."""
        ratio = 1.0 if self.delta_schedule is None else self.delta_schedule(progress)
        return {**super().strength(progress), "delta": annealed_count(ratio, self.delta)}

    def is_off(self, strength: dict[str, float]) -> bool:
        """Whether nothing can change: also among one nearest code."""
        return super().is_off(strength) or strength["delta"] == 1

    def draw_choice(
        self, draws: SampleRng, quantizer: ProductQuantizer, tokens: Tensor, strength: dict[str, float]
    ) -> Tensor:
        """Ranks in [0, delta)."""
        return ranks(draws.uniform("perturb/rank", *tokens.shape[1:]), strength["delta"])

    def codes(
        self, quantizer: ProductQuantizer, z: Tensor, tokens: Tensor, choice: Tensor, strength: dict[str, float]
    ) -> Tensor:
        if self.neighbors_of == "code":
            return self.code_neighbors.pick_all(quantizer, tokens, choice, strength["delta"])
        return ranked(quantizer.neighbors(z, strength["delta"]), choice)

    def scale_codes(self, scale: ScaleTokens, choice: Tensor, strength: dict[str, float]) -> Tensor:
        if self.neighbors_of == "code":
            return self.code_neighbors.pick(scale.codebook, scale.tokens, choice, strength["delta"])
        return ranked(scale.neighbors("latent", strength["delta"]), choice)
