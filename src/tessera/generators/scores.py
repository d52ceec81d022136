"""Loss and hits of every token of a batch, and their sums per token site, which logs are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor


def head_losses(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of P parallel linear heads.

    Args:
        features: (N, d) float, what the heads get.
        weight: (P K, d) float, rows of branch 0 first.
        bias: (P K,) float or None.
        targets: (N, P) int64 in [0, K).
        label_smoothing: share of the target's weight that is spread over all codes.

    Returns:
        Losses (N, P) float32 with gradient, and hits (N, P) bool: whether the most probable code is the target.
    """
    logits = F.linear(features, weight, bias)
    with torch.autocast(features.device.type, enabled=False):
        logits = logits.float().unflatten(-1, (targets.shape[1], -1))
        losses = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing
        )
    return losses.view_as(targets), logits.detach().argmax(-1) == targets


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
