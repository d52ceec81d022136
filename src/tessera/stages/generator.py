"""Generator training on a tokenizer's tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from tessera.frozen import Unregistered
from tessera.generators.base import Generator
from tessera.generators.sampling import SamplingConfig
from tessera.optim import decay_groups
from tessera.rng import IndexedRng
from tessera.stages.base import OptimizerFactory, SchedulerFactory, Stage, check_tokens
from tessera.tokenizers import Tokenizer


class GeneratorTraining(Stage):
    """Trains a class-conditional generator on cached tokens.

    The tokenizer is frozen, decodes samples for figures and pictures, and is not part of the checkpoint.

    Args:
        generator: what is trained.
        tokenizer: made the tokens.
        optimizer: factory, called with parameter groups; its `weight_decay` applies to the groups `decay_rule` says.
        scheduler: factory, called with (optimizer, steps).
        sampling: how samples are drawn for figures and pictures; None: plain sampling.
        decay_rule: explicit, public or all (`tessera.optim.decayed_names`).
        gradient_clip, accumulate_grad_batches, seed: see `Stage`.

    Raises:
        CheckpointError: a generator of other token shapes than the tokenizer's.
        ConfigError: sampling settings that the generator can't follow.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        sampling: SamplingConfig | None = None,
        decay_rule: str = "explicit",
        gradient_clip: float | None = 1.0,
        accumulate_grad_batches: int = 1,
        seed: int = 0,
    ):
        super().__init__(gradient_clip, accumulate_grad_batches, seed)
        generator.bind(tokenizer.quantizer)
        self.generator = generator
        self._tokenizer = Unregistered(tokenizer)
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.sampling, self.decay_rule = sampling or generator.sampling_types[0](), decay_rule
        generator.check_sampling(self.sampling)

    @property
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer, on this module's device."""
        return self._tokenizer.get(self.device)

    def averaged_modules(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory(self.generator.parameters())
        decay = optimizer.defaults.get("weight_decay", 0.0)
        optimizer = self.optimizer_factory(decay_groups(self.generator, decay, self.decay_rule))
        return [optimizer], [self.scheduler_factory(optimizer, self.total_steps)]

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if self.trainer.training:
            check_tokens(batch, self._tokenizer.module.quantizer)
            self.generator.check_labels(batch["label"])
        return batch

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        losses = self.generator.loss(
            batch["tokens"], batch["label"], progress=self.progress, rng=self.sample_rng(batch)
        )
        step = self.open_window()
        self.log_rates(["generator"])
        self.log_losses({"total": losses["loss"]})
        self.log("train/accuracy", losses["accuracy"])
        self.backward_and_step(losses["loss"], 0, step)

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Tensor]:
        """Loss of the validation images' tokens in the final (raster) order."""
        with torch.autocast(self.device.type, enabled=False):  # float32, as the training tokens were made
            tokens = self.tokenizer.tokenize(batch["image"])
        losses = self.generator.loss(tokens, batch["label"], progress=1.0)
        logged = {"val/loss/total": losses["loss"], "val/accuracy": losses["accuracy"]}
        self.log_dict(logged, batch_size=len(tokens), sync_dist=True, on_epoch=True)
        return {"tokens": tokens}

    def generate_tokens(self, labels: Tensor, index: Tensor) -> Tensor:
        """Tokens (B, P, L) of samples number `index` (B,) with class `labels` (B,); a function of (seed, number)."""
        return self.generator.generate(labels, self.sampling, rng=IndexedRng(self.seed, index))
