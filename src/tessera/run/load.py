"""Models from checkpoints: `_target_`s of tokenizer/pretrained and generator/pretrained."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from tessera.backbones.tuning import LoRA, merge, tune
from tessera.callbacks.ema import ema_weights
from tessera.data import ImageDataset
from tessera.errors import CheckpointError, ConfigError
from tessera.generators.base import Generator
from tessera.run.build import make, read_checkpoint
from tessera.tokenizers import Tokenizer
from tessera.zoo.export import from_pretrained, given_weights
from tessera.zoo.keys import load_strictly
from tessera.zoo.loading import load
from tessera.zoo.registry import Checkpoint, info

log = logging.getLogger(__name__)

WEIGHTS = ("ema", "raw")
ZOO = "zoo:"  # begins the path of a published checkpoint: zoo:<name>, or zoo:<name>@<its file>


def _module(checkpoint: dict[str, Any], name: str, weights: str, path: str | Path) -> nn.Module:
    """Build `name` (tokenizer or generator) as the checkpoint describes it and load its weights."""
    if weights not in WEIGHTS:
        raise ConfigError(f"{name}.weights={weights!r} is unknown; choose one of {', '.join(WEIGHTS)}")
    architecture = checkpoint["tessera"]["architecture"].get(name)
    prefix = f"{name}."
    state = {key[len(prefix) :]: value for key, value in checkpoint["state_dict"].items() if key.startswith(prefix)}
    if architecture is None or not state:
        raise CheckpointError(
            f"{path} holds no {name}, as it was written by {checkpoint['tessera'].get('stage')}; give the checkpoint "
            f"of a {name}'s training"
        )
    if weights == "ema":
        averaged = ema_weights(checkpoint)
        if averaged is None:
            log.info("%s has no averaged weights; using the raw ones", path)
        for part, values in (averaged or {}).items():
            state.update({f"{part}.{key}".removeprefix(prefix): value for key, value in values.items()})
    module = make(given_weights(architecture))
    load_strictly(module, state, str(path))
    module.architecture = architecture
    return module.eval()


def load_tokenizer(
    path: str,
    weights: str = "ema",
    encoder_tuning: str | LoRA | None = None,
    decoder_tuning: str | LoRA | None = None,
) -> nn.Module:
    """The tokenizer of a main-training or post-training checkpoint, or an exported or published one, in eval mode.

    Args:
        path: a .ckpt file, a folder written by `tessera.zoo.export`, or a published checkpoint: `zoo:` and one of
            `tessera.zoo.names()`, with `@` and its file where it isn't to be fetched from the hub.
        weights: "ema" (averaged where the checkpoint has them) or "raw".
        encoder_tuning, decoder_tuning: for fine-tuning, what of them trains from here on: full, lora or frozen, or a
            `LoRA`. Adapters they have already are folded into the weights first. None: as it was.

    Raises:
        MissingFileError, CheckpointError: no such file; not a tokenizer; another architecture.
        ConfigError: adapters for a backbone that can't have them.
    """
    if is_published(path) or Path(path).is_dir():
        tokenizer = _published(path) if is_published(path) else from_pretrained(path)
        if not isinstance(tokenizer, Tokenizer):
            raise CheckpointError(f"{path} holds a {type(tokenizer).__name__}, no tokenizer")
    else:
        tokenizer = _module(read_checkpoint(path), "tokenizer", weights, path)
    for part, mode in (("encoder", encoder_tuning), ("decoder", decoder_tuning)):
        if mode is not None:
            backbone = merge(getattr(tokenizer, part)).requires_grad_(True)
            tune(backbone, mode, f"tokenizer.{part}_tuning")
            setattr(tokenizer, part, backbone)
            node = {"_target_": "tessera.backbones.LoRA", **asdict(mode)} if isinstance(mode, LoRA) else mode
            tokenizer.architecture = {**tokenizer.architecture, f"{part}_tuning": node}
    return tokenizer.eval()


def is_published(path: str | Path) -> bool:
    """Whether a path names a checkpoint of the zoo."""
    return str(path).startswith(ZOO)


def published_entry(path: str) -> Checkpoint:
    """What the zoo knows of the checkpoint that a path names."""
    return info(path.removeprefix(ZOO).partition("@")[0])


def _published(path: str) -> nn.Module:
    name, _, file = path.removeprefix(ZOO).partition("@")
    return load(name, file or None)


def load_generator(path: str, weights: str = "raw") -> nn.Module:
    """The generator of a generator-training checkpoint, or an exported or published one, in eval mode.

    Arguments and errors are those of `load_tokenizer`.
    """
    if is_published(path) or Path(path).is_dir():
        generator = _published(path) if is_published(path) else from_pretrained(path)
        if not isinstance(generator, Generator):
            raise CheckpointError(f"{path} holds a {type(generator).__name__}, no generator")
        return generator
    checkpoint = read_checkpoint(path)
    generator = _module(checkpoint, "generator", weights, path)
    generator.tokenizer_fingerprint = checkpoint["tessera"]["tokenizer_fingerprint"]
    return generator


def load_discriminator(stage: nn.Module, path: str) -> bool:
    """Start `stage.discriminator` and its LeCam means from a main-training checkpoint that has the same discriminator.

    Returns:
        Whether there was one; a stage without a discriminator, an exported tokenizer, or another architecture has none.
    """
    if stage.discriminator is None or is_published(path) or Path(path).is_dir():
        return False
    state = read_checkpoint(path)["state_dict"]
    parts = {name: getattr(stage, name) for name in ("discriminator", "lecam")}
    found = {name: {k: state.get(f"{name}.{k}") for k in part.state_dict()} for name, part in parts.items()}
    for name, part in parts.items():
        if any(found[name][k] is None or found[name][k].shape != v.shape for k, v in part.state_dict().items()):
            log.info("%s holds no %s of this architecture; it starts from its initial weights", path, name)
            return False
    for name, part in parts.items():
        part.load_state_dict(found[name])
    log.info("discriminator from %s", path)
    return True


def check_token_space(generator: nn.Module, tokenizer: nn.Module, path: str | Path) -> None:
    """Refuse a tokenizer whose tokens are not those the generator was trained on; else bind the generator to it."""
    expected = generator.tokenizer_fingerprint
    if expected is not None and expected != tokenizer.fingerprint():
        raise CheckpointError(
            f"the generator was trained on the tokens of tokenizer {expected}, but {path} is "
            f"{tokenizer.fingerprint()}; give the tokenizer it was trained with (or one post-trained from it)"
        )
    generator.bind(tokenizer.quantizer)


def check_classes(generator: nn.Module, images: ImageDataset) -> None:
    """Refuse a data set of another number of classes than the generator's: its labels would mean others."""
    if generator.num_classes != images.num_classes:
        raise ConfigError(
            f"the generator has {generator.num_classes} classes, but the data set {images.name} has "
            f"{images.num_classes}; set data=... to the one it was trained on"
        )
