"""Composes what a command line would compose, and finds command lines in texts."""

import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from tessera.run import compose

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
PRIMARY = sorted(path.stem for path in CONF.glob("*.yaml"))
PLACEHOLDER = "somewhere"  # for values that a command has to give, such as a checkpoint's path

SCRIPT_COMMAND = re.compile(rf"python3? (?P<script>{'|'.join(PRIMARY)})\.py(?P<arguments>[^#`|&;>\n]*)")


def composed(primary: str, overrides: Iterable[str], fill: bool = True) -> DictConfig:
    """The checked configuration of a command, with every interpolation resolved.

    Args:
        fill: give PLACEHOLDER to values that are required and not given.
    """
    overrides = list(overrides)
    if primary == "eval" and not any(text.startswith("metrics=") for text in overrides):
        overrides.append("metrics=digits")  # otherwise the checkpoint's
    return compose.composed(primary, overrides, PLACEHOLDER if fill else None)[0]


def script_commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(script, arguments) of each `python train.py ...` in a text; a backslash continues a line."""
    joined = re.sub(r"\\\n[#\s]*", " ", text)
    for match in SCRIPT_COMMAND.finditer(joined):
        yield match["script"], shlex.split(match["arguments"])


def expanded(arguments: list[str]) -> list[list[str]]:
    """The overrides of a command; for a sweep (-m) those of its first job and of its last."""
    options = [text for text in arguments if text.startswith("-")]
    overrides = [text for text in arguments if not text.startswith("-")]
    if not {"-m", "--multirun"} & set(options):
        return [overrides]
    jobs: list[list[str]] = [[], []]
    for override in OverridesParser.create().parse_overrides(overrides):
        texts = [override.input_line]
        if override.is_sweep_override():
            texts = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        jobs[0].append(texts[0])
        jobs[1].append(texts[-1])
    return jobs
