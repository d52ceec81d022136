"""Models as files for users: `model.safetensors` (weights), `config.json` (how to build the model) and a model card.

No optimizer and no training state; which weights (averaged or raw) is the caller's choice.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import tessera
from tessera.backbones.tuning import merge
from tessera.errors import CheckpointError, ConfigError, MissingFileError, TesseraError
from tessera.generators.base import Generator
from tessera.zoo.card import CARD, CONFIG, WEIGHTS, ModelCard, card_text
from tessera.zoo.files import read_public
from tessera.zoo.hub import local_folder
from tessera.zoo.keys import key_problems, load_strictly

FORMAT = "tessera"


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


def instantiate(config: Mapping[str, Any], source: str) -> Any:
    """Call what a `_target_` tree names, which may be parts of tessera only.

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
        return hydra.utils.instantiate(dict(config), _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, TesseraError):
            raise error.__cause__ from None
        raise


def build(config: Mapping[str, Any], source: str) -> nn.Module:
    """The model of a `_target_` tree (`instantiate`), whose `architecture` is the tree, so that it can be exported."""
    model = instantiate(config, source)
    model.architecture = config
    return model


def export(
    model: nn.Module,
    folder: str | Path,
    config: Mapping[str, Any] | None = None,
    card: ModelCard | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model to a folder that `from_pretrained` reads; existing files of that name are replaced.

    Low-rank adapters are folded into the weights they adapt, so that the model loads as a plain one.

    Args:
        model: tokenizer or generator.
        folder: created where needed.
        config: resolved `_target_` tree (plain dicts, lists, numbers, strings) that builds the model; None:
            the model's `architecture`, which training, `from_pretrained` and `from_public` set.
        card: what the model card says besides the sizes; None: what the model was loaded with, else nothing.
        sampling: `_target_` node of a generator's settings; None: of its `sampling`, where it has one.

    Returns:
        The folder.

    Raises:
        ConfigError: no config, or one that builds a model of other weights; sampling settings that a generator can't
            follow, or for a tokenizer.
    """
    config = getattr(model, "architecture", None) if config is None else config
    if config is None:
        raise ConfigError("export needs config, the resolved tree that builds the model")
    description: dict[str, Any] = {"format": FORMAT, "version": tessera.__version__}
    if (settings := _sampling(model, sampling)) is not None:
        description["sampling"] = settings
    card = card or getattr(model, "card", None) or ModelCard()
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
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, folder / WEIGHTS)
    description |= {"config": config, "card": {key: value for key, value in asdict(card).items() if value}}
    if isinstance(model, Generator):
        if (made_for := getattr(model, "tokenizer_fingerprint", None)) is not None:
            description["tokenizer_fingerprint"] = made_for
    elif hasattr(model, "fingerprint"):
        description["fingerprint"] = model.fingerprint()
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
    (folder / CARD).write_text(card_text(model, card))
    (folder / WEIGHTS).chmod((folder / CARD).stat().st_mode)  # safetensors makes files for their owner alone
    return folder


def _sampling(model: nn.Module, node: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The `_target_` node of a generator's settings, checked against it."""
    if node is not None:
        if not isinstance(model, Generator):
            raise ConfigError(f"sampling belongs to a generator, but the model is a {type(model).__name__}")
        model.check_sampling(instantiate(node, "sampling"))
        return dict(node)
    settings = getattr(model, "sampling", None)
    return (
        None if settings is None else {"_target_": f"tessera.generators.{type(settings).__name__}", **asdict(settings)}
    )


def from_pretrained(source: str | Path) -> nn.Module:
    """The model that `export` wrote, in eval mode on the CPU.

    Args:
        source: a folder, or an id `owner/name` of the Hugging Face hub (which needs `pip install tessera[hub]`).

    Returns:
        The model. `card` holds what its model card says, and a generator's `sampling` the settings that it was exported
        with (None where there are none).

    Raises:
        MissingFileError: a file is missing; no such folder and no such id on the hub, or the hub can't be reached.
        CheckpointError: not an export of Tessera; weights that do not fit; damaged weights; foreign
            `_target_`.
    """
    folder = local_folder(source)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise MissingFileError(f"{folder / name} does not exist; give a folder written by tessera.zoo.export")
    description = _described(folder / CONFIG)
    model = build(description["config"], str(folder / CONFIG))
    load_strictly(model, read_public(folder / WEIGHTS, "it is part of an export"), str(folder / WEIGHTS))
    model.card = ModelCard(**description.get("card", {}))
    if isinstance(model, Generator):
        model.tokenizer_fingerprint = description.get("tokenizer_fingerprint")
        settings = description.get("sampling")
        model.sampling = None if settings is None else instantiate(settings, f"sampling of {folder / CONFIG}")
    stored = description.get("fingerprint")
    if stored is not None and model.fingerprint() != stored:
        raise CheckpointError(
            f"{folder} has tokens of fingerprint {model.fingerprint()}, but was exported as {stored}; "
            "the weights or config.json were changed afterwards"
        )
    return model.eval()


def is_export(folder: str | Path) -> bool:
    """Whether `export` wrote a folder."""
    try:
        return bool(_described(Path(folder) / CONFIG))
    except (OSError, CheckpointError):
        return False


def is_exported_generator(folder: str | Path) -> bool:
    """Whether `export` wrote a folder, and of a generator."""
    return is_export(folder) and _described(Path(folder) / CONFIG)["config"]["_target_"].startswith(
        "tessera.generators."
    )


def _described(path: Path) -> dict[str, Any]:
    """The content of a config.json of ours."""
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT or "config" not in description:
        raise CheckpointError(f"{path} was not written by tessera.zoo.export")
    return description
