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
        perturbed_share: scalar float; realised share of images that were perturbed (0 without perturbation).
    """

    reconstruction: Tensor
    z: Tensor
    z_q: Tensor
    tokens: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    perturbed_share: Tensor | float = 0.0
    depths: Tensor | None = None
    z_q_clean: Tensor | None = None
