"""Perturbation by Gaussian noise on the quantised latent: needs no codes, and moves it off them."""

from typing import ClassVar

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.perturbation.base import Perturbation, Schedule, scaled
from tessera.perturbation.nearest import NearestCodePerturbation
from tessera.quantizers.output import QuantizerOutput
from tessera.quantizers.product import ProductQuantizer
from tessera.rng import SampleRng, normal


class GaussianPerturbation(Perturbation):
    """Adds noise to a share alpha of the cells of the quantised latent of a share beta of the images.

    z_q' = z_q + s n,  n ~ N(0, 1),  s = std rms(z_q), rms of an image's latent; or, with `matched_delta`, s such that
    an image's noise has in expectation the energy sum |z_q' - z_q|^2 that re-drawing its tokens among as many nearest
    codes would have (`NearestCodePerturbation` with the same alpha, whose draws are made for it).

    Works behind any quantizer and behind a continuous bottleneck (there without `matched_delta`). Tokens stay, and the
    gradient is that of z_q. Realised rate: "cells_noised", the share of the batch's cells.

    Args:
        alpha, beta, schedule, beta_schedule: see `Perturbation`; a site is a cell of the latent grid.
        std: of the noise, relative to the latent.
        matched_delta: of the nearest-code perturbation whose energy the noise gets; exactly one of the two is given.
        std_schedule: progress -> ratio multiplying std (or matched_delta); None: as `schedule`.

    Raises:
        ConfigError: a value out of range; none or both of std and matched_delta.

    Source: ours, a control of RobusTok's perturbation (arXiv 2509.12474), which is of codes.
    """

    rates: ClassVar[tuple[str, ...]] = ("cells_noised",)

    def __init__(
        self,
        alpha: float,
        beta: float,
        std: float | None = None,
        matched_delta: int | None = None,
        schedule: Schedule | None = None,
        std_schedule: Schedule | None = None,
        beta_schedule: Schedule | None = None,
    ):
        super().__init__(alpha, beta, schedule, beta_schedule)
        if (std is None) == (matched_delta is None):
            raise ConfigError(
                f"perturbation.std={std}, perturbation.matched_delta={matched_delta}: give exactly one, and set the "
                "other to null"
            )
        if std is not None and not 0 <= std < float("inf"):
            raise ConfigError(f"perturbation.std={std} must be a number from 0 up, relative to the latent's size")
        self.std, self.std_schedule = std, std_schedule or schedule
        self.matched: NearestCodePerturbation | None = None
        if matched_delta is not None:
            if int(matched_delta) != matched_delta or matched_delta < 1:
                raise ConfigError(f"perturbation.matched_delta={matched_delta} must be a whole number of at least 1")
            self.matched = NearestCodePerturbation(
                alpha, beta, matched_delta, schedule, delta_schedule=std_schedule, beta_schedule=beta_schedule
            )

    def check(self, quantizer: ProductQuantizer) -> None:
        """Refuse a bottleneck without codes whose perturbation is to be matched.

        Raises:
            ConfigError: it has none, or fewer than matched_delta.
        """
        if self.matched is None:
            return
        if not isinstance(quantizer, ProductQuantizer):
            raise ConfigError(
                f"perturbation.matched_delta={self.matched.delta} matches the noise to codes, and this tokenizer's "
                "bottleneck (quantizer=gaussian) has none; set it to null and give perturbation.std"
            )
        if self.matched.delta > quantizer.codebook_size:
            raise ConfigError(
                f"perturbation.matched_delta={self.matched.delta} exceeds the {quantizer.codebook_size} codes of the "
                "quantizer; lower it"
            )

    def strength(self, progress: float) -> dict[str, float]:
        """ "alpha", "beta", and "std" or "delta" at `progress` in [0, 1] of training."""
        if self.matched is not None:
            return self.matched.strength(progress)
        return {**super().strength(progress), "std": scaled(self.std, self.std_schedule, progress)}

    def is_off(self, strength: dict[str, float]) -> bool:
        """Whether nothing can change: also with noise of no size."""
        return super().is_off(strength) or strength.get("std") == 0.0 or strength.get("delta") == 1

    def draw(
        self, draws: SampleRng, quantizer: ProductQuantizer, output: QuantizerOutput, strength: dict[str, float]
    ) -> tuple[Tensor, ...]:
        channels, height, width = output.z_q.shape[1:]
        cell = draws.uniform("perturb/cell", 1, height, width)
        noise = normal(draws.uniform("perturb/noise", channels, height, width))
        model = () if self.matched is None else self.matched.draw(draws, quantizer, output, strength)
        return cell, noise, *model

    def perturb(
        self,
        quantizer: ProductQuantizer,
        z: Tensor,
        output: QuantizerOutput,
        drawn: tuple[Tensor, ...],
        strength: dict[str, float],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        cell, noise, *model = drawn
        hit = (cell < strength["alpha"]).to(noise.dtype)
        if self.matched is None:
            std = strength["std"] * output.z_q.detach().float().square().mean((1, 2, 3)).sqrt()
        else:
            with torch.no_grad():
                moved, _, _ = self.matched.perturb(quantizer, z, output, tuple(model), strength)
                energy = (moved - output.z_q).square().sum((1, 2, 3))
            std = (energy / (hit.sum((1, 2, 3)) * noise.shape[1]).clamp_min(1)).sqrt()
        z_q = output.z_q + std[:, None, None, None] * noise * hit
        return z_q, output.tokens, {"cells_noised": hit.mean()}
