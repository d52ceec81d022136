"""Loss and hits of every token of a batch, and their sums per token site, which logs are made of."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.generators.inference import compute_dtype

TILE_BYTES = 256 * 2**20  # of float32 logits that are alive at once


def head_losses(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of P parallel linear heads.

    Where the logits would take more than `TILE_BYTES` they are made tile by tile, and again in the backward pass, so
    that memory grows with N + K and not with N K: 262,144 codes train in the memory of the features and the weights.

    Args:
        features: (N, d) float, what the heads get.
        weight: (P K, d) float, rows of branch 0 first.
        bias: (P K,) float or None.
        targets: (N, P) int64 in [0, K).
        label_smoothing: share of the target's weight that is spread over all codes.

    Returns:
        Losses (N, P) float32 (float64 where the features are) with gradient, and hits (N, P) bool: whether the most
        probable code is the target.
    """
    if 4 * len(features) * len(weight) > TILE_BYTES:
        dtype = compute_dtype(weight)
        return _TiledHeadLosses.apply(features, weight, bias, targets, label_smoothing, dtype)
    logits = F.linear(features, weight, bias)
    with torch.autocast(features.device.type, enabled=False):
        logits = logits.to(_wide(logits.dtype)).unflatten(-1, (targets.shape[1], -1))
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing
        )
    return losses.view_as(targets), logits.detach().argmax(-1) == targets


def token_losses(
    features: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`head_losses` of whole sequences: features (B, L, d) and tokens (B, P, L) -> losses and hits (B, P, L)."""
    batch, branches, length = tokens.shape
    targets = tokens.transpose(1, 2).flatten(0, 1)
    found = head_losses(features.flatten(0, 1), weight, bias, targets, label_smoothing)
    losses, hits = (values.view(batch, length, branches).transpose(1, 2) for values in found)
    return losses, hits


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Type of sums over codes: float32, or what is wider."""
    return torch.promote_types(dtype, torch.float32)


def _tiles(rows: int, size: int, branch: int) -> Iterator[tuple[int, slice]]:
    """(first code, rows of the weight) of the equal parts in which a branch's K = `size` codes are taken.

    Tiles hold all `rows` features and some of the codes: each weight and its gradient are touched once.
    """
    count = -(-4 * rows * size // TILE_BYTES)
    width = -(-size // min(count, size))
    for first in range(0, size, width):
        yield first, slice(branch * size + first, branch * size + min(first + width, size))


class _TiledHeadLosses(torch.autograd.Function):
    """`head_losses` by tiles of codes; products in `dtype`, sums over codes in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        label_smoothing: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        rows, branches = targets.shape
        size = len(weight) // branches
        with torch.autocast(features.device.type, enabled=False):
            x = features.to(dtype)
            norms, losses, hits = [], [], []
            for branch, target in enumerate(targets.unbind(1)):
                largest = x.new_full((rows,), -torch.inf, dtype=_wide(dtype))
                total, all_logits, picked = (torch.zeros_like(largest) for _ in range(3))
                best = torch.zeros_like(target)
                for first, codes in _tiles(rows, size, branch):
                    logits = _logits(x, weight, bias, codes)
                    values, places = logits.max(-1)
                    best = torch.where(values > largest, places + first, best)
                    place, inside = _within(target, first, logits.shape[1])
                    picked = torch.where(inside, logits.gather(1, place[:, None])[:, 0], picked)
                    if label_smoothing:
                        all_logits += logits.sum(-1)
                    larger = torch.maximum(values, largest)
                    total = total * (largest - larger).exp() + logits.sub_(larger[:, None]).exp_().sum(-1)
                    largest = larger
                norms.append(largest + total.log())
                mean = all_logits / size
                losses.append(norms[-1] - (1 - label_smoothing) * picked - label_smoothing * mean)
                hits.append(best == target)
        ctx.save_for_backward(features, weight, bias, targets, torch.stack(norms, 1))
        ctx.label_smoothing, ctx.dtype = label_smoothing, dtype
        hits = torch.stack(hits, 1)
        ctx.mark_non_differentiable(hits)
        return torch.stack(losses, 1), hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias, targets, norms = ctx.saved_tensors
        dtype, smoothing = ctx.dtype, ctx.label_smoothing
        rows, branches = targets.shape
        size = len(weight) // branches
        for_features, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_features = torch.zeros_like(features, dtype=_wide(dtype)) if for_features else None
        grad_weight = torch.empty_like(weight) if for_weight else None
        grad_bias = torch.empty_like(bias) if for_bias else None
        with torch.autocast(features.device.type, enabled=False):
            x = features.to(dtype)
            for branch, (target, norm, scale) in enumerate(
                zip(targets.unbind(1), norms.unbind(1), upstream.unbind(1), strict=True)
            ):
                for first, codes in _tiles(rows, size, branch):
                    # probabilities, and then the gradient of the logits in their place
                    grad = _logits(x, weight, bias, codes).sub_(norm[:, None]).exp_()
                    place, inside = _within(target, first, grad.shape[1])
                    grad.scatter_add_(1, place[:, None], (inside.to(grad.dtype) * (smoothing - 1))[:, None])
                    if smoothing:
                        grad -= smoothing / size
                    grad *= scale[:, None]
                    if for_bias:
                        grad_bias[codes] = grad.sum(0)
                    grad = grad.to(dtype)
                    if for_weight:
                        grad_weight[codes] = grad.t() @ x
                    if for_features:
                        grad_features += grad @ weight[codes].to(dtype)
        if for_features:
            grad_features = grad_features.to(features.dtype)
        return grad_features, grad_weight, grad_bias, None, None, None


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, codes: slice) -> Tensor:
    """Logits of some codes, (N, C), in float32 or wider; the caller may write into them."""
    logits = F.linear(x, weight[codes].to(x.dtype), None if bias is None else bias[codes].to(x.dtype))
    return logits.to(_wide(x.dtype))


def _within(target: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Where targets (N,) lie in a tile, clamped to it, and whether they do."""
    place = target - first
    return place.clamp(0, width - 1), (place >= 0) & (place < width)


def site_sums(losses: Tensor, hits: Tensor, counted: Tensor | None = None) -> dict[str, Tensor]:
    """What `Generator.loss` reports beside the loss.

    Args:
        losses: (B, P, L) float, in the image's order of tokens; gradient is dropped.
        hits: (B, P, L) bool.
        counted: (B, P, L) bool, tokens that were predicted; None: all.

    Returns:
        "accuracy": share of the counted tokens that are hit; "site_loss", "site_hits" and "site_count": (P, L) float32,
        sums over the batch.
    """
    losses, hits = losses.detach().float(), hits.float()
    counts = torch.ones_like(losses) if counted is None else counted.float()
    sums = {"site_loss": losses * counts, "site_hits": hits * counts, "site_count": counts}
    sums = {name: value.sum(0) for name, value in sums.items()}
    return {"accuracy": sums["site_hits"].sum() / sums["site_count"].sum().clamp_min(1), **sums}
