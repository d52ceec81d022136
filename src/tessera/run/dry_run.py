"""Checks a chain of commands without running it: each composes, and each model builds and fits the one before it."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from tessera.errors import ConfigError
from tessera.run.build import make
from tessera.run.load import is_published, published_entry
from tessera.run.rows import LAST, Step, row, rows
from tessera.zoo import info

ADOPTED = ("data", "metrics", "sampling")  # by eval.py, from the checkpoint


class DryRun:
    """Takes the commands of a chain in order.

    Models are built on the meta device: nothing is read, downloaded or allocated.
    """

    def __init__(self) -> None:
        self.trained: dict[str, DictConfig] = {}
        self.tokenizers: dict[str, Any] = {}

    def __call__(self, step: Step) -> None:
        """Refuse what the command would refuse before it reads a file.

        Raises:
            ConfigError: unknown, missing or impossible values; a checkpoint that no command before makes.
            HydraException: what Hydra refuses.
        """
        made = {key: self._made(step, key) for key in ("ckpt", "tokenizer_ckpt", "tokenizer.path", "generator.path")}
        if step.script == "eval":
            self._check_evaluation(step, made["ckpt"])
            return
        config = step.composed()[0]
        with torch.device("meta"):
            self._build(step, config, made["tokenizer.path"])
        self.trained[config.name] = config

    def _made(self, step: Step, key: str) -> str | None:
        """The run of the chain that makes the checkpoint which `key` names."""
        match = LAST.search(step.value(key) or "")
        if match is None:
            return None
        if match["name"] not in self.trained:
            raise ConfigError(f"{key}={step.value(key)}: no command before makes this checkpoint")
        return match["name"]

    def _check_evaluation(self, step: Step, name: str | None) -> None:
        config = step.composed()[0].copy()
        for key in ADOPTED if name is not None else ():
            if config.get(key) is None:
                OmegaConf.update(config, key, self.trained[name].get(key), force_add=True)
        if config.get("zoo") is not None:
            info(config.zoo)
        make(config.task)

    def _build(self, step: Step, config: DictConfig, source: str | None) -> None:
        if "path" not in config.tokenizer:
            self.tokenizers[config.name] = make(config.tokenizer)
        elif source is not None:
            self.tokenizers[config.name] = self.tokenizers[source]
        elif not is_published(config.tokenizer.path):
            raise ConfigError(f"tokenizer.path={config.tokenizer.path}: no command before makes this tokenizer")
        elif (name := published_entry(config.tokenizer.path).name) in rows():  # the recipe says what it looks like
            self.tokenizers[config.name] = make(row(name).config.tokenizer)
        make(config.get("discriminator"))
        generator, tokenizer = config.get("generator"), self.tokenizers.get(config.name)
        if generator is not None and "path" not in generator and tokenizer is not None:
            factory = make(generator)
            factory(**factory.func.sizes(tokenizer.quantizer, config.data.dataset.get("num_classes")))
