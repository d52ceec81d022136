"""What a tokenizer returns in training."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class TokenizerOutput:
    """Result of `Tokenizer.forward`.

    Attributes:
        reconstruction: (B, 3, H, W) float, not clamped; decoded from `z_q`.
        z: (B, C, h, w) float; latent before quantisation (after `quant_conv`).
        z_q: (B, C, h, w) float; what was decoded: the perturbed latent where a perturbation hit, else the
            clean one.
        tokens: (B, P, L) int64; clean tokens.
        losses: unweighted quantizer losses, always from the clean codes.
        z_q_clean: (B, C, h, w) float; quantised latent before a perturbation.
        depths: (B,) int64; scales that were decoded of each image, where quantizer dropout acted; else None.
        perturbation: realised rates of a perturbation, scalars by name; empty without one.
    """

    reconstruction: Tensor
    z: Tensor
    z_q: Tensor
    tokens: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    perturbation: dict[str, Tensor | float] = field(default_factory=dict)
    depths: Tensor | None = None
    z_q_clean: Tensor | None = None
