"""Perturbation by other codes: what strategies share that differ only in which code a token may become."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.perturbation.base import Perturbation, Schedule
from tessera.quantizers.output import QuantizerOutput
from tessera.quantizers.product import ProductQuantizer
from tessera.quantizers.structure import ScaleTokens
from tessera.rng import SampleRng

Loop = Literal["open", "closed"]


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


def needs_codes(quantizer: ProductQuantizer, what: str, remedy: str) -> None:
    """Refuse a bottleneck without codes.

    Raises:
        ConfigError: it is a continuous one.
    """
    if not isinstance(quantizer, ProductQuantizer):
        raise ConfigError(
            f"{what} replaces codes, and this tokenizer's bottleneck (quantizer=gaussian) has none; {remedy}, or a "
            "quantizer with a codebook, e.g. quantizer=single"
        )


class CodePerturbation(Perturbation):
    """Re-draws a share alpha of the tokens of a share beta of the images.

    A token site is a (branch, scale, position). Realised rates, over all tokens of the batch: "tokens_redrawn", and
    "tokens_changed", the share that differs from the clean tokens: a re-drawn token may keep its value, and in a closed
    loop others answer it.

    Args:
        alpha, beta, schedule, beta_schedule: see `Perturbation`.
        loop: of structures with several scales. "open": all scales are encoded first, then tokens replaced, so that
            errors stay, as those of a generator do; "closed": after each scale, so that later scales encode what the
            wrong sum leaves and can repair it. The same for a single grid.
        scale_weights: one factor in [0, 1] per scale, by which alpha is multiplied: a wrong coarse code spoils more of
            an image than a fine one. None: 1 for all.
        joint: draw sites for all branches together: the P codes of a position are re-drawn, or none of them.

    Raises:
        ConfigError: a value out of range, or an unknown loop.
    """

    rates: ClassVar[tuple[str, ...]] = ("tokens_redrawn", "tokens_changed")

    def __init__(
        self,
        alpha: float,
        beta: float,
        schedule: Schedule | None = None,
        beta_schedule: Schedule | None = None,
        loop: Loop = "open",
        scale_weights: Sequence[float] | None = None,
        joint: bool = False,
    ):
        super().__init__(alpha, beta, schedule, beta_schedule)
        if loop not in ("open", "closed"):
            raise ConfigError(f"perturbation.loop={loop!r} is unknown; choose open or closed")
        if scale_weights is not None and not all(0.0 <= weight <= 1.0 for weight in scale_weights):
            raise ConfigError(f"perturbation.scale_weights={list(scale_weights)} must be factors in [0, 1]")
        self.loop, self.joint = loop, joint
        self.scale_weights = None if scale_weights is None else [float(weight) for weight in scale_weights]

    def check(self, quantizer: ProductQuantizer) -> None:
        """Refuse a bottleneck without codes, or one of other scales.

        Raises:
            ConfigError: no codes; scale_weights are not one per scale.
        """
        needs_codes(quantizer, "this perturbation", "choose perturbation=gaussian or perturbation=none")
        if self.scale_weights is not None and len(self.scale_weights) != len(quantizer.grids):
            raise ConfigError(
                f"perturbation.scale_weights has {len(self.scale_weights)} factors, but the quantizer has "
                f"{len(quantizer.grids)} scales (quantizer.branch.grids); give one per scale"
            )

    @abstractmethod
    def draw_choice(
        self, draws: SampleRng, quantizer: ProductQuantizer, tokens: Tensor, strength: dict[str, float]
    ) -> Tensor:
        """(B, P, L) int64: what `codes` and `scale_codes` make the new codes from."""

    @abstractmethod
    def codes(
        self, quantizer: ProductQuantizer, z: Tensor, tokens: Tensor, choice: Tensor, strength: dict[str, float]
    ) -> Tensor:
        """The codes (B, P, L) int64 that the sites of `tokens` become where they are re-drawn."""

    @abstractmethod
    def scale_codes(self, scale: ScaleTokens, choice: Tensor, strength: dict[str, float]) -> Tensor:
        """The same for the sites (B, n) of one scale of a branch, while it is being encoded."""

    def draw(
        self, draws: SampleRng, quantizer: ProductQuantizer, output: QuantizerOutput, strength: dict[str, float]
    ) -> tuple[Tensor, ...]:
        branches, length = output.tokens.shape[1:]
        site = draws.uniform("perturb/site", 1 if self.joint else branches, length).expand(-1, branches, -1)
        return site, self.draw_choice(draws, quantizer, output.tokens, strength)

    def perturb(
        self,
        quantizer: ProductQuantizer,
        z: Tensor,
        output: QuantizerOutput,
        drawn: tuple[Tensor, ...],
        strength: dict[str, float],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        site, choice = drawn
        hit = site < self._shares(quantizer, strength["alpha"], site.device)
        tokens = self.replace_tokens(quantizer, z, output.tokens, hit, choice, strength)
        z_q = straight_through(quantizer, output.latent, tokens, output.depths)
        rates = {"tokens_redrawn": hit.float().mean(), "tokens_changed": (tokens != output.tokens).float().mean()}
        return z_q, tokens, rates

    @torch.no_grad()
    def replace_tokens(
        self,
        quantizer: ProductQuantizer,
        z: Tensor,
        tokens: Tensor,
        hit: Tensor,
        choice: Tensor,
        strength: dict[str, float],
    ) -> Tensor:
        """Tokens with those re-drawn that are hit.

        Args:
            z: (B, C, h, w) latent before quantisation.
            tokens: (B, P, L) int64 clean tokens.
            hit: (B, P, L) bool.
            choice: (B, P, L) int64, see `draw_choice`.
            strength: see `Perturbation.strength`.

        Returns:
            (B, P, L) int64.
        """
        if self.loop == "closed" and len(quantizer.grids) > 1:

            def edit(branch: int, scale: ScaleTokens) -> Tensor:
                at = scale.sites
                drawn = self.scale_codes(scale, choice[:, branch, at], strength)
                return torch.where(hit[:, branch, at], drawn, scale.tokens)

            return quantizer.encode(z, edit)
        return torch.where(hit, self.codes(quantizer, z, tokens, choice, strength), tokens)

    def _shares(self, quantizer: ProductQuantizer, alpha: float, device: torch.device) -> float | Tensor:
        """The share of re-drawn tokens, by site (L,) where scales differ."""
        if self.scale_weights is None:
            return alpha
        sizes = [height * width for height, width in quantizer.grids]
        pieces = zip(self.scale_weights, sizes, strict=True)
        return torch.cat([torch.full((size,), alpha * weight, device=device) for weight, size in pieces])
