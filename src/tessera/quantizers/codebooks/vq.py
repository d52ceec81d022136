"""Learned codebook with nearest-code assignment, plain or on the unit sphere."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.quantizers.codebooks.base import Codebook
from tessera.quantizers.output import CodebookOutput
from tessera.quantizers.search import DEFAULT_CHUNK_SIZE, nearest_codes, nearest_k


class VQCodebook(Codebook):
    """Vector quantisation: q = e_k, k = argmin_j |z - e_j|^2; output z + sg(q - z).

    With `l2_normalize`, z and every e_j are divided by their norm first, so the nearest code is the one of
    largest cosine, and the straight-through gradient passes through the normalisation of z.

    Losses (means over all elements, unweighted): `codebook` = mean((q - sg z)^2), `commitment` = mean((sg q -
    z)^2).

    Args:
        dim: D, channels of one vector.
        codebook_size: K.
        l2_normalize: compare and return unit vectors.
        chunk_size: codes per tile of the search; changes speed and memory only.

    Raises:
        ConfigError: a size below 1.

    Source: van den Oord et al. 2017 (arXiv:1711.00937), eq. 1-3; normalisation and initialisation as in
        XQ-GAN's `VectorQuantizer` (lxa9867/ImageFolder), whose search in autocast precision and N x K tables
        we don't follow.
    """

    def __init__(self, dim: int, codebook_size: int, l2_normalize: bool = True, chunk_size: int = DEFAULT_CHUNK_SIZE):
        prefix = "quantizer.branch.codebook"
        for name, value in (("codebook_size", codebook_size), ("chunk_size", chunk_size)):
            if value < 1:
                raise ConfigError(f"{prefix}.{name}={value} must be at least 1")
        if dim < 1:
            raise ConfigError(f"a codebook of dimension {dim} is impossible; raise quantizer.dim")
        super().__init__(dim, codebook_size)
        self.l2_normalize, self.chunk_size = l2_normalize, chunk_size
        embedding = torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        self.embedding = nn.Parameter(F.normalize(embedding, dim=1) if l2_normalize else embedding)

    def extra_repr(self) -> str:
        """What, besides the weights, decides the tokens (the tokenizer's fingerprint hashes it)."""
        return f"dim={self.dim}, codebook_size={self.codebook_size}, l2_normalize={self.l2_normalize}"

    @property
    def _metric(self) -> str:
        return "dot" if self.l2_normalize else "euclidean"

    def _normalize(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors.float(), dim=-1) if self.l2_normalize else vectors.float()

    def assign(self, x: Tensor) -> Tensor:
        """Indices of the nearest codes.

        Args:
            x: (N, D) float; any scale and precision. Compared in float32.

        Returns:
            (N,) int64 in [0, K). Ties go to the lowest index.
        """
        with torch.no_grad():
            return nearest_codes(self._normalize(x), self._normalize(self.embedding), self.chunk_size, self._metric)

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors (N, D) float32 of (N,) int64 indices; unit vectors if the codebook is normalised."""
        return self._normalize(F.embedding(indices, self.embedding))

    def neighbors(self, query: Tensor, k: int) -> Tensor:
        """The k nearest codes of vectors or of codes.

        Args:
            query: (N, D) float vectors, or (N,) int64 code indices.
            k: 1 <= k <= K.

        Returns:
            (N, k) int64, nearest first. A code's nearest neighbour is itself (or an equal code of lower
            index).
        """
        with torch.no_grad():
            codes = self._normalize(self.embedding)
            if query.is_floating_point():
                return nearest_k(self._normalize(query), codes, k, self.chunk_size, self._metric)
            # Equal codes have equal neighbours: search once per code in use, then gather
            used, position = query.unique(return_inverse=True)
            return nearest_k(codes[used], codes, k, self.chunk_size, self._metric)[position]

    def forward(self, x: Tensor) -> CodebookOutput:
        """Quantise x (N, D) float; vectors, latents and losses are float32 whatever the autocast state."""
        with torch.autocast(x.device.type, enabled=False):
            latents = self._normalize(x)
            indices = self.assign(x)
            codes = self.lookup(indices)
            losses = {
                "codebook": F.mse_loss(codes, latents.detach()),
                "commitment": F.mse_loss(latents, codes.detach()),
            }
            vectors = latents + (codes - latents).detach()
        return CodebookOutput(vectors=vectors, indices=indices, latents=latents, losses=losses)
