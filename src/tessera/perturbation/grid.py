"""The grid of perturbation strengths that pFID averages over, and the tokens of every setting for one encoding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.perturbation.codes import needs_codes
from tessera.perturbation.nearest import NeighborsOf, check_neighbors_of, perturb_tokens, ranks
from tessera.quantizers.product import ProductQuantizer
from tessera.rng import IndexedRng

ALPHAS = (0.9, 0.8, 0.7, 0.6, 0.5)
BASE_DELTAS, BASE_CODEBOOK_SIZE = (200, 280, 360), 16384
# Of codebooks beyond 2^18 codes, whose neighbours would fill the memory
LARGEST_DELTA = 8192
# the published rows; K = 1024 is rounded down from 12.5, 17.5, 22.5
PUBLISHED_DELTAS = {16384: (200, 280, 360), 8192: (100, 140, 180), 4096: (50, 70, 90), 1024: (10, 15, 20)}


def scaled_deltas(codebook_size: int) -> tuple[int, ...]:
    """Neighbour counts for a codebook: proportional to its size, at least 2, at most K and 8192; published rows as
    printed.

    Source: arXiv:2503.08354, table of pFID settings.
    """
    if codebook_size in PUBLISHED_DELTAS:
        return PUBLISHED_DELTAS[codebook_size]
    scaled = (round(base * codebook_size / BASE_CODEBOOK_SIZE) for base in BASE_DELTAS)
    return tuple(min(max(delta, 2), codebook_size, LARGEST_DELTA) for delta in scaled)


def site_draws(seed: int, index: Tensor, branches: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Draws of every token site: whether it is hit, and which neighbour it becomes.

    Args:
        seed: of the protocol.
        index: (B,) int64 data set indices.
        branches, tokens: P, L.

    Returns:
        Two (B, P, L) float in [0, 1), a function of (seed, index, site) alone.
    """
    rng = IndexedRng(seed, index)
    return rng.uniform("pfid/site", branches, tokens), rng.uniform("pfid/rank", branches, tokens)


class Setting(NamedTuple):
    """A cell of the grid. alpha = delta = 1 is the control: every token becomes its nearest code, which gives rFID."""

    seed: int
    alpha: float
    delta: int


@dataclass
class PerturbedTokens:
    """Tokens (B, P, L) of one setting, and the share (B,) float64 of each image's tokens that differ from the clean."""

    setting: Setting
    tokens: Tensor
    changed: Tensor


