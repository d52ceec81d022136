"""What a perturbation of quantised latents is to the training that uses it."""

from typing import Protocol

import torch
from torch import Tensor

from tessera.quantizers.output import QuantizerOutput
from tessera.quantizers.product import ProductQuantizer
from tessera.rng import SampleRng


class Perturbation(Protocol):
    """Replaces some tokens of some images, in training, between quantizer and decoder."""

    def check(self, quantizer: ProductQuantizer) -> None:
        """Refuse a quantizer that the settings do not fit; called before training starts."""

    def __call__(
        self,
        quantizer: ProductQuantizer,
        z: Tensor,
        output: QuantizerOutput,
        progress: float,
        rng: SampleRng | torch.Generator | None,
    ) -> tuple[QuantizerOutput, Tensor | float]:
        """(output to decode, realised share of images perturbed) at `progress` in [0, 1] of training."""
