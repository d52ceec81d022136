"""Index backpropagation over large codebooks: exact values and gradients without an N x K table.

With l = z E^T, s = softmax(l) and the one-hot choice h = argmax l, IBQ outputs o E with o = h - sg(s) + s. Its value is
the chosen code, and its gradients are those of

    E[argmax l] + Attn(z, E, sg E) - sg(Attn(z, E, sg E)),        Attn(q, k, v) = softmax(q k^T) v:

    dL/dl = s * (G E^T - D),  D_n = sum_k s_nk (G E^T)_nk,  dL/dz = (dL/dl) E,  dL/dE = (dL/dl)^T z + h^T G,

with G the gradient of the output. The entropy terms have p = softmax(l / t), h_n = -sum_k p_nk ln p_nk and
P = mean_n p_n; with u_k = ln(P_k + eps) + P_k / (P_k + eps) and U_n = sum_k p_nk u_k,

    d mean(h) / dl_nk = -(1 / N t) p_nk (ln p_nk + h_n),
    d sum_k P_k ln(P_k + eps) / dl_nk = (1 / N t) p_nk (u_k - U_n).

Rows are taken in blocks that see all codes, so the normalisers of a block are known before its weights are needed: one
product of the codebook with the latents going forward, and four going back (8 in the dense form). Inside a block, codes
come in tiles that stay in cache. Saved for the way back: four numbers per row and one per code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tessera.distributed import all_reduce_sum, world_size

EntropyOver = Literal["local", "global"]

# Added to the mean assignment inside the logarithm, as published: bounds the pull on codes that nothing chooses
ENTROPY_EPS = 1e-5
# Scores per row block. On a CPU, more is no faster (measured from 2^18 to 2^21); a GPU needs 128 MiB to be busy.
_BLOCK_SCORES = {"cpu": 1 << 19}
_BLOCK_SCORES_ACCELERATOR = 1 << 25
# Fewer rows would read the codebook from memory more often than the products take (measured: 128 to 256 are fastest)
_LEAST_ROWS = 128
# Scores per tile on a CPU, so that a tile stays in the cache of one core; codes below which products get slow
_TILE_SCORES, _LEAST_CODES = 1 << 18, 512


@dataclass(frozen=True)
class Tiling:
    """Rows per block and codes per tile of the products between N latents and K codes."""

    count: int
    size: int
    rows: int
    codes: int

    @classmethod
    def plan(cls, count: int, size: int, chunk_size: int, device: torch.device) -> "Tiling":
        """Tiles for `count` latents and `size` codes; on a CPU of at most `chunk_size` codes, elsewhere of all."""
        budget = _BLOCK_SCORES.get(device.type, _BLOCK_SCORES_ACCELERATOR)
        rows = max(1, min(count, max(_LEAST_ROWS, budget // size)))
        if device.type == "cpu":
            return cls(count, size, rows, min(chunk_size, size, max(_LEAST_CODES, _TILE_SCORES // rows)))
        return cls(count, size, rows, size)

    @property
    def tiles(self) -> int:
        return -(-self.size // self.codes)

    def row_blocks(self) -> Iterator[slice]:
        for start in range(0, self.count, self.rows):
            yield slice(start, min(start + self.rows, self.count))

    def code_tiles(self) -> Iterator[tuple[int, slice]]:
        for tile, start in enumerate(range(0, self.size, self.codes)):
            yield tile, slice(start, min(start + self.codes, self.size))

    def buffer(self, like: Tensor) -> Tensor:
        """(tiles, rows, codes) for one row block."""
        return like.new_empty(self.tiles, self.rows, self.codes)

    def view(self, buffer: Tensor, tile: int, rows: slice, codes: slice) -> Tensor:
        return buffer[tile, : rows.stop - rows.start, : codes.stop - codes.start]


@dataclass
class Assignment:
    """Result of `index_backpropagation` on N latents.

    Attributes:
        vectors: (N, D) chosen codes; their gradient reaches the latents through the assignment weights, and the codes
            through those and as their value.
        codes: (N, D) the same values; their gradient reaches the chosen codes only.
        indices: (N,) int64 in [0, K).
        sample_entropy: scalar, mean entropy of single assignments in nats; None without a temperature.
        batch_entropy: scalar, minus the entropy of the mean assignment in nats; None without a temperature.
    """

    vectors: Tensor
    codes: Tensor
    indices: Tensor
    sample_entropy: Tensor | None
    batch_entropy: Tensor | None


def index_backpropagation(
    x: Tensor,
    codes: Tensor,
    chunk_size: int,
    temperature: float | None = None,
    over: EntropyOver = "local",
) -> Assignment:
    """Assign latents to the codes of largest inner product, with gradients through all assignment weights.

    Memory beyond inputs, outputs and gradients: one row block of scores going forward and three going back, each of at
    most 128 x K or, on a CPU, 2^19 numbers (elsewhere 2^25), whichever is more. Never N x K.

    Args:
        x: (N, D) float32 or float64; N = 0 gives entropies of 0.
        codes: (K, D), dtype of x.
        chunk_size: codes per tile.
        temperature: t > 0 of the entropy terms; None leaves them out.
        over: latents whose mean assignment the batch entropy takes: of this process ("local"), or of all processes
            ("global"; a collective. Each process then returns gradients whose mean over processes, as data-parallel
            training takes it, is the gradient of the joint batch's entropy).

    Returns:
        Vectors, indices and entropies.

    Source: IBQ (arXiv:2412.02692) and `IndexPropagationQuantize` of TencentARC/SEED-Voken, whose N x K tables (five
        kept, nine at the peak) and logits in autocast precision we don't follow.
    """
    tiling = Tiling.plan(len(x), len(codes), chunk_size, x.device)
    differentiate = torch.is_grad_enabled() and (x.requires_grad or codes.requires_grad)
    with torch.autocast(x.device.type, enabled=False):
        vectors, chosen, indices, sample, batch = _IndexBackpropagation.apply(
            x, codes, tiling, temperature, over == "global", differentiate
        )
    return Assignment(vectors, chosen, indices, sample, batch)


def _floor(dtype: torch.dtype) -> float:
    """Exponents are kept above this: exp of it is still a normal number, and nothing beside weights of at least 1.

    Numbers below that range cost a CPU ten times as much (measured: exp takes 13 ns instead of 0.3 ns).
    """
    return -650.0 if dtype == torch.float64 else -80.0


@dataclass
class _Rows:
    """Per-row results of the forward sweep: best score, its index, ln of the normalisers, entropies; per code: P."""

    best: Tensor
    indices: Tensor
    log_z: Tensor | None
    log_zt: Tensor | None
    entropies: Tensor | None
    mean: Tensor | None


def _sweep(x: Tensor, codes: Tensor, tiling: Tiling, temperature: float | None, differentiate: bool) -> _Rows:
    best, indices = x.new_empty(len(x)), torch.empty(len(x), dtype=torch.int64, device=x.device)
    log_z = x.new_empty(len(x)) if differentiate else None
    log_zt, entropies, mean = None, None, None
    if temperature is not None:
        log_zt, entropies, mean = x.new_empty(len(x)), x.new_empty(len(x)), x.new_zeros(len(codes))
    # -inf beyond the last code, so that the choice can't fall there
    block = tiling.buffer(x).fill_(-torch.inf)
    scratch, floor = x.new_empty(tiling.rows * tiling.codes), _floor(x.dtype)
    tops = x.new_empty(tiling.tiles, tiling.rows)
    for rows in tiling.row_blocks():
        count = rows.stop - rows.start
        for tile, part in tiling.code_tiles():
            scores = tiling.view(block, tile, rows, part)
            torch.mm(x[rows], codes[part].t(), out=scores)
            tops[tile, :count] = scores.amax(1)
        # positions are looked up in the winning tile only; the first of equal maxima is the lowest index
        best[rows], winner = tops[:, :count].max(0)
        within = block[winner, torch.arange(count, device=x.device)].argmax(1)
        indices[rows] = winner * tiling.codes + within
        if not differentiate and temperature is None:
            continue
        top = best[rows].unsqueeze(1)
        z, zt, weighted = x.new_zeros(count), x.new_zeros(count), x.new_zeros(count)
        for tile, part in tiling.code_tiles():
            scores = tiling.view(block, tile, rows, part).sub_(top)
            weights = scratch[: scores.numel()].view(scores.shape)
            if differentiate:
                z += torch.clamp(scores, min=floor, out=weights).exp_().sum(1)
            if temperature is not None:
                torch.exp(scores.mul_(1 / temperature).clamp_min_(floor), out=weights)
                zt += weights.sum(1)
                weighted += scores.mul_(weights).sum(1)
                scores.copy_(weights)
        if differentiate:
            log_z[rows] = z.log_()
        if temperature is not None:
            log_zt[rows] = zt.log()
            entropies[rows] = log_zt[rows] - weighted / zt
            share = zt.reciprocal_() / len(x)
            for tile, part in tiling.code_tiles():
                mean[part].addmv_(tiling.view(block, tile, rows, part).t(), share)
    return _Rows(best, indices, log_z, log_zt, entropies, mean)


class _IndexBackpropagation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        tiling: Tiling,
        temperature: float | None,
        everywhere: bool,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        found = _sweep(x, codes, tiling, temperature, differentiate)
        sample = batch = None
        weight = 1.0 / max(len(x), 1)  # of one row in the mean assignment, as the way back sees it
        if temperature is not None:
            sample = found.entropies.sum() / max(len(x), 1)
            if everywhere:
                # weighted by rows, so that uneven shares of a joint batch give the joint batch's mean
                total = all_reduce_sum(torch.cat([found.mean * len(x), found.mean.new_tensor([float(len(x))])]))
                count = total[-1].clamp_min(1)
                found.mean = total[:-1] / count
                weight = world_size() / count
            batch = torch.dot(found.mean, (found.mean + ENTROPY_EPS).log())
        ctx.tiling, ctx.temperature, ctx.weight = tiling, temperature, weight
        if differentiate:
            ctx.save_for_backward(
                x, codes, found.indices, found.best, found.log_z, found.log_zt, found.entropies, found.mean
            )
        ctx.mark_non_differentiable(found.indices)
        vectors = codes.index_select(0, found.indices)
        return vectors, vectors.clone(), found.indices, sample, batch

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_vectors: Tensor | None,
        grad_chosen: Tensor | None,
        _: None,
        grad_sample: Tensor | None,
        grad_batch: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        x, codes, indices, *rows = ctx.saved_tensors
        needs_x, needs_codes = ctx.needs_input_grad[:2]
        grad_x = torch.zeros_like(x) if needs_x else None
        grad_codes = torch.zeros_like(codes) if needs_codes else None
        with torch.autocast(x.device.type, enabled=False):
            if not (grad_vectors is None and grad_sample is None and grad_batch is None):
                _backpropagate(ctx, x, codes, rows, (grad_vectors, grad_sample, grad_batch), grad_x, grad_codes)
            if needs_codes:
                for gradient in (grad_vectors, grad_chosen):
                    if gradient is not None:
                        grad_codes.index_add_(0, indices, gradient)
        return grad_x, grad_codes, None, None, None, None


def _backpropagate(
    ctx: Any,
    x: Tensor,
    codes: Tensor,
    statistics: list[Tensor | None],
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    grad_x: Tensor | None,
    grad_codes: Tensor | None,
) -> None:
    """Add the gradients through the scores to `grad_x` and `grad_codes`."""
    best, log_z, log_zt, entropies, mean = statistics
    grad_vectors, grad_sample, grad_batch = gradients
    tiling: Tiling = ctx.tiling
    attention, entropy = grad_vectors is not None, not (grad_sample is None and grad_batch is None)
    factor = tiling.buffer(x)
    soft = tiling.buffer(x) if attention else None
    sharp = tiling.buffer(x) if entropy else None
    if entropy:
        zero = x.new_zeros(())
        scale = 1 / ctx.temperature
        # of p (ln p + h) and of p (u - U)
        of_sample = (zero if grad_sample is None else grad_sample) * (-scale / max(len(x), 1))
        of_batch = (zero if grad_batch is None else grad_batch) * (scale * ctx.weight)
        pull = ((mean + ENTROPY_EPS).log() + mean / (mean + ENTROPY_EPS)).mul_(of_batch)
    scratch, floor = x.new_empty((2 if attention else 1) * tiling.rows * tiling.codes), _floor(x.dtype)
    for rows in tiling.row_blocks():
        count = rows.stop - rows.start
        queries = torch.cat([x[rows], grad_vectors[rows]]) if attention else x[rows]
        top = best[rows].unsqueeze(1)
        # what a row's weights take away, known only after the last tile: D and U
        mean_pull = x.new_zeros(count)
        mean_grad = x.new_zeros(count)
        for tile, part in tiling.code_tiles():
            width = part.stop - part.start
            products = scratch[: len(queries) * width].view(len(queries), width)
            torch.mm(queries, codes[part].t(), out=products)
            logits = products[:count].sub_(top)
            out = tiling.view(factor, tile, rows, part)
            if attention:
                s = torch.sub(logits, log_z[rows].unsqueeze(1), out=tiling.view(soft, tile, rows, part))
                s.clamp_min_(floor).exp_()
                torch.mul(s, products[count:], out=out)
                mean_grad += out.sum(1)
            if entropy:
                log_p = logits.mul_(scale).sub_(log_zt[rows].unsqueeze(1)).clamp_min_(floor)
                p = torch.exp(log_p, out=tiling.view(sharp, tile, rows, part))
                mean_pull += torch.mv(p, pull[part])
                log_p.add_(entropies[rows].unsqueeze(1)).mul_(of_sample).add_(pull[part])
                if attention:
                    out.addcmul_(p, log_p)
                else:
                    torch.mul(p, log_p, out=out)
        for tile, part in tiling.code_tiles():
            grad_logits = tiling.view(factor, tile, rows, part)
            if attention:
                s = tiling.view(soft, tile, rows, part)
                grad_logits.addcmul_(s, mean_grad.unsqueeze(1), value=-1)
            if entropy:
                p = tiling.view(sharp, tile, rows, part)
                grad_logits.addcmul_(p, mean_pull.unsqueeze(1), value=-1)
            if grad_x is not None:
                grad_x[rows].addmm_(grad_logits, codes[part])
            if grad_codes is not None:
                grad_codes[part].addmm_(grad_logits.t(), x[rows])
