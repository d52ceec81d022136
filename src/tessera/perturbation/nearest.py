"""Latent perturbation by nearest codes (RobusTok): the decoder learns to bear a generator's mistakes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.perturbation.schedule import annealed_count
from tessera.quantizers.output import QuantizerOutput
from tessera.quantizers.product import ProductQuantizer
from tessera.quantizers.structure import ScaleTokens
from tessera.rng import SampleRng, as_sample_rng, integers

NeighborsOf = Literal["latent", "code"]
Loop = Literal["open", "closed"]
Schedule = Callable[[float], float]


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
    drawn = neighbors.gather(-1, rank.unsqueeze(-1)).squeeze(-1)
    return torch.where(site_uniform < alpha, drawn, tokens)


def ranks(rank_uniform: Tensor, delta: int) -> Tensor:
    """Uniform draws in [0, 1) -> int64 ranks floor(v * delta) in [0, delta)."""
    return integers(rank_uniform, delta)


def straight_through(
    quantizer: ProductQuantizer, latent: Tensor, tokens: Tensor, depths: Tensor | None = None
) -> Tensor:
    """Quantised latent of `tokens` whose gradient goes to `latent` as identity.

    z_q = latent + sg(decode(tokens) - latent)

    Args:
        latent: (B, C, h, w) float, `QuantizerOutput.latent`.
        tokens: (B, P, L) int64.
        depths: (B,) int64, scales that quantizer dropout left; None: all.

    Returns:
        (B, C, h, w) float; no gradient reaches the codebook.
    """
    return latent + (quantizer.decode(tokens, depths).detach() - latent).detach()


class NearestCodePerturbation:
    """Re-draws a share alpha of the tokens of a share beta of the images among their delta nearest codes.

    A re-drawn token may keep its value (rank 0), so alpha * (1 - 1/delta) of an image's tokens really change.
    Images are drawn independently with probability beta; the public code takes the first floor(beta * local
    batch), which is none for small batches. Only the selected images' neighbours are searched. With alpha,
    beta or the annealed strength 0, or delta 1, nothing is computed at all.

    Args:
        alpha: share of tokens re-drawn in a selected image, in [0, 1].
        beta: share of images selected, in [0, 1].
        delta: nearest codes to draw from, in [1, codebook_size].
        schedule: progress -> ratio multiplying alpha and delta (delta rounded down, at least 1); None:
            constant.
        neighbors_of: "latent" (codes nearest to the latent, as in the public code) or "code" (nearest to the
            assigned code, the paper's eq. 4).
        delta_schedule: replaces `schedule` for delta; None: the same.
        loop: of structures with several scales. "open": all scales are encoded first, then tokens replaced, so that
            errors stay, as those of a generator do; "closed": after each scale, so that later scales encode what the
            wrong sum leaves and can repair it. The same for a single grid.
        scale_weights: one factor in [0, 1] per scale, by which alpha is multiplied: a wrong coarse code spoils more of
            an image than a fine one. None: 1 for all.

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
    ):
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"perturbation.{name}={value} is outside [0, 1]; it is a share")
        if int(delta) != delta or delta < 1:
            raise ConfigError(
                f"perturbation.delta={delta} must be a whole number of at least 1 (1: perturbation is off)"
            )
        if neighbors_of not in ("latent", "code"):
            raise ConfigError(f"perturbation.neighbors_of={neighbors_of!r} is unknown; choose latent or code")
        if loop not in ("open", "closed"):
            raise ConfigError(f"perturbation.loop={loop!r} is unknown; choose open or closed")
        if scale_weights is not None and not all(0.0 <= weight <= 1.0 for weight in scale_weights):
            raise ConfigError(f"perturbation.scale_weights={list(scale_weights)} must be factors in [0, 1]")
        self.loop, self.scale_weights = loop, None if scale_weights is None else [float(w) for w in scale_weights]
        self.alpha, self.beta, self.delta = float(alpha), float(beta), int(delta)
        self.schedule, self.delta_schedule = schedule, delta_schedule or schedule
        self.neighbors_of = neighbors_of

    def check(self, quantizer: ProductQuantizer) -> None:
        """Refuse a codebook smaller than delta, or other scales; call before training starts.

        Raises:
            ConfigError: delta exceeds the codebook size; scale_weights are not one per scale.
        """
        if self.scale_weights is not None and len(self.scale_weights) != len(quantizer.grids):
            raise ConfigError(
                f"perturbation.scale_weights has {len(self.scale_weights)} factors, but the quantizer has "
                f"{len(quantizer.grids)} scales (quantizer.branch.grids); give one per scale"
            )
        if self.delta > quantizer.codebook_size:
            raise ConfigError(
                f"perturbation.delta={self.delta} exceeds the {quantizer.codebook_size} codes of the "
                "quantizer; lower it (published: about K / 41 in training) or raise "
                "quantizer.branch.codebook.codebook_size"
            )

    def strength(self, progress: float) -> tuple[float, int]:
        """(alpha, delta) at `progress` in [0, 1] of training."""
        alpha = self.alpha if self.schedule is None else self.alpha * self.schedule(progress)
        if self.delta_schedule is None:
            return alpha, self.delta
        return alpha, annealed_count(self.delta_schedule(progress), self.delta)

    @torch.no_grad()
    def replace_tokens(
        self,
        quantizer: ProductQuantizer,
        z: Tensor,
        tokens: Tensor,
        site: Tensor,
        rank: Tensor,
        alpha: float,
        delta: int,
    ) -> Tensor:
        """`perturb_tokens` with the neighbours this strategy takes.

        Args:
            z: (B, C, h, w) latent before quantisation; read for neighbors_of="latent" and in a closed loop.
            tokens: (B, P, L) int64 clean tokens.
            site: (B, P, L) uniform draws that select sites.
            rank: (B, P, L) int64 in [0, delta).

        Returns:
            (B, P, L) int64.
        """
        share = self._shares(quantizer, alpha, site.device)
        if self.loop == "closed" and len(quantizer.grids) > 1:

            def edit(branch: int, scale: ScaleTokens) -> Tensor:
                nearest, at = scale.neighbors(self.neighbors_of, delta), scale.sites
                own = share[at] if isinstance(share, Tensor) else share
                return perturb_tokens(scale.tokens, nearest, site[:, branch, at], rank[:, branch, at], own)

            return quantizer.encode(z, edit)
        neighbors = quantizer.neighbors(z if self.neighbors_of == "latent" else tokens, delta)
        return perturb_tokens(tokens, neighbors, site, rank, share)

    def _shares(self, quantizer: ProductQuantizer, alpha: float, device: torch.device) -> float | Tensor:
        """The share of re-drawn tokens, by site (L,) where scales differ."""
        if self.scale_weights is None:
            return alpha
        sizes = [height * width for height, width in quantizer.grids]
        pieces = zip(self.scale_weights, sizes, strict=True)
        return torch.cat([torch.full((size,), alpha * weight, device=device) for weight, size in pieces])

    def __call__(
        self,
        quantizer: ProductQuantizer,
        z: Tensor,
        output: QuantizerOutput,
        progress: float,
        rng: SampleRng | torch.Generator | None = None,
    ) -> tuple[QuantizerOutput, Tensor | float]:
        """Perturb a batch.

        Args:
            quantizer: made `output` from `z`.
            z: (B, C, h, w) float, latent before quantisation.
            output: clean quantizer output; not modified.
            progress: in [0, 1], share of training done.
            rng: draws by sample; streams "perturb/image", "perturb/site", "perturb/rank".

        Returns:
            The output with z_q and tokens replaced in the selected images (losses are the clean ones), and
            the realised share of images selected. `output` itself where perturbation is off.

        Raises:
            ConfigError: delta exceeds the codebook size.
        """
        self.check(quantizer)
        alpha, delta = self.strength(progress)
        if alpha == 0.0 or self.beta == 0.0 or delta == 1:
            return output, 0.0
        tokens = output.tokens
        draws = as_sample_rng(rng, tokens.shape[0], tokens.device)
        # all streams are drawn for the whole batch, so that a plain generator's state doesn't depend on the
        # selection
        selected = draws.uniform("perturb/image") < self.beta
        site = draws.uniform("perturb/site", *tokens.shape[1:])
        rank = ranks(draws.uniform("perturb/rank", *tokens.shape[1:]), delta)
        images = selected.nonzero().squeeze(1)
        share = selected.float().mean()
        if not len(images):
            return output, share
        replaced = self.replace_tokens(quantizer, z[images], tokens[images], site[images], rank[images], alpha, delta)
        depths = None if output.depths is None else output.depths[images]
        z_q = straight_through(quantizer, output.latent[images], replaced, depths)
        return (
            replace(
                output,
                z_q=output.z_q.index_copy(0, images, z_q.to(output.z_q.dtype)),
                tokens=tokens.index_copy(0, images, replaced),
            ),
            share,
        )
