"""Residual structures: each scale quantises what the earlier ones left over, on its own grid."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.grids import Grid, as_grid
from tessera.quantizers.codebooks.base import Codebook
from tessera.quantizers.output import CodebookOutput, QuantizerOutput
from tessera.quantizers.phi import PhiConvs
from tessera.quantizers.resize import enlarge
from tessera.quantizers.structure import Edit, ScaleTokens, Structure


@dataclass
class _Step:
    """One scale of the walk that `MultiScaleQuantizer._walk` does."""

    scale: int
    residual: Tensor  # (B, D, h, w) before this scale; its gradient goes to the latent as identity
    points: Tensor  # (B n, D) compared with the codes
    tokens: Tensor  # (B, n)
    codebook: Codebook
    update: Tensor | None = None  # (B, D, h, w) added by this scale
    losses: dict[str, Tensor] = field(default_factory=dict)


def rows_of(maps: Tensor) -> Tensor:
    """(B, D, h, w) -> (B h w, D), raster order."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def masked_mse(x: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
    """Mean squared difference of (B, ...) over the images that `keep` (B,) bool selects; 0 where it selects none."""
    if keep is None:
        return F.mse_loss(x, y)
    per_image = (x - y).square().flatten(1).mean(1)
    return (per_image * keep).sum() / keep.sum().clamp_min(1)


