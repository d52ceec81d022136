"""Refuses configuration keys that nothing reads, before anything is built.

A key is known where the signature of its node's `_target_` has it, or, outside of targets, where a file of `conf/`
defines it. Recipes and modes (RECIPES) choose and change; they define nothing.
"""

import difflib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import hydra.utils
import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from tessera.errors import ConfigError

CONF = Path(__file__).parents[3] / "conf"
RECIPES = ("experiment", "sweep", "debug", "local")
INSTANTIATE = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}


@dataclass
class Definition:
    """What the files of `conf/` define at one place of the tree.

    Attributes:
        keys: by name, what is below.
        targets: every `_target_` that an option puts here.
    """

    keys: dict[str, "Definition"] = field(default_factory=dict)
    targets: set[str] = field(default_factory=set)

    def at(self, path: Iterable[str]) -> "Definition":
        """The definition below `path`, made where it doesn't exist yet."""
        node = self
        for name in path:
            node = node.keys.setdefault(name, Definition())
        return node

    def add(self, content: dict[str, Any]) -> None:
        """Merge a file's content in."""
        if isinstance(content.get("_target_"), str):
            self.targets.add(content["_target_"])
        for name, value in content.items():
            child = self.at([name])
            if isinstance(value, dict):
                child.add(value)


def check_config(cfg: DictConfig, primary: str, conf: Path | None = None) -> None:
    """Refuse unknown keys anywhere in a composed configuration, and values and arguments that are missing.

    Args:
        cfg: composed; not modified, interpolations not resolved.
        primary: name of its primary config (train, post_train, eval).
        conf: configuration folder; by default Hydra's, or the repository's outside of a Hydra run.

    Raises:
        ConfigError: names each dotted key, the nearest known one, and the recipe that sets it.
    """
    conf = conf or _conf_folder()
    tree = OmegaConf.to_container(cfg, resolve=False)
    problems = list(_node_problems("", tree, definitions(conf, primary)))
    if problems:
        lines = [text + _origin(conf, key) for key, text in problems]
        raise ConfigError("; ".join(lines))


