"""Lookup-free codebooks: every sign pattern of C channels is a code (LFQ), on the unit sphere (BSQ)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.errors import ConfigError
from tessera.quantizers.codebooks.base import Codebook
from tessera.quantizers.codebooks.entropy import bitwise_entropies, codewise_entropies
from tessera.quantizers.enumeration import nearest_products
from tessera.quantizers.output import CodebookOutput

Entropy = Literal["soft", "hard", "none"]

MAX_BITS = 62  # indices are int64


class BinaryCodebook(Codebook):
    """K = 2^C implied codes {-s, s}^C: each channel is quantised to its sign; s = 1, on the unit sphere 1/sqrt(C).

    index = sum_d 2^d [x_d > 0]: bit 0 is channel 0, and 0 counts as minus. Nothing is learned. Losses: `commitment` =
    mean((sg q - z)^2), and of the soft assignment softmax_k(2 x.c_k / temperature), unless `entropy` is none,
    `entropy_sample` = the mean entropy of single samples, and `entropy_batch` = minus the entropy of the mean.

    Args:
        dim: D = C, channels of one vector; None: `bits`.
        bits: C.
        normalize: divide latents by their norm, and put the codes on the unit sphere.
        entropy: "soft": of the bits, summed, in closed form and independent of K; "hard": of the K codes; "none".
        temperature: of the soft assignment; None: the published 1 (soft) or 0.01 (hard).

    Raises:
        ConfigError: bits below 1, above 62 or other than dim; unknown entropy; temperature not positive.

    Source: LFQ: arXiv:2310.05737; BSQ: arXiv:2406.07548; details as in XQ-GAN's `LFQ` (lxa9867/ImageFolder).
    """

    def __init__(
        self,
        dim: int | None,
        bits: int,
        normalize: bool,
        entropy: Entropy = "soft",
        temperature: float | None = None,
    ):
        prefix = "quantizer.branch.codebook"
        if not 1 <= bits <= MAX_BITS:
            raise ConfigError(f"{prefix}.bits={bits} is outside [1, {MAX_BITS}]; the codebook has 2^bits codes")
        if dim is not None and dim != bits:
            raise ConfigError(
                f"{prefix}.bits={bits} needs as many channels, but quantizer.dim / quantizer.branches = {dim}; set "
                f"quantizer.dim={bits} times quantizer.branches (or null), or {prefix}.bits={dim}"
            )
        if entropy not in ("soft", "hard", "none"):
            raise ConfigError(f"{prefix}.entropy={entropy!r} is unknown; choose soft, hard or none")
        if entropy == "hard" and bits > 24:
            raise ConfigError(
                f"{prefix}.entropy=hard holds a probability of each of the 2^{bits} codes; choose soft beyond 24 bits"
            )
        if temperature is not None and temperature <= 0:
            raise ConfigError(f"{prefix}.temperature={temperature} must be positive")
        super().__init__(bits, 2**bits)
        self.normalize, self.entropy = normalize, entropy
        self.temperature = {"soft": 1.0, "hard": 0.01}.get(entropy, 1.0) if temperature is None else temperature
        self.value = bits**-0.5 if normalize else 1.0  # s

    def extra_repr(self) -> str:
        """What decides the tokens (the tokenizer's fingerprint hashes it)."""
        return f"bits={self.dim}, normalize={self.normalize}"

    def _positions(self, device: torch.device) -> Tensor:
        return torch.arange(self.dim, device=device)

    def project(self, x: Tensor) -> Tensor:
        """(N, C) -> float32, of unit length where the codebook is."""
        return F.normalize(x.float(), dim=-1) if self.normalize else x.float()

    def assign(self, x: Tensor) -> Tensor:
        """Indices (N,) int64 of the sign patterns of x (N, C); 0 counts as minus."""
        return ((x.detach() > 0).long() << self._positions(x.device)).sum(-1)

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes (N, C) float32 of indices (N,) int64."""
        bits = (indices[:, None] >> self._positions(indices.device)) & 1
        return bits.float().mul_(2 * self.value).sub_(self.value)

    def neighbors_of_points(self, x: Tensor, k: int) -> Tensor:
        """(N, k) int64 by the sum of |x_d| over flipped bits, which for codes is the order of Hamming distance."""
        # a cost relative to the nearest letter keeps the sums small and exact
        costs = [torch.stack([part.clamp_min(0), (-part).clamp_min(0)], 1) for part in x.float().unbind(1)]
        return nearest_products(costs, k)

    def penalties(self, x: Tensor, mask: Tensor | None = None, gain: float = 1.0) -> dict[str, Tensor]:
        """`entropy_sample` and `entropy_batch` (see the class) of points x (N, C) and codes +- gain s."""
        if self.entropy == "none":
            return {}
        entropies = bitwise_entropies if self.entropy == "soft" else codewise_entropies
        with torch.autocast(x.device.type, enabled=False):
            sample, batch = entropies(x.float() * (4 * self.value * gain / self.temperature), mask)
        return {"entropy_sample": sample, "entropy_batch": -batch}

    def forward(self, x: Tensor) -> CodebookOutput:
        """Quantise x (N, C) float; vectors, latents and losses are float32 whatever the autocast state."""
        with torch.autocast(x.device.type, enabled=False):
            latents = self.project(x)
            indices = self.assign(latents)
            codes = self.lookup(indices)
            losses = {"commitment": F.mse_loss(latents, codes), **self.penalties(latents)}
            vectors = latents + (codes - latents).detach()
        return CodebookOutput(vectors=vectors, indices=indices, latents=latents, losses=losses)


class LFQCodebook(BinaryCodebook):
    """Lookup-free quantisation: codes {-1, 1}^C of raw latents; see `BinaryCodebook`."""

    def __init__(
        self, dim: int | None = None, bits: int = 12, entropy: Entropy = "soft", temperature: float | None = None
    ):
        super().__init__(dim, bits, False, entropy, temperature)


class BSQCodebook(BinaryCodebook):
    """Binary spherical quantisation: codes {-1, 1}^C / sqrt(C) of unit latents; see `BinaryCodebook`."""

    def __init__(
        self, dim: int | None = None, bits: int = 12, entropy: Entropy = "soft", temperature: float | None = None
    ):
        super().__init__(dim, bits, True, entropy, temperature)
