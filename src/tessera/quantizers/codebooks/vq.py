"""Learned codebook with nearest-code assignment, plain or on the unit sphere."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.quantizers.codebooks.averages import ClusterAverages
from tessera.quantizers.codebooks.base import Codebook
from tessera.quantizers.codebooks.revival import Revival
from tessera.quantizers.output import CodebookOutput
from tessera.quantizers.search import DEFAULT_CHUNK_SIZE, nearest_codes, nearest_k


class VQCodebook(Codebook):
    """Vector quantisation: q = e_k, k = argmin_j |z - e_j|^2; output z + sg(q - z).

    With `l2_normalize`, z and every e_j are divided by their norm first, so the nearest code is the one of
    largest cosine, and the straight-through gradient passes through the normalisation of z. With `search` = cosine
    alone, only the comparison is of unit vectors; looked up are the codes as they are, so that residuals of any length
    can be coded.

    Losses (means over all elements, unweighted): `codebook` = mean((q - sg z)^2), for codes that learn by gradient,
    and `commitment` = mean((sg q - z)^2).

    Args:
        dim: D, channels of one vector.
        codebook_size: K.
        l2_normalize: compare and return unit vectors.
        search: "cosine" or "euclidean"; None: cosine exactly with l2_normalize.
        update: "gradient": codes learn from the codebook loss; "ema": each is the moving average of the vectors
            assigned to it, over all ranks.
        ema_decay: of the averages, in [0, 1).
        revival: factory called with the codebook size, of what moves unused codes to where vectors are; None: off.
        chunk_size: codes per tile of the search; changes speed and memory only.

    Raises:
        ConfigError: a size below 1, an unknown choice, a decay out of range.

    Source: van den Oord et al. 2017 (arXiv:1711.00937), eq. 1-3, averages: app. A.1; normalisation and initialisation
        as in XQ-GAN's `VectorQuantizer` (lxa9867/ImageFolder), whose search in autocast precision and N x K tables
        we don't follow; cosine search of plain codes as in its `VectorQuantizer2`.
    """

    def __init__(
        self,
        dim: int | None,
        codebook_size: int,
        l2_normalize: bool = True,
        search: Literal["cosine", "euclidean"] | None = None,
        update: Literal["gradient", "ema"] = "gradient",
        ema_decay: float = 0.99,
        revival: Callable[[int], Revival] | None = None,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
    ):
        prefix = "quantizer.branch.codebook"
        for name, value in (("codebook_size", codebook_size), ("chunk_size", chunk_size)):
            if value < 1:
                raise ConfigError(f"{prefix}.{name}={value} must be at least 1")
        if dim is None or dim < 1:
            raise ConfigError(f"a codebook of dimension {dim} is impossible; raise quantizer.dim")
        if search not in (None, "cosine", "euclidean"):
            raise ConfigError(f"{prefix}.search={search!r} is unknown; choose cosine, euclidean or null")
        if update not in ("gradient", "ema"):
            raise ConfigError(f"{prefix}.update={update!r} is unknown; choose gradient or ema")
        super().__init__(dim, codebook_size)
        self.l2_normalize, self.chunk_size, self.update = l2_normalize, chunk_size, update
        self.search = search or ("cosine" if l2_normalize else "euclidean")
        embedding = torch.empty(codebook_size, dim).uniform_(-1 / codebook_size, 1 / codebook_size)
        embedding = F.normalize(embedding, dim=1) if self.search == "cosine" else embedding
        self.embedding = nn.Parameter(embedding, requires_grad=update == "gradient")
        self.averages = ClusterAverages(embedding, ema_decay) if update == "ema" else None
        self.revival = None if revival is None else revival(codebook_size)

    def extra_repr(self) -> str:
        """What, besides the weights, decides the tokens (the tokenizer's fingerprint hashes it)."""
        text = f"dim={self.dim}, codebook_size={self.codebook_size}, l2_normalize={self.l2_normalize}"
        # named only where l2_normalize doesn't say it: the fingerprints of earlier tokenizers stay
        return text if self.l2_normalize or self.search == "euclidean" else f"{text}, search={self.search}"

    @property
    def _metric(self) -> str:
        return "dot" if self.search == "cosine" else "euclidean"

    def project(self, x: Tensor) -> Tensor:
        """(N, D) -> float32, of unit length where the codes are."""
        return F.normalize(x.float(), dim=-1) if self.l2_normalize else x.float()

    def compared(self, vectors: Tensor) -> Tensor:
        """Vectors as the search sees them."""
        return F.normalize(vectors.float(), dim=-1) if self.search == "cosine" else vectors.float()

    def assign(self, x: Tensor) -> Tensor:
        """Indices of the nearest codes.

        Args:
            x: (N, D) float; any scale and precision. Compared in float32.

        Returns:
            (N,) int64 in [0, K). Ties go to the lowest index.
        """
        with torch.no_grad():  # without the copy of the codebook that an `assigner` keeps
            return nearest_codes(x, self.embedding, self.chunk_size, self.search)

    @torch.no_grad()
    def assigner(self) -> Callable[[Tensor], Tensor]:
        codes = self.compared(self.embedding)
        # x needs no normalisation: the largest product with unit codes is the same for any length of it
        return lambda x: nearest_codes(x, codes, self.chunk_size, self._metric)

    def lookup(self, indices: Tensor) -> Tensor:
        """Code vectors (N, D) float32 of (N,) int64 indices; unit vectors if the codebook is normalised."""
        return self.project(F.embedding(indices, self.embedding))

    def mix(self, weights: Tensor) -> Tensor:
        """Weighted sums of codes.

        Args:
            weights: (N, K) float.

        Returns:
            (N, D) float32; of unit length if the codebook is normalised.
        """
        return self.project(weights.float() @ self.embedding.float())

    def neighbors_of_points(self, x: Tensor, k: int) -> Tensor:
        """(N, k) int64 by the distance that `assign` minimises."""
        return nearest_k(x, self.compared(self.embedding), k, self.chunk_size, self._metric)

    def neighbors_of_codes(self, indices: Tensor, k: int) -> Tensor:
        """(N, k) int64 by the same distance; lengths of codes that only the lookup keeps don't enter."""
        return self.neighbors_of_points(self.compared(self.embedding[indices]), k)

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Move the codes by what is not a gradient, from points x (N, D) and their codes (N,), over all ranks.

        Rows where `mask` (N,) bool is False are left out; where it leaves none on any rank, nothing changes.
        """
        if self.averages is None and self.revival is None:
            return
        if mask is not None:
            x, indices = x[mask], indices[mask]
        if self.averages is not None:
            self.averages.update(x, indices, self.embedding)
        if self.revival is not None:
            moved = self.revival(self, x, indices)
            if self.averages is not None:
                self.averages.restart(moved, self.embedding)

    def forward(self, x: Tensor) -> CodebookOutput:
        """Quantise x (N, D) float; vectors, latents and losses are float32 whatever the autocast state."""
        with torch.autocast(x.device.type, enabled=False):
            latents = self.project(x)
            indices = self.assign(latents)
            codes = self.lookup(indices)
            losses = {"commitment": F.mse_loss(latents, codes.detach())}
            if self.update == "gradient":
                losses = {"codebook": F.mse_loss(codes, latents.detach()), **losses}
            vectors = latents + (codes - latents).detach()
            if self.training:
                self.observe(latents.detach(), indices)
        return CodebookOutput(vectors=vectors, indices=indices, latents=latents, losses=losses)
