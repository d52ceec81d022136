"""Says when a codebook collapses, early and with what to do about it."""

import logging
import math
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from tessera import distributed
from tessera.errors import ConfigError
from tessera.metrics.codebook import perplexity
from tessera.quantizers import ProductQuantizer
from tessera.quantizers.codebooks import Codebook

log = logging.getLogger(__name__)

# Counters of one training window; codebooks beyond (lookup-free ones of many bits) are left to the validation report
MAX_COUNTERS = 1 << 25


def reachable_codes(codebook_size: int, tokens: int) -> float:
    """Different codes that so many tokens hold on average if all codes are equally likely: K (1 - (1 - 1/K)^T)."""
    if codebook_size == 1:
        return min(1.0, float(tokens))
    return -codebook_size * math.expm1(tokens * math.log1p(-1 / codebook_size))


class CollapseWatch:
    """Judges code counts and warns, at most now and then.

    A codebook has collapsed if it uses fewer codes than `min_usage` times those reachable with as many tokens, if its
    perplexity is below `min_perplexity` times them, or if a single code has nearly all tokens. The first finding of a
    branch or scale is a warning, then every `repeat_every`-th; a recovery is said once.

    Args:
        min_usage: share in [0, 1].
        min_perplexity: share in [0, 1].
        repeat_every: findings between two warnings, at least 1.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, min_usage: float = 0.05, min_perplexity: float = 0.01, repeat_every: int = 10):
        for name, value in (("min_usage", min_usage), ("min_perplexity", min_perplexity)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}={value} is outside [0, 1]; it is a share of the codes that can be reached")
        if repeat_every < 1:
            raise ConfigError(f"repeat_every={repeat_every} must be at least 1")
        self.min_usage, self.min_perplexity, self.repeat_every = min_usage, min_perplexity, repeat_every
        self.found: dict[str, int] = {}

    def judge(self, counts: Tensor) -> str | None:
        """What is wrong with the counts (K,) of one codebook; None if it is in use."""
        size, tokens, used = len(counts), int(counts.sum()), int((counts > 0).sum())
        reachable, measured = reachable_codes(size, tokens), float(perplexity(counts))
        alone = reachable >= 1.5 and measured < 1.05
        if used >= self.min_usage * reachable and measured >= self.min_perplexity * reachable and not alone:
            return None
        return (
            f"{used} of {size} codes in use, perplexity {measured:.3g}, where {tokens} tokens could reach about "
            f"{reachable:.0f} codes"
        )

    def check(self, counts: Tensor, quantizer: ProductQuantizer, during: str) -> list[str]:
        """Log what collapsed.

        Args:
            counts: (P, S, K) int64 over all processes, on the CPU.
            quantizer: that gave the tokens.
            during: what the counts are of, e.g. "validation".

        Returns:
            The branches and scales found collapsed, warned about or not.
        """
        collapsed = []
        for branch, per_scale in enumerate(counts):
            codebooks = quantizer.branches[branch].codebooks
            rows = {f"branch {branch}": (per_scale.sum(0), codebooks[0])} if len(codebooks) == 1 else {}
            if len(per_scale) > 1:
                owners = list(codebooks) * (len(per_scale) if len(codebooks) == 1 else 1)
                rows |= {
                    f"branch {branch}, scale {scale}": pair
                    for scale, pair in enumerate(zip(per_scale, owners, strict=True))
                }
            for name, (row, codebook) in rows.items():
                finding = self.judge(row)
                if finding is None:
                    if self.found.pop(name, 0):
                        log.info("the codebook of %s is in use again (%s)", name, during)
                    continue
                collapsed.append(name)
                self.found[name] = self.found.get(name, 0) + 1
                if self.found[name] % self.repeat_every == 1 or self.repeat_every == 1:
                    log.warning(
                        "codebook collapse in %s (%s): %s. What helps: %s",
                        name, during, finding, "; ".join(remedies(codebook)),
                    )  # fmt: skip
        return collapsed


def remedies(codebook: Codebook) -> list[str]:
    """What to change, by config key, the most promising first."""
    prefix, advice = "quantizer.branch.codebook", []
    if getattr(codebook, "max_latent_rms", 0) is None:
        advice.append(f"{prefix}.max_latent_rms={3 / codebook.dim**0.5:.2g} keeps gradients to the encoder alive")
    if getattr(codebook, "use_entropy", True) is False:
        advice.append(f"{prefix}.use_entropy=true adds a pull to unused codes")
    elif hasattr(codebook, "use_entropy") or getattr(codebook, "entropy", "none") != "none":
        advice.append("raise stage.loss_weights.entropy_batch, which spreads the codes")
    if getattr(codebook, "revival", 0) is None:
        advice.append(f"{prefix}.revival moves dead codes to where latents are")
    if getattr(codebook, "l2_normalize", True) is False:
        advice.append(f"{prefix}.l2_normalize=true compares directions only")
    if any(parameter.requires_grad for parameter in codebook.parameters()):
        advice.append("raise stage.loss_weights.codebook or lower optimizer.lr")
        advice.append(f"a smaller quantizer.dim or {prefix}.codebook_size is easier to fill")
    else:
        advice.append("lower optimizer.lr")
    return advice


class CodebookCollapse(Callback):
    """Counts the codes of training batches and warns while training runs when a codebook collapses.

    Every `every_steps` optimizer steps the counts since the last check are judged (see `CollapseWatch`) and start anew.
    Between checks nothing is read back from the device.

    Args:
        every_steps: optimizer steps per check, at least 1.
        min_usage, min_perplexity, repeat_every: see `CollapseWatch`.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        every_steps: int = 500,
        min_usage: float = 0.05,
        min_perplexity: float = 0.01,
        repeat_every: int = 10,
    ):
        if every_steps < 1:
            raise ConfigError(f"every_steps={every_steps} must be at least 1")
        self.every_steps = every_steps
        self.watch = CollapseWatch(min_usage, min_perplexity, repeat_every)
        self.collapsed: list[str] = []
        self.counts: Tensor | None = None
        self.offsets: Tensor | None = None
        self.checked_step = 0
        self._hook: Any = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        quantizer = getattr(getattr(pl_module, "tokenizer", None), "quantizer", None)
        if quantizer is None:
            raise ConfigError(
                "CodebookCollapse needs a stage that trains a tokenizer; remove codebook_collapse from `callbacks`"
            )
        scales, branches = len(quantizer.grids), quantizer.num_branches
        if branches * scales * quantizer.codebook_size > MAX_COUNTERS:
            log.info("codebooks of %d codes are too large to be watched in training", quantizer.codebook_size)
            return
        self.counts = torch.zeros(branches, scales, quantizer.codebook_size, dtype=torch.int64, device=pl_module.device)
        lengths = torch.tensor([height * width for height, width in quantizer.grids])
        scale = torch.repeat_interleave(torch.arange(scales), lengths)
        first = torch.arange(branches)[:, None] * scales + scale
        self.offsets = (first * quantizer.codebook_size).to(pl_module.device)
        self.checked_step = trainer.global_step
        self._hook = quantizer.register_forward_hook(self._count)

    @torch.no_grad()
    def _count(self, quantizer: nn.Module, inputs: Any, output: Any) -> None:
        if quantizer.training:
            flat = (output.tokens + self.offsets).flatten()
            self.counts.view(-1).scatter_add_(0, flat, torch.ones_like(flat))

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any, **__: Any
    ) -> None:
        if self.counts is None or trainer.global_step - self.checked_step < self.every_steps:
            return
        first, self.checked_step = self.checked_step, trainer.global_step
        counts = distributed.all_reduce_sum(self.counts).cpu()
        self.counts.zero_()
        if distributed.rank() == 0:
            during = f"training, steps {first + 1} to {trainer.global_step}"
            self.collapsed = self.watch.check(counts, pl_module.tokenizer.quantizer, during)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.counts = self.offsets = None
