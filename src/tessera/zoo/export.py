"""Models as two files for users: `model.safetensors` (weights) and `config.json` (how to build the model).

No optimizer and no training state; which weights (averaged or raw) is the caller's choice.
"""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tessera
from tessera.backbones.tuning import merge
from tessera.errors import CheckpointError, ConfigError, MissingFileError, TesseraError
from tessera.zoo.keys import key_problems, load_strictly

FORMAT = "tessera"
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def _defined_module(target: str) -> str:
    """Module that defines what a dotted name of ours stands for; "" if that isn't ours or nothing."""
    if not target.startswith("tessera."):
        return ""
    *path, name = target.split(".")
    try:
        found = getattr(importlib.import_module(".".join(path)), name)
    except (ImportError, AttributeError):
        return ""
    return getattr(found, "__module__", "")


def _refuse_foreign_targets(node: Any, source: str) -> None:
    """A config.json may come from anywhere, and `_target_` calls what it names: only our own may be named.

    The object's own module is asked, as the dotted name alone would reach any library that ours imports.
    """
    if isinstance(node, Mapping):
        if "_target_" in node:
            target = str(node["_target_"])
            if not _defined_module(target).startswith("tessera."):
                raise CheckpointError(f"{source} names _target_={target!r}, no part of tessera; refused")
        for value in node.values():
            _refuse_foreign_targets(value, source)
    elif isinstance(node, list | tuple):
        for value in node:
            _refuse_foreign_targets(value, source)


def given_weights(node: Any) -> Any:
    """A `_target_` tree for weights that are given: with nothing pretrained to fetch first."""
    if isinstance(node, Mapping):
        changed = {"pretrained": False, "weights": None} if "pretrained" in node else {}
        return {key: changed[key] if key in changed else given_weights(item) for key, item in node.items()}
    return [given_weights(item) for item in node] if isinstance(node, list | tuple) else node


def plain_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """As `given_weights`, and without adapters: these belong to a training; `export` folds them into the weights."""
    tunings = {"encoder_tuning": "full", "decoder_tuning": "full"}
    return given_weights({key: tunings.get(key, item) for key, item in config.items()})


def build(config: Mapping[str, Any], source: str) -> nn.Module:
    """Instantiate the `_target_` tree of one model, which may name parts of tessera only.

    Returns:
        The model, whose `architecture` is the tree, so that it can be exported.

    Raises:
        CheckpointError: a foreign `_target_`.
        ConfigError: no `_target_`, or values that its parts refuse.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    _refuse_foreign_targets(config, source)
    if "_target_" not in config:
        raise ConfigError(f"{source} has no _target_; it is not the config of one model")
    try:
        model = hydra.utils.instantiate(dict(config), _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, TesseraError):
            raise error.__cause__ from None
        raise
    model.architecture = config
    return model


def export(model: nn.Module, folder: str | Path, config: Mapping[str, Any] | None = None) -> Path:
    """Write a model to a folder that `from_pretrained` reads; existing files of that name are replaced.

    Low-rank adapters are folded into the weights they adapt, so that the model loads as a plain one.

    Args:
        model: tokenizer or generator.
        folder: created where needed.
        config: resolved `_target_` tree (plain dicts, lists, numbers, strings) that builds the model; None:
            the model's `architecture`, which training, `from_pretrained` and `from_public` set.

    Returns:
        The folder.

    Raises:
        ConfigError: no config, or one that builds a model of other weights.
    """
    config = getattr(model, "architecture", None) if config is None else config
    if config is None:
        raise ConfigError("export needs config, the resolved tree that builds the model")
    config, model = plain_architecture(config), merge(model)
    with torch.device("meta"):
        twin = build(config, "config")
    state = model.state_dict()
    problems = key_problems(twin.state_dict(), state)
    if problems:
        raise ConfigError(f"config builds another model than the one to export: {'; '.join(problems[:12])}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # clone: safetensors refuses tensors that share memory
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, folder / _WEIGHTS)
    description: dict[str, Any] = {"format": FORMAT, "version": tessera.__version__, "config": config}
    if hasattr(model, "fingerprint"):
        description["fingerprint"] = model.fingerprint()
    (folder / _CONFIG).write_text(json.dumps(description, indent=2) + "\n")
    return folder


def from_pretrained(folder: str | Path) -> nn.Module:
    """The model that `export` wrote, in eval mode on the CPU.

    Raises:
        MissingFileError: a file is missing.
        CheckpointError: not an export of Tessera; weights that do not fit; damaged weights; foreign
            `_target_`.
    """
    folder = Path(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise MissingFileError(f"{folder / name} does not exist; give a folder written by tessera.zoo.export")
    try:
        description = json.loads((folder / _CONFIG).read_text())
    except ValueError as error:
        raise CheckpointError(f"{folder / _CONFIG} is not valid JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(f"{folder / _CONFIG} was not written by tessera.zoo.export")
    model = build(description["config"], str(folder / _CONFIG))
    load_strictly(model, load_file(folder / _WEIGHTS), str(folder / _WEIGHTS))
    stored = description.get("fingerprint")
    if stored is not None and model.fingerprint() != stored:
        raise CheckpointError(
            f"{folder} has tokens of fingerprint {model.fingerprint()}, but was exported as {stored}; "
            "the weights or config.json were changed afterwards"
        )
    return model.eval()
