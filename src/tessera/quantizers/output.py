"""What quantizers return."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class CodebookOutput:
    """Result of a codebook (unit quantizer) on N vectors.

    Attributes:
        vectors: (N, D) float; code values, with the straight-through gradient to `latents`.
        indices: (N,) int64 in [0, K).
        latents: (N, D) float; what was compared with the codes (l2-normalised where the codebook is) and what
            the straight-through gradient flows to.
        losses: unweighted named scalars, e.g. `codebook`, `commitment`.
    """

    vectors: Tensor
    indices: Tensor
    latents: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class QuantizerOutput:
    """Result of a quantizer (structure of codebooks) on a latent grid.

    Attributes:
        z_q: (B, C, h, w) float; quantised latent with straight-through gradient.
        tokens: (B, P, L) int64; scale-major, raster inside a scale.
        latent: (B, C, h, w) float; carrier of the straight-through gradient. z_q = latent + sg(value -
            latent).
        losses: unweighted named scalars, reduced over scales and branches.
        depths: (B,) int64; scales summed into z_q where quantizer dropout acted; None: all of them.
    """

    z_q: Tensor
    tokens: Tensor
    latent: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    depths: Tensor | None = None