def quantized(codebook: Codebook, points: Tensor, keep: Tensor | None) -> CodebookOutput:
    """A codebook's own result on points (B n, D), without gradients and losses of images that `keep` (B,) bool lacks.

    Their vectors are not part of any sum, but what follows at finer scales needs their values.
    """
    if keep is None:
        return codebook(points)
    kept = keep.repeat_interleave(len(points) // len(keep))
    out = codebook(points[kept])
    indices = torch.empty(len(points), dtype=torch.int64, device=points.device)
    indices[kept], indices[~kept] = out.indices, codebook.assign(points[~kept])
    vectors = codebook.lookup(indices).detach().index_put((kept,), out.vectors)
    return CodebookOutput(vectors, indices, points, out.losses)


class MultiScaleQuantizer(Structure):
    """Residual quantisation over a list of grids: coarse codes first, each scale coding what is left.

    r_0 = project(z), a_0 = 0; for scale k: y = area(r_k, grid_k), u = phi_k(bicubic(gain^k code(y / gain^k))),
    r_{k+1} = r_k - u, a_{k+1} = a_k + m_k u. z_q = a_S with the gradient of r_0; m_k drops the scales of an image
    beyond its depth.

    Losses are means over scales, and inside a scale over the images that keep it: `codebook` = mean((a_k - sg z)^2),
    which trains codes and phi, `commitment` = mean((sg a_k - z)^2), and the codebook's penalties. Codebooks whose
    vectors carry the gradient themselves (IBQ) contribute their own losses instead, and z_q is their plain sum.
    Averages and revival of codes likewise see the images that keep a scale only.

    Args:
        dim: D; None: as many channels as the codebook implies.
        codebook: factory called with `dim`.
        grids: (height, width) or a number for a square, per scale; the last is the latent's. Repeated grids are plain
            residual quantisation.
        shared_codebook: one codebook for all scales; otherwise each has its own.
        phi_convs: 0: a convolution per scale; 1: one for all; more: shared by neighbouring scales.
        phi_ratio: r of phi(h) = (1 - r) h + r conv(h); 0: no convolutions.
        gain: codes of scale k are multiplied by gain^k.
        penalties_at: "latent": entropies of the residual at full resolution (as published); "scale": of the
            vectors that are quantised.

    Raises:
        ConfigError: no grid, a grid larger than the last; values out of range.

    Source: VAR (arXiv:2404.02905), algorithm 1; XQ-GAN's `VectorQuantizer2` and `LFQ` (lxa9867/ImageFolder), where
        the commitment of the former is not divided by the number of scales.
    """

    def __init__(
        self,
        dim: int | None,
        codebook: Callable[..., Codebook],
        grids: Sequence[int | Sequence[int]],
        shared_codebook: bool = True,
        phi_convs: int = 4,
        phi_ratio: float = 0.5,
        gain: float = 1.0,
        penalties_at: Literal["latent", "scale"] = "latent",
    ):
        grids = [as_grid(grid, "quantizer.branch.grids") for grid in grids]
        if not grids:
            raise ConfigError("quantizer.branch.grids is empty; give at least the latent grid")
        for grid in grids:
            if grid[0] > grids[-1][0] or grid[1] > grids[-1][1]:
                raise ConfigError(
                    f"quantizer.branch.grids: {grid} is larger than the last, {grids[-1]}, which is the latent's; "
                    "order them coarse to fine"
                )
        super().__init__()
        self._build(dim, codebook, len(grids), shared_codebook, phi_convs, phi_ratio, gain, penalties_at)
        self._grids: list[Grid] | None = grids

    def _build(
        self,
        dim: int | None,
        codebook: Callable[..., Codebook],
        scales: int,
        shared_codebook: bool,
        phi_convs: int,
        phi_ratio: float,
        gain: float,
        penalties_at: str,
    ) -> None:
        if gain <= 0:
            raise ConfigError(f"quantizer.branch.gain={gain} must be positive")
        if penalties_at not in ("latent", "scale"):
            raise ConfigError(f"quantizer.branch.penalties_at={penalties_at!r} is unknown; choose latent or scale")
        self.codebooks = nn.ModuleList([codebook(dim=dim) for _ in range(1 if shared_codebook else scales)])
        self.dim = self.codebooks[0].dim
        self.gain, self.penalties_at = float(gain), penalties_at
        self.phi = PhiConvs(self.dim, scales, phi_convs, phi_ratio)

    def extra_repr(self) -> str:
        """What, besides weights and grids, decides the tokens (the tokenizer's fingerprint hashes it)."""
        return f"dim={self.dim}, gain={self.gain}, shared_codebook={len(self.codebooks) == 1}"

    @property
    def grids(self) -> list[Grid]:
        return self._grids

    @property
    def num_scales(self) -> int:
        return len(self._grids)

    def bind_grid(self, grid: Grid) -> None:
        grid = as_grid(grid, "grid")
        if grid != self.grids[-1]:
            raise ConfigError(
                f"quantizer.branch.grids ends in {self.grids[-1]}, but the encoder's latent grid is {grid}; make that "
                "the last entry, or change the encoder's latent grid or data.dataset.resolution"
            )

    # ---- parts of a scale

    def _codebook(self, scale: int) -> Codebook:
        return self.codebooks[scale if len(self.codebooks) > 1 else 0]

    def _sites(self) -> list[slice]:
        """Where each scale's tokens lie among the L."""
        sites, start = [], 0
        for height, width in self.grids:
            sites.append(slice(start, start + height * width))
            start += height * width
        return sites

    def _update(self, vectors: Tensor, scale: int, batch: int) -> Tensor:
        """Map (B, D, h, w) that codes (B n, D) of a scale add to the latent."""
        maps = vectors.view(batch, *self.grids[scale], self.dim).permute(0, 3, 1, 2) * self.gain**scale
        if self.grids[scale] != self.grids[-1]:
            maps = enlarge(maps, self.grids[-1])
        return self.phi.refine(maps, scale)

    def _shrunk(self, maps: Tensor, scale: int) -> Tensor:
        """Maps at the size of a scale, by area means."""
        return maps if self.grids[scale] == self.grids[-1] else F.interpolate(maps, self.grids[scale], mode="area")

    def _project(self, z: Tensor) -> Tensor:
        grid = self.grids[-1]
        if z.ndim != 4 or tuple(z.shape[1:]) != (self.dim, *grid):
            raise ValueError(
                f"latent of shape {tuple(z.shape)} does not fit a quantizer of {self.dim} channels on the grid "
                f"{grid[0]} x {grid[1]}"
            )
        points = self.codebooks[0].project(rows_of(z))
        return points.view(z.shape[0], *grid, self.dim).permute(0, 3, 1, 2)

    def _walk(
        self,
        latent: Tensor,
        differentiable: bool = False,
        edit: Edit | None = None,
        depths: Tensor | None = None,
    ) -> Iterator[_Step]:
        """Quantise scale by scale; each residual has the gradient of `latent`, and no other.

        Where the codebook makes gradients and losses itself, it makes none of the scales from `depths` (B,) on.
        """
        assigners = [codebook.assigner() for codebook in self.codebooks]
        batch, residual, sites = latent.shape[0], latent, self._sites()
        for scale in range(len(self.grids)):
            codebook = self._codebook(scale)
            # without a use for its gradient, shrinking needs no graph
            use = differentiable and (codebook.carries_gradient or self.penalties_at == "scale")
            points = rows_of(self._shrunk(residual if use else residual.detach(), scale)) / self.gain**scale
            if differentiable and codebook.carries_gradient:
                out = quantized(codebook, points, None if depths is None else depths > scale)
                step = _Step(scale, residual, points, out.indices.view(batch, -1), codebook, losses=out.losses)
                vectors = out.vectors
            else:
                tokens = assigners[scale if len(assigners) > 1 else 0](points).view(batch, -1)
                if edit is not None:
                    tokens = edit(ScaleTokens(sites[scale], tokens, codebook, points))
                step = _Step(scale, residual, points, tokens, codebook)
                vectors = codebook.lookup(tokens.reshape(-1))
            step.update = self._update(vectors, scale, batch)
            residual = residual - step.update.detach()
            yield step

    # ---- the structure's interface

    def forward(self, z: Tensor, depths: Tensor | None = None) -> QuantizerOutput:
        """Quantise z (B, D, h, w); in z_q and in the losses, scales from `depths` (B,) int64 on are left out."""
        with torch.autocast(z.device.type, enabled=False):
            latent = self._project(z)
            total, tokens, terms, seen = torch.zeros_like(latent), [], [], []
            own_gradient = self.codebooks[0].carries_gradient
            for step in self._walk(latent, differentiable=True, depths=depths):
                keep = None if depths is None else depths > step.scale
                total = total + (step.update if keep is None else step.update * keep[:, None, None, None])
                tokens.append(step.tokens)
                if own_gradient:
                    terms.append(step.losses)
                else:
                    losses = {
                        "codebook": masked_mse(total, latent.detach(), keep),
                        "commitment": masked_mse(latent, total.detach(), keep),
                    }
                    terms.append(losses | self._penalties(step, keep))
                if self.training:
                    mask = None if keep is None else keep.repeat_interleave(step.tokens.shape[1])
                    seen.append((step.points.detach(), step.tokens.flatten(), mask))
            losses = {name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]}
            if self.training:
                self._observe(seen)
            return QuantizerOutput(
                z_q=total if own_gradient else latent + (total - latent).detach(),
                tokens=torch.cat(tokens, dim=1)[:, None],
                latent=latent,
                losses=losses,
                depths=depths,
            )

    def _penalties(self, step: _Step, keep: Tensor | None) -> dict[str, Tensor]:
        gain = self.gain**step.scale
        points = rows_of(step.residual) if self.penalties_at == "latent" else step.points * gain
        mask = None if keep is None else keep.repeat_interleave(len(points) // len(keep))
        return step.codebook.penalties(points, mask, gain)

    def _observe(self, seen: list[tuple[Tensor, Tensor, Tensor | None]]) -> None:
        """Show each codebook the points, codes and kept rows of its scales: what is dropped teaches it nothing."""
        if len(self.codebooks) == 1:
            seen = [tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*seen, strict=True))]
        for codebook, scale in zip(self.codebooks, seen, strict=True):
            codebook.observe(*scale)

    @torch.no_grad()
    def encode(self, z: Tensor, edit: Edit | None = None) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return torch.cat([step.tokens for step in self._walk(self._project(z), edit=edit)], dim=1)

    def _split(self, tokens: Tensor) -> list[Tensor]:
        return [tokens[:, sites] for sites in self._sites()]

    def _sum(self, tokens: list[Tensor], depths: Tensor | None = None) -> Tensor:
        total = None
        for scale, part in enumerate(tokens):
            update = self._update(self._codebook(scale).lookup(part.reshape(-1)), scale, len(part))
            if depths is not None:
                update = update * (depths > scale)[:, None, None, None]
            total = update if total is None else total + update
        return total

    def decode(self, tokens: Tensor, depths: Tensor | None = None) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            return self._sum(self._split(tokens), depths)

    def partial_decode(self, tokens: Tensor, scales: int) -> Tensor:
        if not 1 <= scales <= len(self.grids):
            raise ValueError(f"scales={scales} is outside [1, {len(self.grids)}], the scales of this quantizer")
        with torch.autocast(tokens.device.type, enabled=False):
            return self._sum(self._split(tokens)[:scales])

    def neighbors(self, query: Tensor, k: int) -> Tensor:
        """(B, L, k) int64; of latents: the codes nearest to what each scale quantises when none is perturbed."""
        batch = query.shape[0]
        if query.is_floating_point():
            with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
                queries = [step.points.view(batch, -1, self.dim) for step in self._walk(self._project(query))]
        else:
            queries = self._split(query)
        if len(self.codebooks) == 1:  # one search for all scales
            queries = [torch.cat(queries, dim=1)]
        found = [c.neighbors(q.flatten(0, 1), k) for c, q in zip(self.codebooks, queries, strict=True)]
        return torch.cat([part.view(batch, -1, k) for part in found], dim=1)

    # ---- the interface of next-scale generators

    def embed(self, tokens: Tensor, scale: int) -> Tensor:
        return self._codebook(scale).lookup(tokens.reshape(-1)).view(*tokens.shape, self.dim)

    def advance(self, latent: Tensor, vectors: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(latent.device.type, enabled=False):
            latent = latent.float() + self._update(vectors.float().flatten(0, 1), scale, len(vectors))
            if scale == len(self.grids) - 1:
                return latent, None
            return latent, self._shrunk(latent, scale + 1).flatten(2).transpose(1, 2)

    def next_scale_input(self, tokens: Tensor) -> Tensor:
        if len(self.grids) == 1:
            raise self._no_scales()
        latent = torch.zeros(len(tokens), self.dim, *self.grids[-1], device=tokens.device)
        inputs = []
        for scale, part in enumerate(self._split(tokens)[:-1]):
            latent, following = self.advance(latent, self.embed(part, scale), scale)
            inputs.append(following)
        return torch.cat(inputs, dim=1)


class ResidualQuantizer(MultiScaleQuantizer):
    """Residual quantisation on the latent grid itself: `depth` codes per cell, each coding what the earlier left.

    Args:
        dim, codebook, shared_codebook, phi_convs, phi_ratio, gain, penalties_at: see `MultiScaleQuantizer`.
        depth: codes per cell.
        grid: the latent's; None: given later by `bind_grid`.

    Raises:
        ConfigError: depth below 1; see `MultiScaleQuantizer`.

    Source: RQ-VAE (arXiv:2203.01941), without convolutions by default; XQ-GAN's is a multi-scale quantizer of equal
        grids, with convolutions.
    """

    def __init__(
        self,
        dim: int | None,
        codebook: Callable[..., Codebook],
        depth: int,
        grid: Sequence[int] | int | None = None,
        shared_codebook: bool = True,
        phi_convs: int = 0,
        phi_ratio: float = 0.0,
        gain: float = 1.0,
        penalties_at: Literal["latent", "scale"] = "latent",
    ):
        if depth < 1:
            raise ConfigError(f"quantizer.branch.depth={depth} must be at least 1")
        Structure.__init__(self)
        self._build(dim, codebook, depth, shared_codebook, phi_convs, phi_ratio, gain, penalties_at)
        self.depth = depth
        self._grids = None if grid is None else [as_grid(grid, "quantizer.branch.grid")] * depth

    @property
    def grids(self) -> list[Grid]:
        if self._grids is None:
            raise ConfigError(
                "the quantizer's grid is not known; build it into a Tokenizer or set quantizer.branch.grid"
            )
        return self._grids

    @property
    def num_scales(self) -> int:
        return self.depth

    def bind_grid(self, grid: Grid) -> None:
        grid = as_grid(grid, "grid")
        if self._grids is not None and self._grids[0] != grid:
            raise ConfigError(
                f"quantizer.branch.grid={self._grids[0]} contradicts the latent grid {grid} of the encoder; "
                "leave quantizer.branch.grid out, or change data.dataset.resolution"
            )
        self._grids = [grid] * self.depth