class PerturbationGrid:
    """Settings of pFID: shares of tokens hit x numbers of neighbours x seeds.

    A share alpha of the tokens becomes a uniformly random one of the delta nearest codes, among them the nearest
    itself, so that alpha (1 - 1/delta) really change. The draws are a function of (seed, data set index, site) and the
    same in all settings of a seed: hit sets are nested in alpha, and the tokens depend neither on batch size nor on the
    number of processes.

    Args:
        alphas: shares of tokens hit.
        deltas: neighbour counts; None: by codebook size, `scaled_deltas`.
        seeds: of the draws.
        neighbors_of: "latent": codes nearest to what the quantizer quantised, as in the public code; "code": nearest
            to the assigned code, the paper's eq. 4.
        scales: numbers from 0 of the scales whose tokens are hit; None: all.
        branches: the same of branches.
        key: where the settings stand in the configuration, for messages.

    Raises:
        ConfigError: alpha outside [0, 1], delta below 1, an unknown rule, an empty list, a seed twice.

    Source: arXiv:2503.08354, section 3; common random numbers are ours.
    """

    def __init__(
        self,
        alphas: Sequence[float] = ALPHAS,
        deltas: Sequence[int] | None = None,
        seeds: Sequence[int] = (0,),
        neighbors_of: NeighborsOf = "latent",
        scales: Sequence[int] | None = None,
        branches: Sequence[int] | None = None,
        key: str = "callbacks.pfid",
    ):
        if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
            raise ConfigError(f"{key}.alphas={list(alphas)} must be one or more numbers in [0, 1]")
        if deltas is not None and (not deltas or not all(int(delta) == delta >= 1 for delta in deltas)):
            raise ConfigError(f"{key}.deltas={list(deltas)} must be one or more whole numbers from 1 up")
        if not seeds or len(set(seeds)) < len(seeds) or not all(int(seed) == seed for seed in seeds):
            raise ConfigError(f"{key}.seeds={list(seeds)} must be one or more different whole numbers")
        check_neighbors_of(f"{key}.neighbors_of", neighbors_of)
        self.key, self.neighbors_of = key, neighbors_of
        self.alphas, self.seeds = tuple(dict.fromkeys(alphas)), tuple(seeds)
        self.given_deltas = None if deltas is None else tuple(deltas)
        self.scales = None if scales is None else tuple(scales)
        self.branches = None if branches is None else tuple(branches)

    def check(self, quantizer: ProductQuantizer) -> None:
        """Refuse a quantizer that the settings do not fit; call before anything expensive.

        Raises:
            ConfigError: no codes; delta above the codebook size; scales or branches that don't exist.
        """
        needs_codes(quantizer, "pFID", "leave it out (callbacks=continuous)")
        size = quantizer.codebook_size
        if max(self.deltas(quantizer)) > size:
            raise ConfigError(
                f"{self.key}.deltas={list(self.deltas(quantizer))} exceed the codebook size {size}; lower them, "
                "or leave them to be scaled with it (null)"
            )
        for name, chosen, count in (
            ("scales", self.scales, len(quantizer.grids)),
            ("branches", self.branches, quantizer.num_branches),
        ):
            if chosen is not None and not (chosen and set(chosen) <= set(range(count))):
                raise ConfigError(
                    f"{self.key}.{name}={list(chosen)} must be one or more of the quantizer's {name}, 0 to {count - 1}"
                )

    def deltas(self, quantizer: ProductQuantizer) -> tuple[int, ...]:
        """The neighbour counts for a quantizer; of small codebooks, several published ones are the same."""
        return tuple(dict.fromkeys(self.given_deltas or scaled_deltas(quantizer.codebook_size)))

    def settings(self, quantizer: ProductQuantizer) -> list[Setting]:
        """All cells, the control first."""
        cells = [(alpha, delta) for alpha in self.alphas for delta in self.deltas(quantizer)]
        return [Setting(0, 1.0, 1), *(Setting(seed, *cell) for seed in self.seeds for cell in cells)]

    def protocol(self, quantizer: ProductQuantizer) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The settings as fields of a figure's protocol, and which of them its label has to show."""
        fields: dict[str, Any] = {
            "K": quantizer.codebook_size,
            "delta": list(self.deltas(quantizer)),
            "alpha": list(self.alphas),
            "seeds": list(self.seeds),
            "neighbors_of": self.neighbors_of,
            **({} if self.scales is None else {"scales": list(self.scales)}),
            **({} if self.branches is None else {"branches": list(self.branches)}),
        }
        shown = {
            "K": True,
            "alpha": self.alphas != ALPHAS,
            "delta": True,
            "seeds": self.seeds != (0,),
            "neighbors_of": self.neighbors_of != "latent",
            "scales": self.scales is not None,
            "branches": self.branches is not None,
        }
        return fields, tuple(name for name, show in shown.items() if show)

    @torch.no_grad()
    def tokens(self, quantizer: ProductQuantizer, z: Tensor, index: Tensor) -> Iterator[PerturbedTokens]:
        """Tokens of every setting for latents z (B, C, h, w) float32 of the images `index` (B,), one at a time.

        Neighbours are searched once for all settings.
        """
        query = z if self.neighbors_of == "latent" else quantizer.encode(z)
        neighbors = quantizer.neighbors(query, max(self.deltas(quantizer)))  # (B, P, L, k)
        nearest = neighbors[..., 0]
        branches, length = nearest.shape[1:]
        spared = ~self._hit_sites(quantizer, z.device)
        draws: dict[int, tuple[Tensor, Tensor]] = {}
        for setting in self.settings(quantizer):
            if setting.seed not in draws:
                site, rank = site_draws(setting.seed, index.to(z.device), branches, length)
                draws = {setting.seed: (site.masked_fill_(spared, 1.0), rank)}  # 1 lies below no alpha
            site, rank = draws[setting.seed]
            tokens = perturb_tokens(nearest, neighbors, site, ranks(rank, setting.delta), setting.alpha)
            yield PerturbedTokens(setting, tokens, (tokens != nearest).flatten(1).double().mean(1))

    def _hit_sites(self, quantizer: ProductQuantizer, device: torch.device) -> Tensor:
        """(P, L) bool: the tokens of the chosen scales and branches."""
        sizes = [height * width for height, width in quantizer.grids]
        scales = [self.scales is None or number in self.scales for number in range(len(sizes))]
        length = torch.cat([torch.full((size,), hit) for size, hit in zip(sizes, scales, strict=True)])
        branches = [self.branches is None or number in self.branches for number in range(quantizer.num_branches)]
        return (torch.tensor(branches)[:, None] & length).to(device)
