"""What all trainings share: manual optimisation with honest step counts, schedules, clipping, logging."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

import lightning
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tessera.errors import ConfigError, DataError
from tessera.quantizers.product import ProductQuantizer
from tessera.rng import IndexedRng
from tessera.stages.finite import LossCheck, check_weights
from tessera.stages.sharding import SHARDED, check_strategy, is_sharded

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


def _nothing() -> None:
    pass


class Stage(lightning.LightningModule):
    """Base of the trainings.

    One training step counts as one global step, whatever the number of optimizers; with gradient accumulation, one
    window of batches does. Windows may span epochs; one that the end of training leaves open is dropped. A checkpoint
    written inside a window holds its gradients, so that resuming is exact there, too.

    Args:
        gradient_clip: maximal gradient norm per optimizer; None: off.
        accumulate_grad_batches: batches per optimizer step.
        seed: of the draws that belong to samples.
        loss_limit: absolute value of a loss above which training stops.

    Raises:
        ConfigError: values out of range.
    """

    def __init__(self, gradient_clip: float | None, accumulate_grad_batches: int, seed: int, loss_limit: float = 1e8):
        super().__init__()
        self.automatic_optimization = False
        if gradient_clip is not None and gradient_clip <= 0:
            raise ConfigError(f"stage.gradient_clip={gradient_clip} must be positive, or null to switch clipping off")
        if accumulate_grad_batches < 1:
            raise ConfigError(f"stage.accumulate_grad_batches={accumulate_grad_batches} must be at least 1")
        self.gradient_clip, self.accumulate_grad_batches, self.seed = gradient_clip, accumulate_grad_batches, seed
        self.window = 0  # batches of the open accumulation window
        self._resumed_gradients: dict[str, Tensor] = {}
        self._check_losses = LossCheck(loss_limit)

    @property
    def total_steps(self) -> int:
        """Global steps of the whole training.

        Raises:
            ConfigError: neither trainer.max_steps nor trainer.max_epochs says where it ends.
        """
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        batches = self.trainer.estimated_stepping_batches
        if batches == float("inf"):
            raise ConfigError("trainer.max_steps is not set; the schedules need to know where training ends")
        return max(1, int(batches) // self.accumulate_grad_batches - self.uncounted_steps())

    def uncounted_steps(self) -> int:
        """Steps of this training that don't count as global ones."""
        return 0

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(self.trainer.global_step / self.total_steps, 1.0)

    def sample_rng(self, batch: dict[str, Tensor]) -> IndexedRng:
        """Draws of this step's samples: the same for any batch size and number of processes."""
        return IndexedRng(self.seed, batch["index"], step=self.trainer.global_step)

    def averaged_modules(self) -> dict[str, nn.Module]:
        """The modules that the EMA callback averages, by their name in this module."""
        raise NotImplementedError

    def all_optimizers(self) -> list[LightningOptimizer]:
        """The optimizers; all but the first are kept from counting as global steps.

        Lightning counts every optimizer's steps (Lightning-AI/pytorch-lightning#17958) through hooks that its loop
        installs anew for each batch.
        """
        found = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        for optimizer in optimizers[1:]:
            optimizer._on_before_step = optimizer._on_after_step = _nothing
        return optimizers

    def all_schedulers(self) -> list[LRScheduler]:
        """The learning-rate schedulers, in the optimizers' order."""
        found = self.lr_schedulers()
        return found if isinstance(found, list) else [found] if found is not None else []

    def open_window(self) -> bool:
        """Count a batch; whether it completes an accumulation window, so that the optimizers step."""
        if self.accumulate_grad_batches == 1:
            return True
        self.window = (self.window + 1) % self.accumulate_grad_batches
        return self.window == 0

    @property
    def scaler(self) -> Any:
        """The GradScaler of a float16 training; None in other precisions."""
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def loss_scale(self) -> Tensor | float:
        """What the GradScaler multiplies losses with at the moment (a scalar on the device); 1 without one."""
        return 1.0 if self.scaler is None else self.scaler.scale(torch.ones((), device=self.device))

    def backward_and_step(self, loss: Tensor, number: int, step: bool) -> None:
        """Backward pass of `loss` and, where `step`, an update by optimizer and scheduler `number`."""
        optimizers = self.all_optimizers()
        self.manual_backward(loss / self.accumulate_grad_batches)
        self._check_losses(self.trainer)
        if not step:
            return
        scale = self.loss_scale()
        optimizers[number].step()
        optimizers[number].zero_grad()
        self.all_schedulers()[number].step()
        if self.scaler is not None:
            # the step may have changed the scale that gradients waiting for another optimizer were made with
            others = [optimizer for other, optimizer in enumerate(optimizers) if other != number]
            waiting = [p.grad for optimizer in others for p in parameters_of(optimizer) if p.grad is not None]
            if waiting:
                torch._foreach_mul_(waiting, self.loss_scale() / scale)

    def on_fit_start(self) -> None:
        if self.scaler is None or self.gradient_clip is None:
            return
        if any(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in self.trainer.optimizers):
            raise ConfigError(
                "a fused optimizer unscales float16 gradients inside its step, after they would be clipped; set "
                "optimizer.fused=false, stage.gradient_clip=null or trainer.precision=bf16-mixed"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_weights(self.named_parameters(), self.trainer)
        gradients = {name: p.grad for name, p in self.named_parameters() if p.grad is not None} if self.window else {}
        checkpoint["accumulation"] = {"batches": self.window, "gradients": gradients}
        checkpoint[SHARDED] = is_sharded(self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        found = checkpoint.get("accumulation", {"batches": 0, "gradients": {}})
        if found["batches"] >= self.accumulate_grad_batches:
            raise ConfigError(
                f"stage.accumulate_grad_batches={self.accumulate_grad_batches} is less than the {found['batches']} "
                "batches that the checkpoint has accumulated; restore the former value"
            )
        check_strategy(checkpoint, is_sharded(self.trainer))
        self.window, self._resumed_gradients = found["batches"], found["gradients"]

    def on_train_start(self) -> None:
        parameters = dict(self.named_parameters())
        for name, gradient in self._resumed_gradients.items():
            parameters[name].grad = gradient.to(parameters[name].device)
        self._resumed_gradients = {}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip: Lightning calls this after a GradScaler has unscaled the gradients, also in manual optimisation."""
        if self.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), self.gradient_clip)

    def log_losses(self, losses: dict[str, Tensor], prefix: str = "train/loss") -> None:
        """Log named scalars, and have them checked: the next `backward_and_step` raises `DivergedError` where one
        isn't finite or has exploded."""
        self._check_losses.add([f"{prefix}/{name}" for name in losses], losses.values())
        self.log_dict({f"{prefix}/{name}": value.detach() for name, value in losses.items()})

    def log_rates(self, names: list[str]) -> None:
        """Log the learning rates as train/lr/<name>."""
        for name, optimizer in zip(names, self.all_optimizers(), strict=False):
            self.log(f"train/lr/{name}", optimizer.param_groups[0]["lr"])


def parameters_of(optimizer: Optimizer | LightningOptimizer) -> list[nn.Parameter]:
    """All parameters of an optimizer."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def check_tokens(batch: dict[str, Tensor], quantizer: ProductQuantizer) -> None:
    """Refuse a batch whose tokens are not the quantizer's; on the CPU, where reading them costs no synchronisation.

    Raises:
        DataError: no tokens, tokens of another shape or outside of the codebook.
    """
    if "tokens" not in batch:
        raise DataError(f"the batch holds {', '.join(batch)} but no tokens; set data.serve=tokens (or pairs)")
    tokens, expected = batch["tokens"], (quantizer.num_branches, quantizer.num_tokens)
    if tuple(tokens.shape[1:]) != expected:
        raise DataError(
            f"data.token_cache holds tokens of shape {tuple(tokens.shape[1:])} per image, but the tokenizer makes "
            f"{expected} (branches, tokens); build the cache with this tokenizer"
        )
    if tokens.device.type == "cpu" and tokens.numel():
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= quantizer.codebook_size:
            raise DataError(
                f"data.token_cache holds token {low if low < 0 else high}, outside [0, {quantizer.codebook_size}), the "
                "tokenizer's codebook; build the cache with this tokenizer"
            )


def merged_weights(defaults: dict[str, float], given: dict[str, float] | None) -> dict[str, float]:
    """Loss weights with the given ones replaced.

    Raises:
        ConfigError: an unknown name (the nearest known one is suggested) or a negative weight.
    """
    for name, value in (given or {}).items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(defaults)}"
            raise ConfigError(f"stage.loss_weights.{name} is unknown; {hint}")
        if value < 0:
            raise ConfigError(f"stage.loss_weights.{name}={value} must not be negative")
    return {**defaults, **(given or {})}