def suggestion(key: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'? " with the known key nearest to `key`, or nothing.

    A sibling (the same parent) with a like name comes first, then the same name elsewhere, then a like dotted key.
    """
    # a parent of the key is no help, and Hydra's own keys are not what was meant
    known = [name for name in map(str, known) if not key.startswith(f"{name}.") and not name.endswith("_")]
    parent, _, name = key.rpartition(".")
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == parent}
    near = [siblings[found] for found in difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)]
    namesakes = [other for other in known if parent and other.rpartition(".")[2] == name]
    near += namesakes if len(namesakes) == 1 else []
    near += difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    return f"did you mean '{near[0]}'? " if near else ""


@cache
def definitions(conf: Path, primary: str) -> Definition:
    """Everything that the files of `conf` define, with the top level limited to what belongs to `primary`."""
    root, top = Definition(), set()
    content = _read(conf / f"{primary}.yaml")
    moved: dict[str, set[str]] = {}
    for group, package in _placements(content):
        top.add((package or group).split(".")[0].split("/")[0])
        if package is not None:
            moved.setdefault(group, set()).add(package)
    for path in sorted(conf.rglob("*.yaml")):
        group = path.relative_to(conf).parent.as_posix()
        if group == "." or group.split("/")[0] in (*RECIPES, "hydra"):
            continue
        own = _package_header(path) or group.replace("/", ".")
        for package in {own, *moved.get(group, ())}:
            root.at([] if package == "_global_" else package.split(".")).add(_body(_read(path)))
    own_content = _body(content)
    root.add(own_content)
    root.keys = {name: node for name, node in root.keys.items() if name in top or name in own_content}
    return root


def _conf_folder() -> Path:
    if HydraConfig.initialized():
        for source in HydraConfig.get().runtime.config_sources:
            if source.provider == "main" and source.schema == "file":
                return Path(source.path)
    return CONF


def _read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text()) or {}


def _body(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "defaults"}


def _package_header(path: Path) -> str | None:
    for line in path.read_text().splitlines():
        if line.startswith("# @package"):
            return line.removeprefix("# @package").strip()
        if line and not line.startswith("#"):
            return None
    return None


def _placements(content: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    """(group, package or None) of each entry in a primary config's defaults list, recipes and Hydra's own left out."""
    for entry in content.get("defaults", []):
        if isinstance(entry, dict):
            group, _, package = next(iter(entry)).removeprefix("optional ").lstrip("/").partition("@")
            if group.split("/")[0] not in (*RECIPES, "hydra"):
                yield group, package or None


Problem = tuple[str, str]


def _node_problems(key: str, value: Any, known: Definition) -> Iterator[Problem]:
    """(dotted key, what is wrong) for a node and everything below it."""
    if value == "???":
        yield key, f"{key} is required; set {key}=..."
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _node_problems(f"{key}[{number}]", item, Definition())
    elif isinstance(value, dict):
        if "_target_" in value:
            targets = {value["_target_"]} if value["_target_"] is not None else known.targets
            yield from _target_problems(key, value, targets)
        elif known.targets:
            yield key, f"{key} has values but is not among the chosen parts; choose it, or remove it with ~{key}"
            return
        elif known.keys:
            for name in value:
                if name not in known.keys:
                    yield _unknown(_join(key, name), known.keys)
        for name, item in value.items():
            if isinstance(item, dict | list) or item == "???":
                yield from _node_problems(_join(key, name), item, known.keys.get(name, Definition()))


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _unknown(key: str, names: Iterable[str]) -> Problem:
    parent = key.rpartition(".")[0]
    names = sorted(str(name) for name in names if name not in INSTANTIATE)
    hint = suggestion(key, [_join(parent, name) for name in names])
    return key, f"unknown config key '{key}'; {hint or 'known here: ' + ', '.join(names)}".rstrip()


def _target_problems(key: str, node: dict[str, Any], targets: set[str]) -> Iterator[Problem]:
    """Problems of a target's arguments.

    Args:
        node: with `_target_`. Where that is null, the part is switched off, and may keep the values a recipe gave it.
        targets: the node's target, or all that could be chosen where it is switched off.
    """
    accepted: set[str] = set(INSTANTIATE)
    for target in sorted(targets):
        if "${" in target:
            return
        try:
            parameters = _parameters(hydra.utils.get_object(target))
        except Exception as error:
            yield f"{key}._target_", f"{key}._target_={target} can't be imported: {' '.join(str(error).split())}"
            return
        if parameters is None:
            return
        accepted |= parameters.keys()
        yield from _type_problems(key, node, parameters)
    for name in node:
        if name not in accepted:
            yield _unknown(_join(key, name), accepted)
    if node["_target_"] is not None and not node.get("_partial_"):
        by_position = len(node.get("_args_") or ())
        for name in list(parameters)[by_position:]:
            if parameters[name].default is inspect.Parameter.empty and name not in node:
                yield _join(key, name), f"{key}.{name} is required by {node['_target_']}; set {key}.{name}=..."


def _type_problems(key: str, node: dict[str, Any], parameters: dict[str, inspect.Parameter]) -> Iterator[Problem]:
    """Words where an argument is annotated as a number or a truth value, and not as text besides."""
    numbers = (int, float, bool)
    for name, value in node.items():
        if name not in parameters or not isinstance(value, str) or "${" in value or value == "???":
            continue
        annotation = parameters[name].annotation
        kinds = get_args(annotation) or (annotation,)
        if any(kind in numbers for kind in kinds) and not any(_takes_text(kind) for kind in kinds):
            named = [kind for kind in kinds if kind in numbers] + [kind for kind in kinds if kind is type(None)]
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in named)
            yield _join(key, name), f"{_join(key, name)}={value!r} is not of type {wanted}"


def _takes_text(kind: Any) -> bool:
    """Whether a value of an annotated type may be text; True where the annotation is no plain type."""
    return not inspect.isclass(kind) or kind is object or issubclass(kind, str | PathLike)


def _parameters(target: Any) -> dict[str, inspect.Parameter] | None:
    """A callable's arguments by name, without those that only code can give; None where any name is accepted.

    A class that takes **kwargs is taken to pass them on to the next class of its method resolution order. Only the
    first class's arguments can be required: a base class's may be given by the class itself.
    """
    callables = [target]
    if inspect.isclass(target):
        own = [cls.__init__ for cls in target.__mro__ if "__init__" in vars(cls) and not _is_root(cls)]
        callables = own or callables
    names: dict[str, inspect.Parameter] = {}
    for number, function in enumerate(callables):
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # written in C without a signature
            return None
        if inspect.ismethoddescriptor(function):  # written in C: its signature only says (*args, **kwargs)
            return None
        for parameter in parameters[function is not target :]:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                names.setdefault(parameter.name, parameter if number == 0 else parameter.replace(default=None))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return names
    # the last class hands on to object or nn.Module, which take nothing; a function's **kwargs may be anything
    return names if inspect.isclass(target) else None


def _is_root(cls: type) -> bool:
    return cls is object or (cls.__module__, cls.__name__) == ("torch.nn.modules.module", "Module")


def _origin(conf: Path, key: str) -> str:
    """ " (in FILE)" with the recipe that sets `key`, where it is one and the command line doesn't."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    if any(text.lstrip("+").partition("=")[0] == key for text in overrides):
        return ""
    files = []
    for path in sorted(path for recipe in RECIPES for path in (conf / recipe).rglob("*.yaml")):
        node: Any = _body(_read(path))
        for name in key.split("."):
            node = node.get(name, node) if isinstance(node, dict) and name in node else None
        if node is not None:
            files.append(path.relative_to(conf).with_suffix("").as_posix())
    if HydraConfig.initialized() and len(files) > 1:
        chosen = {f"{group}/{choice}" for group, choice in HydraConfig.get().runtime.choices.items()}
        files = [name for name in files if name in chosen]
    return f" (set in conf/{files[0]}.yaml)" if len(files) == 1 else ""
