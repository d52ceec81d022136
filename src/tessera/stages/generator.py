"""Generator training on a tokenizer's tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from tessera.frozen import Unregistered
from tessera.generators.base import Generator
from tessera.generators.sampling import SamplingConfig
from tessera.optim import decay_groups, decayed_names
from tessera.rng import IndexedRng
from tessera.stages.base import OptimizerFactory, SchedulerFactory, Stage, check_tokens
from tessera.stages.sharding import gather, is_sharded, scatter, shard
from tessera.stages.token_logs import TokenScores
from tessera.tokenizers import Tokenizer


class GeneratorTraining(Stage):
    """Trains a class-conditional generator on cached tokens.

    The tokenizer is frozen, decodes samples for figures and pictures, and is not part of the checkpoint.

    Besides the loss and the accuracy of each batch, logs hold both by branch, scale and part of the image
    (`TokenScores`): of training, over the batches since the last log; of validation, over all its images.

    Args:
        generator: what is trained.
        tokenizer: made the tokens.
        optimizer: factory, called with parameter groups; its `weight_decay` applies to the groups `decay_rule` says.
        scheduler: factory, called with (optimizer, steps).
        sampling: how samples are drawn for figures and pictures; None: plain sampling.
        decay_rule: explicit, public, var, matrix or all (`tessera.optim.decayed_names`).
        compile: compile the generator's blocks, each in place, so that state-dict keys stay.
        gradient_clip, accumulate_grad_batches, seed: see `Stage`.

    Raises:
        CheckpointError: a generator of other token shapes than the tokenizer's.
        ConfigError: sampling settings that the generator can't follow; an unknown decay rule.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        sampling: SamplingConfig | None = None,
        decay_rule: str = "explicit",
        compile: bool = False,
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
        decayed_names(generator, decay_rule)  # refuses an unknown rule
        self.compile_blocks = compile
        self._train_scores, self._val_scores = (TokenScores(tokenizer.quantizer) for _ in range(2))

    @property
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer, on this module's device."""
        return self._tokenizer.get(self.device)

    def averaged_modules(self) -> dict[str, nn.Module]:
        return {"generator": self.generator}

    def configure_model(self) -> None:
        if is_sharded(self.trainer):
            self.shard()

    def shard(self) -> None:
        """Spread the generator's weights over the devices; `trainer=fsdp` asks for it."""
        shard(self.generator, self.generator.blocks, self.device_mesh["data_parallel"], ("loss",))

    def on_validation_start(self) -> None:
        # sampling runs parts of blocks, and devices may have different numbers of samples
        if is_sharded(self.trainer):
            gather(self.generator)

    def on_validation_end(self) -> None:
        if is_sharded(self.trainer):
            scatter(self.generator)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory(self.generator.parameters())
        decay = optimizer.defaults.get("weight_decay", 0.0)
        optimizer = self.optimizer_factory(decay_groups(self.generator, decay, self.decay_rule))
        return [optimizer], [self.scheduler_factory(optimizer, self.total_steps)]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.compile_blocks:
            for block in self.generator.blocks:
                block.compile()

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
        self._train_scores.add(losses)
        if self.trainer._logger_connector.should_update_logs:
            means = self._train_scores.means()
            self.log_dict({f"train/{name}": value for name, value in means.items() if "/" in name})
        self.backward_and_step(losses["loss"], 0, step)

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Tensor]:
        """Loss of the validation images' tokens, as at the end of training (raster order) and with their labels."""
        with torch.autocast(self.device.type, enabled=False):  # float32, as the training tokens were made
            tokens = self.tokenizer.tokenize(batch["image"])
        losses = self.generator.loss(tokens, batch["label"], progress=1.0)
        self.log("val/loss/total", losses["loss"], batch_size=len(tokens), sync_dist=True, on_epoch=True)
        self._val_scores.add(losses)
        return {"tokens": tokens}

    def on_validation_epoch_end(self) -> None:
        means = self._val_scores.means(over_processes=True)
        self.log_dict({f"val/{name}": value for name, value in means.items()}, sync_dist=True)

    def generate_tokens(self, labels: Tensor, index: Tensor) -> Tensor:
        """Tokens (B, P, L) of samples number `index` (B,) with class `labels` (B,); a function of (seed, number)."""
        return self.generator.generate(labels, self.sampling, rng=IndexedRng(self.seed, index))
