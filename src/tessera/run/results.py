"""Result files: one results.json per run, written atomically and readable without this package."""

import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FILE = "results.json"

log = logging.getLogger(__name__)


def figures_of(callbacks: Iterable[Any]) -> list[Any]:
    """The figures (metrics.protocol.Figure) that callbacks hold after an evaluation."""
    return [figure for callback in callbacks for figure in getattr(callback, "figures", [])]


def log_figures(figures: Iterable[Any]) -> None:
    """Say each figure under its full name, and below them each warning once, with the figures it belongs to."""
    warned: dict[str, list[str]] = {}
    for figure in figures:
        log.info(figure.describe(warnings=False))
        for warning in figure.warnings:
            warned.setdefault(warning, []).append(figure.name)
    for warning, names in warned.items():
        log.warning("warning for %s: %s", ", ".join(names), warning)


def read_results(folder: Path) -> dict[str, Any] | None:
    """Results of a run that was trained to its end; None where there are none (yet)."""
    path = folder / FILE
    content = json.loads(path.read_text()) if path.exists() else None
    return content if content is not None and content.get("stopped_by") is None else None


def write_results(folder: Path, content: dict[str, Any]) -> Path:
    """Write `results.json` into `folder`; a reader never sees half a file.

    Non-finite numbers become strings ("nan", "inf"), as JSON has none.
    """
    return write_json(folder / FILE, content)


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write any such file; see `write_results`."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(_finite(content), indent=2, sort_keys=False) + "\n")
    os.replace(temporary, path)
    return path


def mean_and_half_range(values: Sequence[float]) -> tuple[float, float]:
    """How several seeds are shown."""
    return sum(values) / len(values), (max(values) - min(values)) / 2


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
