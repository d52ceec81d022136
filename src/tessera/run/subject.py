"""What a task of eval.py works on: the checkpoint's models, the data and a trainer, each made when it is asked for."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import lightning
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from tessera.data import ImageDataModule
from tessera.errors import ConfigError
from tessera.run.build import build_trainer, make, read_checkpoint
from tessera.run.load import (
    check_classes,
    check_token_space,
    is_published,
    load_generator,
    load_tokenizer,
    published_entry,
)
from tessera.stages.evaluation import Evaluation
from tessera.tokenizers import Tokenizer
from tessera.zoo.export import is_exported_generator


class Subject:
    """The parts of an evaluation.

    Args:
        cfg: composed from conf/eval.yaml, and completed by `adopt_training_config`.
        run: the run folder.
    """

    def __init__(self, cfg: DictConfig, run: Path):
        self.cfg, self.run = cfg, run

    @property
    def task(self) -> str:
        """Name of the task, for messages."""
        if HydraConfig.initialized():
            return f"task={HydraConfig.get().runtime.choices.task}"
        return str(self.cfg.task._target_).rpartition(".")[2]

    @property
    def ckpt(self) -> str:
        """The checkpoint's path.

        Raises:
            ConfigError: none is given.
        """
        if self.cfg.ckpt is None:
            raise ConfigError("ckpt is required; set ckpt=..., or zoo=... for a published checkpoint")
        return str(self.cfg.ckpt)

    @cached_property
    def holds_generator(self) -> bool:
        """Whether the checkpoint is a generator's."""
        if is_published(self.ckpt):
            return published_entry(self.ckpt).kind == "generator"
        if Path(self.ckpt).is_dir():
            return is_exported_generator(self.ckpt)
        return "generator" in read_checkpoint(self.ckpt)["tessera"]["architecture"]

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            ConfigError: it is a generator's checkpoint.
        """
        if self.holds_generator:
            raise ConfigError(f"{self.task} needs a tokenizer's checkpoint; ckpt={self.ckpt} is a generator's")
        return load_tokenizer(self.ckpt, self.cfg.weights)

    def decoder(self) -> Tokenizer:
        """The tokenizer that decodes saved tokens: the checkpoint's, or `tokenizer_ckpt` where that is a generator's.

        Raises:
            ConfigError: neither is given.
        """
        if self.cfg.ckpt is not None and not self.holds_generator:
            return self.tokenizer()
        if self.cfg.tokenizer_ckpt is None:
            raise ConfigError(f"{self.task} needs a tokenizer to decode with; set ckpt=... or tokenizer_ckpt=...")
        return load_tokenizer(self.cfg.tokenizer_ckpt)

    def generation(self) -> Evaluation:
        """The checkpoint's generator, with a tokenizer of the same token space to decode.

        Raises:
            ConfigError: it is a tokenizer's checkpoint; sampling settings that the generator can't follow.
            CheckpointError: the tokenizer makes other tokens.
        """
        if not self.holds_generator:
            raise ConfigError(f"{self.task} needs a generator's checkpoint; ckpt={self.ckpt} is a tokenizer's")
        generator = load_generator(self.ckpt, self.cfg.weights)
        if self.cfg.compile_sampling:
            generator.compile_sampling()
        if self.cfg.tokenizer_ckpt is None:
            raise ConfigError("tokenizer_ckpt is required; set tokenizer_ckpt=...")
        tokenizer = load_tokenizer(self.cfg.tokenizer_ckpt)
        check_token_space(generator, tokenizer, self.cfg.tokenizer_ckpt)
        sampling = make(self.cfg.get("sampling")) or getattr(generator, "sampling", None)  # an export has its own
        return Evaluation(tokenizer, generator, sampling, seed=self.cfg.seed)

    def models(self) -> Evaluation:
        """Whatever the checkpoint holds: a tokenizer alone, or a generator with its tokenizer.

        Raises:
            ConfigError: the data have another number of classes than the generator.
        """
        if not self.holds_generator:
            return Evaluation(self.tokenizer(), seed=self.cfg.seed)
        models = self.generation()
        check_classes(models.generator, self.data().images("val"))
        return models

    def require(self, *keys: str) -> None:
        """Refuse that the configuration and the checkpoint both leave one of these groups open.

        Raises:
            ConfigError: names those that are missing.
        """
        if missing := [f"{key}=..." for key in keys if self.cfg.get(key) is None]:
            needs = f"{self.task} needs {' and '.join(missing)}"
            if self.cfg.ckpt is None:
                raise ConfigError(f"{needs}; or set ckpt=... (or zoo=...), which says what is meant")
            raise ConfigError(
                f"ckpt={self.cfg.ckpt} is an exported model, which doesn't say what it was trained on; {needs}"
            )

    def data(self) -> ImageDataModule:
        """The data module, serving images."""
        self.require("data")
        return make(self.cfg.data)(serve="images")

    def trainer(self, callbacks: Sequence[Callback] = ()) -> lightning.Trainer:
        """The trainer, which starts the processes."""
        return build_trainer(self.cfg, list(callbacks))


class Task(Protocol):
    """What `conf/task/<name>.yaml` names by its `_target_`."""

    def run(self, subject: Subject) -> dict[str, Any]:
        """Do it; all processes call.

        Returns:
            What results.json holds besides the facts of every evaluation. `figures`: a list of
            `tessera.metrics.protocol.Figure`; everything else of plain JSON types.
        """
        ...


def adopt_training_config(cfg: DictConfig) -> None:
    """Fill `data`, `metrics` and a generator's `sampling` and `tokenizer_ckpt`, where open, from the checkpoint.

    An exported folder doesn't say what it was trained on.
    """
    if cfg.ckpt is not None and not is_published(cfg.ckpt) and not Path(cfg.ckpt).is_dir():
        trained = read_checkpoint(cfg.ckpt)["tessera"]["config"]
        for key in ("data", "metrics", "sampling"):
            if cfg.get(key) is None and trained.get(key) is not None:
                # callbacks interpolate `metrics.lpips`, which older runs had not
                found = {"lpips": None, **trained[key]} if key == "metrics" else trained[key]
                OmegaConf.update(cfg, key, found, force_add=True)
        if cfg.tokenizer_ckpt is None and trained.get("generator") is not None:
            cfg.tokenizer_ckpt = trained["tokenizer"]["path"]
    if cfg.get("metrics") is None:
        cfg.callbacks = None  # they interpolate `metrics`
