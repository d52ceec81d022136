"""What all perturbations of quantised latents share: which images are hit, how strongly, and what really happened."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from tessera.errors import ConfigError
from tessera.quantizers.output import QuantizerOutput
from tessera.quantizers.product import ProductQuantizer
from tessera.rng import SampleRng, as_sample_rng

Schedule = Callable[[float], float]
Rates = dict[str, Tensor | float]


def check_share(name: str, value: float) -> None:
    """Refuse a share outside [0, 1].

    Raises:
        ConfigError: it is; the message names perturbation.<name>.
    """
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"perturbation.{name}={value} is outside [0, 1]; it is a share")


def scaled(value: float, schedule: Schedule | None, progress: float) -> float:
    """`value` times the schedule's ratio at `progress`; None: constant."""
    return value if schedule is None else value * schedule(progress)


class Perturbation(ABC):
    """Changes the quantised latents of some images, in training, between quantizer and decoder.

    Images are drawn independently with probability beta; the public code of RobusTok takes the first floor(beta * local
    batch), which is none for small batches. Only selected images are worked on. With alpha or beta at 0, nothing is
    computed at all.

    Args:
        alpha: share of the sites (tokens, or cells of the latent) that are hit in a selected image, in [0, 1].
        beta: share of images selected, in [0, 1].
        schedule: progress -> ratio multiplying alpha; None: constant.
        beta_schedule: the same for beta.

    Attributes:
        rates: names of the realised rates besides "images" and "displacement".

    Raises:
        ConfigError: a share out of range.
    """

    rates: ClassVar[tuple[str, ...]]

    def __init__(
        self, alpha: float, beta: float, schedule: Schedule | None = None, beta_schedule: Schedule | None = None
    ):
        check_share("alpha", alpha)
        check_share("beta", beta)
        self.alpha, self.beta = float(alpha), float(beta)
        self.schedule, self.beta_schedule = schedule, beta_schedule

    @abstractmethod
    def check(self, quantizer: ProductQuantizer) -> None:
        """Refuse a quantizer that the settings do not fit; called before training starts.

        Raises:
            ConfigError: names the key to change.
        """

    def strength(self, progress: float) -> dict[str, float]:
        """The annealed settings at `progress` in [0, 1] of training, by name; "alpha" and "beta" among them."""
        return {
            "alpha": scaled(self.alpha, self.schedule, progress),
            "beta": scaled(self.beta, self.beta_schedule, progress),
        }

    def is_off(self, strength: dict[str, float]) -> bool:
        """Whether nothing can change at this strength."""
        return strength["alpha"] == 0.0 or strength["beta"] == 0.0

    @abstractmethod
    def draw(
        self, draws: SampleRng, quantizer: ProductQuantizer, output: QuantizerOutput, strength: dict[str, float]
    ) -> tuple[Tensor, ...]:
        """All random numbers of a batch, each (B, ...): also those of images that aren't selected, so that a plain
        generator's state doesn't depend on the selection."""

    @abstractmethod
    def perturb(
        self,
        quantizer: ProductQuantizer,
        z: Tensor,
        output: QuantizerOutput,
        drawn: tuple[Tensor, ...],
        strength: dict[str, float],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Perturb selected images.

        Args:
            z, output, drawn: of the selected images.

        Returns:
            z_q (B, C, h, w), tokens (B, P, L), and the rates of `rates`, means over these images.
        """

    def __call__(
        self,
        quantizer: ProductQuantizer,
        z: Tensor,
        output: QuantizerOutput,
        progress: float,
        rng: SampleRng | torch.Generator | None = None,
    ) -> tuple[QuantizerOutput, Rates]:
        """Perturb a batch.

        Args:
            quantizer: made `output` from `z`.
            z: (B, C, h, w) float, latent before quantisation.
            output: clean quantizer output; not modified.
            progress: in [0, 1], share of training done.
            rng: draws by sample; streams "perturb/...".

        Returns:
            The output with z_q and tokens replaced in the selected images (losses are the clean ones; `output` itself
            where nothing was selected), and what really happened, scalars over the whole batch: "images", the share
            selected; "displacement", the mean over images of |z_q' - z_q|^2 / |z_q|^2; and those of `rates`.

        Raises:
            ConfigError: see `check`.
        """
        self.check(quantizer)
        strength = self.strength(progress)
        nothing = dict.fromkeys(("images", "displacement", *self.rates), 0.0)
        if self.is_off(strength):
            return output, nothing
        draws = as_sample_rng(rng, len(z), z.device)
        selected = draws.uniform("perturb/image") < strength["beta"]
        drawn = self.draw(draws, quantizer, output, strength)
        images = selected.nonzero().squeeze(1)
        if not len(images):
            return output, nothing
        clean = replace(
            output,
            z_q=output.z_q[images],
            tokens=output.tokens[images],
            latent=output.latent[images],
            depths=None if output.depths is None else output.depths[images],
        )
        z_q, tokens, rates = self.perturb(quantizer, z[images], clean, tuple(part[images] for part in drawn), strength)
        rates = {"displacement": displacement(z_q, clean.z_q), **rates}
        changed = replace(
            output,
            z_q=output.z_q.index_copy(0, images, z_q.to(output.z_q.dtype)),
            tokens=output.tokens.index_copy(0, images, tokens),
        )
        share = selected.float().mean()
        return changed, {"images": share, **{name: value * share for name, value in rates.items()}}


@torch.no_grad()
def displacement(z_q: Tensor, clean: Tensor) -> Tensor:
    """Mean over images of |z_q - clean|^2 / |clean|^2, of (B, C, h, w) each."""
    moved = (z_q - clean).float().square().flatten(1).sum(1)
    return (moved / clean.float().square().flatten(1).sum(1).clamp_min(1e-12)).mean()
