"""What is published: every checkpoint by name, as listed in `published/*.yaml`."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from tessera.errors import ConfigError

KINDS = ("tokenizer", "generator", "extractor", "file")


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint. Figures are the publisher's; none of them was measured here.

    Attributes:
        name: here, e.g. "robustok/main_train".
        kind: "tokenizer", "generator", "extractor" (of features), or "file" (used by something else, see `note`).
        family: whose hyper-parameters `config` are, for `from_public`.
        source: the public code.
        published: the names of those who published it, "<family>: <name>" where that is another one than `family`.
        repository: on the Hugging Face hub; None: not there.
        filename: in the repository.
        mirrors: (repository, file name) of the same weights elsewhere.
        folder: of an export that comes with the package; None: none does.
        parts: dotted paths inside the file, the first that is there holds the weights; none: the file itself.
        config: published hyper-parameters that shape the model.
        params_millions: parameters of the model as it is built here.
        resolution: of images, in pixels.
        tokenizer: of a generator, the name of the one that decodes its tokens.
        sampling: of a generator, the published settings as a choice of `conf/sampling`.
        settings: the same as arguments of its settings.
        reported: published figures.
        protocol: of these.
        licence: of the weights, where it is known.
        sha256: of the file, where it is known.
        note: what else one should know.
    """

    name: str
    kind: str
    family: str
    source: str
    published: tuple[str, ...] = ()
    repository: str | None = None
    filename: str | None = None
    mirrors: tuple[tuple[str, str], ...] = ()
    folder: str | None = None
    parts: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    params_millions: float | None = None
    resolution: int | None = 256
    tokenizer: str | None = None
    sampling: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    reported: Mapping[str, float] = field(default_factory=dict)
    protocol: str | None = None
    licence: str | None = None
    sha256: str | None = None
    note: str | None = None


@cache
def _table() -> dict[str, Checkpoint]:
    table: dict[str, Checkpoint] = {}
    for path in sorted(files("tessera.zoo").joinpath("published").iterdir(), key=lambda path: path.name):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        for name, row in content["checkpoints"].items():
            row["mirrors"] = tuple(map(tuple, row.get("mirrors", ())))
            row |= {key: tuple(row[key]) for key in ("published", "parts") if key in row}
            table[name] = Checkpoint(name=name, family=content["family"], source=content["source"], **row)
    return table


def names(kind: str | None = None) -> list[str]:
    """Names of the published checkpoints, sorted.

    Args:
        kind: of these only: "tokenizer", "generator", "extractor" or "file"; None: of those that `load` gives.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    return sorted(
        name for name, entry in _table().items() if (entry.kind != "file" if kind is None else entry.kind == kind)
    )


def info(name: str) -> Checkpoint:
    """What is known of a published checkpoint.

    Args:
        name: one of `names()`, or of a `kind`.

    Raises:
        ConfigError: an unknown name; the nearest ones are suggested.
    """
    table = _table()
    if name in table:
        return table[name]
    # the publishers' names lead here, too
    theirs = {text.rpartition(": ")[2].lower(): entry.name for entry in table.values() for text in entry.published}
    ours = {key.lower(): key for key in table} | {key.rpartition("/")[2].lower(): key for key in table} | theirs
    close = dict.fromkeys(ours[key] for key in difflib.get_close_matches(str(name).lower(), ours, n=6, cutoff=0.5))
    hint = f"; did you mean {' or '.join(list(close)[:3])}?" if close else "; tessera.zoo.names() lists all"
    raise ConfigError(f"the zoo has no {name!r}{hint}")


def published_config(family: str, name: str) -> Mapping[str, Any]:
    """The hyper-parameters that a published name stands for in the files of a family.

    Raises:
        ConfigError: no such name there.
    """
    for entry in _table().values():
        own = name in entry.published and entry.family == family
        if own or f"{family}: {name}" in entry.published:
            return entry.config
    raise ConfigError(f"config={name!r} is no checkpoint of {family}; give its hyper-parameters")
