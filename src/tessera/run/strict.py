"""Refuses configuration keys that nothing reads, before anything is built."""

import difflib
import inspect
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import hydra.utils
import yaml
from omegaconf import DictConfig, OmegaConf

from tessera.errors import ConfigError

CONF = Path(__file__).parents[3] / "conf"
INSTANTIATE = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}


def unknown(key: str, known: Iterable[str]) -> ConfigError:
    """The error for a key that doesn't exist, with the nearest one that does."""
    known = sorted(known)
    parent, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {parent + '.' if parent else ''}{near[0]}?" if near else f"known are {', '.join(known)}"
    return ConfigError(f"unknown config key {key}; {hint}")


@cache
def top_level_keys(primary: str) -> frozenset[str]:
    """Keys that a primary config (train, post_train, eval) defines: its groups and its own values."""
    content = yaml.safe_load((CONF / f"{primary}.yaml").read_text())
    keys = {key for key in content if key != "defaults"}
    for entry in content["defaults"]:
        if isinstance(entry, dict):
            group = next(iter(entry)).removeprefix("optional ").removeprefix("override ").lstrip("/")
            keys.add(group.split("@")[-1].split("/")[0])
    return frozenset(keys - {"experiment", "local", "debug", "hydra"})


def check_config(cfg: DictConfig, primary: str) -> None:
    """Refuse unknown keys anywhere in a composed configuration, and arguments that are missing.

    Args:
        cfg: composed; not modified.
        primary: name of its primary config.

    Raises:
        ConfigError: names the dotted key and the nearest known one.
    """
    known = top_level_keys(primary)
    for key in cfg:
        if key not in known:
            raise unknown(str(key), known)
    tree = OmegaConf.to_container(cfg, resolve=False)
    for key, value in tree.items():
        _check(key, value)
    for key in ("paths", "pairs", "tokens"):
        if key in tree:
            _check_plain(key, tree[key], primary)


def _check_plain(key: str, value: dict[str, Any], primary: str) -> None:
    path = CONF / key / "default.yaml"
    source = yaml.safe_load((path if path.exists() else CONF / f"{primary}.yaml").read_text())
    known = source if path.exists() else source[key]
    for name in value:
        if name not in known:
            raise unknown(f"{key}.{name}", known)


def _check(key: str, value: Any) -> None:
    """Check a node and what is below it against the signatures of its targets."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            _check(f"{key}[{number}]", item)
        return
    if not isinstance(value, dict):
        return
    if value.get("_target_") is not None:
        _check_target(key, value)
    elif "_target_" in value and (extra := set(value) - INSTANTIATE):
        raise ConfigError(f"{key} is switched off, but {key}.{min(extra)} is set; choose another {key} or remove it")
    for name, item in value.items():
        _check(f"{key}.{name}", item)


def _check_target(key: str, node: dict[str, Any]) -> None:
    try:
        target = hydra.utils.get_object(node["_target_"])
    except Exception as error:
        raise ConfigError(f"{key}._target_={node['_target_']} can't be imported: {error}") from error
    parameters = _parameters(target)
    if parameters is None:
        return
    for name in node:
        if name not in parameters and name not in INSTANTIATE:
            raise unknown(f"{key}.{name}", parameters)


def _parameters(target: Any) -> set[str] | None:
    """Names of a callable's arguments, those of base classes included where they are passed on; None if unknowable."""
    if not inspect.isclass(target):
        signature = inspect.signature(target)
        if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            return None
        return set(signature.parameters)
    names: set[str] = set()
    for cls in target.__mro__:
        init = cls.__dict__.get("__init__")
        if init is None:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return None
