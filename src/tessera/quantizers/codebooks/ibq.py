"""Learned codebook whose every code gets a gradient from every latent (index backpropagation)."""

from typing import ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.quantizers.codebooks.base import Codebook
from tessera.quantizers.ibq_attention import EntropyOver, index_backpropagation
from tessera.quantizers.output import CodebookOutput
from tessera.quantizers.search import DEFAULT_CHUNK_SIZE, nearest_codes, nearest_k

_PREFIX = "quantizer.branch.codebook"
# Latents looked at by `diagnostics` at once: their K scores are held
_DIAGNOSED_ROWS = 64


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared difference; 0 of no vectors at all, which quantizer dropout can leave of a batch."""
    return F.mse_loss(x, y) if len(x) else (x - y).sum()


class IBQCodebook(Codebook):
    """Index backpropagation quantisation: q = e_k, k = argmax_j z.e_j, straight-through on the one-hot choice.

    With s = softmax(E z) over all codes, q = E^T (h - sg(s) + s), h the one-hot of k: the value is e_k, and gradients
    reach z and all codes through s. There is no identity path to z: dL/dz = Cov_s(e) dL/dq, so a saturated s starves
    the encoder (see `diagnostics`, `max_latent_rms`).

    Losses (means, unweighted): `joint` = mean((q - z)^2) with gradients on both sides, `commitment` =
    mean((sg e_k - z)^2), `codebook` = mean((e_k - sg z)^2); with `use_entropy`, of p = softmax(E z / temperature),
    `entropy_sample` = mean_n H(p_n) and `entropy_batch` = sum_k P_k ln(P_k + 1e-5), P = mean_n p_n (nats; minus the
    entropy of P, so that a positive weight spreads the codes).

    Released weights were trained with joint 1, commitment 1, codebook 0.25, entropy terms 0.05; the paper's equation
    exchanges commitment and codebook.

    Args:
        dim: D, channels of one vector.
        codebook_size: K.
        use_entropy: compute the two entropy terms; without them a forward is the search alone.
        entropy_temperature: > 0.
        entropy_over: "local": P over the latents of this process, as published; its entropy can't exceed ln N.
            "global": over those of all processes, in training.
        max_latent_rms: latents of a larger root mean square are shortened to it; None: never. Keeps the softmax from
            saturating behind encoders with large outputs: scores spread by at most about max_latent_rms * sqrt(D) for
            codes of unit variance, and 3 is healthy. The tokens are the same, as the largest product doesn't depend on
            the length of z.
        chunk_size: codes per tile; changes speed and memory only.

    Raises:
        ConfigError: a size below 1, a temperature or rms not above 0, an unknown `entropy_over`.

    Source: IBQ (arXiv:2412.02692); where code and paper differ, `IndexPropagationQuantize` of TencentARC/SEED-Voken.
        Scores are float32 under autocast too (there: half precision, which overflows and ties); memory is O(N D + K D)
        and a row block (there: nine N x K tables). `entropy_over`, `max_latent_rms` are ours.
    """

    # the decoder's gradient passes through the vectors themselves: no straight-through is laid around a sum of them
    carries_gradient: ClassVar[bool] = True
    DIAGNOSTICS: ClassVar[tuple[str, ...]] = ("gradient_path", "max_probability", "logit_std")

    def __init__(
        self,
        dim: int | None,
        codebook_size: int,
        use_entropy: bool = True,
        entropy_temperature: float = 0.01,
        entropy_over: EntropyOver = "local",
        max_latent_rms: float | None = None,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ):
        for name, value in (("codebook_size", codebook_size), ("chunk_size", chunk_size)):
            if value < 1:
                raise ConfigError(f"{_PREFIX}.{name}={value} must be at least 1")
        for name, value in (("entropy_temperature", entropy_temperature), ("max_latent_rms", max_latent_rms)):
            if value is not None and not value > 0:
                raise ConfigError(f"{_PREFIX}.{name}={value} must be above 0")
        if entropy_over not in get_args(EntropyOver):
            raise ConfigError(f"{_PREFIX}.entropy_over={entropy_over!r} is unknown; choose local or global")
        if dim is None or dim < 1:
            raise ConfigError(f"a codebook of dimension {dim} is impossible; raise quantizer.dim")
        super().__init__(dim, codebook_size)
        self.use_entropy, self.entropy_temperature, self.entropy_over = use_entropy, entropy_temperature, entropy_over
        self.max_latent_rms, self.chunk_size = max_latent_rms, chunk_size
        self.embedding = nn.Parameter(torch.randn(codebook_size, dim))

    def extra_repr(self) -> str:
        """What, besides the weights, decides the tokens (the tokenizer's fingerprint hashes it)."""
        return f"dim={self.dim}, codebook_size={self.codebook_size}, assignment=dot"

    def assign(self, x: Tensor) -> Tensor:
        """Indices of the codes of largest inner product; code norms count.

        Args:
            x: (N, D) float; any precision, compared in float32.

        Returns:
            (N,) int64 in [0, K). Ties go to the lowest index.
        """
        with torch.no_grad():
            return nearest_codes(x, self.embedding, self.chunk_size, "dot")

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors (N, D) of (N,) int64 indices, at least float32."""
        return F.embedding(indices, self.embedding).to(torch.promote_types(self.embedding.dtype, torch.float32))

    def neighbors_of_points(self, x: Tensor, k: int) -> Tensor:
        """(N, k) int64 by inner product, as `assign` does, so that the first neighbour is the assigned code."""
        return nearest_k(x, self.embedding, k, self.chunk_size, "dot")

    def neighbors_of_codes(self, indices: Tensor, k: int) -> Tensor:
        """(N, k) int64 by Euclidean distance.

        By inner product, codes of large norm would be everybody's neighbours, often before the code itself.
        """
        return nearest_k(self.embedding[indices], self.embedding, k, self.chunk_size, "euclidean")

    def project(self, x: Tensor) -> Tensor:
        """Latents (N, D) of any precision, at least float32, none longer than `max_latent_rms`; differentiable."""
        x = x.to(torch.promote_types(torch.promote_types(x.dtype, self.embedding.dtype), torch.float32))
        if self.max_latent_rms is None:
            return x
        rms = x.square().mean(-1, keepdim=True).clamp_min(self.max_latent_rms**2).sqrt()
        return x * (self.max_latent_rms / rms)

    def forward(self, x: Tensor) -> CodebookOutput:
        """Quantise x (N, D) float; results are at least float32 whatever the autocast state."""
        with torch.autocast(x.device.type, enabled=False):
            latents = self.project(x)
            embedding = self.embedding.to(latents.dtype)
            temperature = self.entropy_temperature if self.use_entropy else None
            # processes may have unequal numbers of validation batches: no collective there
            over = self.entropy_over if self.training else "local"
            result = index_backpropagation(latents, embedding, self.chunk_size, temperature, over)
            losses = {
                "joint": _distance(result.vectors, latents),
                "commitment": _distance(latents, result.codes.detach()),
                "codebook": _distance(result.codes, latents.detach()),
            }
            if self.use_entropy:
                losses |= {"entropy_sample": result.sample_entropy, "entropy_batch": result.batch_entropy}
        return CodebookOutput(vectors=result.vectors, indices=result.indices, latents=latents, losses=losses)

    @torch.no_grad()
    def diagnostics(self, x: Tensor) -> dict[str, Tensor]:
        """How far the softmax that carries the gradients is from saturation.

        Args:
            x: (N, D) float; a few hundred latents suffice: N x D x K products each.

        Returns:
            Means over x, as scalars: `gradient_path` = tr Cov_s(e) / D, the strength of the path from the output to the
            latents (about 1: like an identity, the state at initialisation; towards 0: the encoder no longer sees the
            reconstruction, and the codebook is about to collapse), `max_probability` of s, and `logit_std`, the
            standard deviation of a latent's K scores.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = self.project(x)
            codes = self.embedding.to(x.dtype)
            norms = codes.square().sum(1)
            sums = x.new_zeros(3)
            for rows in x.split(_DIAGNOSED_ROWS):
                scores = rows @ codes.t()
                spread = scores.std(1, correction=0).sum()
                s = scores.softmax(1)
                path = ((s @ norms) - (s @ codes).square().sum(1)).sum() / self.dim
                sums += torch.stack([path, s.amax(1).sum(), spread])
        return dict(zip(self.DIAGNOSTICS, sums / len(x), strict=True))
