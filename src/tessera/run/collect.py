"""`eval.py task=collect`: the results of many runs in one table."""

import csv
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tessera.distributed import rank
from tessera.errors import ConfigError, DataError, MissingFileError
from tessera.run.record import FAILURE_FILE, RECORD_FILE
from tessera.run.results import FILE, mean_and_half_range
from tessera.run.subject import Subject

log = logging.getLogger(__name__)

UNINTERESTING = ("name", "ckpt")  # overrides that say where a run is, not what it is
Row = dict[str, Any]


@dataclass
class Run:
    """What a run folder tells.

    Attributes:
        folder: of the run.
        state: finished, "stopped by <signal>", "failed: <why>", or unfinished (running, or killed).
        overrides: the last start's, by key.
        figures: values by label.
        seconds: of training or evaluation; None where it isn't finished.
    """

    folder: Path
    state: str
    overrides: dict[str, str] = field(default_factory=dict)
    figures: dict[str, float | str] = field(default_factory=dict)
    seconds: float | None = None

    @property
    def finished(self) -> bool:
        return self.state == "finished"


def read_run(folder: Path) -> Run:
    """The run in a folder that holds a record or a failure.

    Raises:
        DataError: a file of it can't be read.
    """
    started = (_read(folder / RECORD_FILE) or [{}])[-1]
    failure = _read(folder / FAILURE_FILE)
    results = _read(folder / FILE) or {}
    overrides = _by_key((failure or started).get("overrides", []))
    if results and results.get("stopped_by") is None:
        return Run(folder, "finished", overrides, _figures(results.get("figures", [])), results.get("seconds"))
    if failure is not None:
        return Run(folder, f"failed: {failure['error']}", overrides)
    return Run(folder, f"stopped by {results['stopped_by']}" if results else "unfinished", overrides)


def _read(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} can't be read ({' '.join(str(error).split())}); mend or delete it") from error


def _by_key(overrides: Iterable[str]) -> dict[str, str]:
    pairs = (text.lstrip("+").partition("=") for text in overrides)
    return {key: value for key, _, value in pairs if key not in UNINTERESTING}


def _figures(content: list[Row] | dict[str, list[Row]]) -> dict[str, float | str]:
    """Values by label; where there are several lists, before and after post-training, with the list's name."""
    groups = content if isinstance(content, dict) else {"": content}
    return {
        f"{group}/{figure['label']}".lstrip("/"): figure["value"] for group, items in groups.items() for figure in items
    }


class Collect:
    """Makes a row of each run: the overrides that differ, the figures by label, and the state.

    Args:
        folder: searched with all below it; or several.
        figures: of these names or labels only; None: all.
        over: an override; finished runs that differ in nothing else share a row, with means, half ranges and their
            number.
        sort: name or label of the figure to sort by, ascending, runs without it last; None: by folder.

    Raises:
        ConfigError: no folder, or no run in it; a figure that no run has.
    """

    def __init__(
        self,
        folder: str | Sequence[str],
        figures: Sequence[str] | None = None,
        over: str | None = None,
        sort: str | None = None,
    ):
        self.folders = [Path(folder)] if isinstance(folder, str) else [Path(item) for item in folder]
        self.figures, self.over, self.sort = figures, over, sort

    def run(self, subject: Subject) -> dict[str, Any]:
        """Write `collected.csv` and `collected.json` into the run folder, and show the table."""
        runs = self.read(subject.run)
        rows = self.rows(runs)
        if rank() == 0:
            write_csv(subject.run / "collected.csv", rows)
            (subject.run / "collected.json").write_text(json.dumps(rows, indent=2) + "\n")
            show(rows)
            log.info("%d of %d runs are finished; table in %s", sum(r.finished for r in runs), len(runs), subject.run)
        return {"runs": rows}

    def read(self, own: Path) -> list[Run]:
        """All runs below the folders but `own`, in order."""
        for folder in self.folders:
            if not folder.is_dir():
                raise MissingFileError(f"task.folder={folder} does not exist; give a folder of runs")
        found = {
            path.parent
            for folder in self.folders
            for name in (RECORD_FILE, FAILURE_FILE)
            for path in folder.rglob(name)
            if path.parent.resolve() != own.resolve()
        }
        if not found:
            places = ", ".join(map(str, self.folders))
            raise ConfigError(f"task.folder={places} has no run in it (none left a {RECORD_FILE})")
        return [read_run(folder) for folder in sorted(found)]

    def rows(self, runs: list[Run]) -> list[Row]:
        """The table's rows, all with the same columns."""
        keys = sorted({key for run in runs for key in run.overrides})
        keys = [key for key in keys if len({run.overrides.get(key) for run in runs}) > 1]
        labels = self.labels(runs)
        if self.over is not None:
            if self.over not in keys:
                known = ", ".join(keys) or "nothing"
                raise ConfigError(f"task.over={self.over}: the runs don't differ in it, but in {known}")
            rows = self._averaged(runs, [key for key in keys if key != self.over], labels)
        else:
            rows = [
                {
                    "run": self._short(run.folder),
                    **{key: run.overrides.get(key, "") for key in keys},
                    **{label: run.figures.get(label) for label in labels},
                    "seconds": run.seconds,
                    "state": run.state,
                }
                for run in runs
            ]
        if self.sort is not None:
            [column] = self.labels(runs, [self.sort])[:1]
            rows.sort(key=lambda row: row[column] if isinstance(row[column], float | int) else float("inf"))
        return rows

    def _short(self, folder: Path) -> str:
        """The path below the folder that was given; whole where there are several."""
        return str(folder.relative_to(self.folders[0]) if len(self.folders) == 1 else folder)

    def _averaged(self, runs: list[Run], keys: list[str], labels: list[str]) -> list[Row]:
        groups: dict[tuple[str, ...], list[Run]] = {}
        for run in runs:
            groups.setdefault(tuple(run.overrides.get(key, "") for key in keys), []).append(run)
        rows = []
        for values, members in groups.items():
            finished = [run for run in members if run.finished]
            row: Row = {"run": f"{len(finished)} of {len(members)} finished", **dict(zip(keys, values, strict=True))}
            for label in labels:
                numbers = [run.figures[label] for run in finished if isinstance(run.figures.get(label), float | int)]
                row[label], row[f"{label} half range"] = mean_and_half_range(numbers) if numbers else (None, None)
            rows.append({**row, "state": "; ".join(dict.fromkeys(run.state for run in members))})
        return rows

    def labels(self, runs: list[Run], wanted: Sequence[str] | None = None) -> list[str]:
        """Labels of the figures that are columns, in the order they are first met."""
        wanted = wanted or self.figures
        found = list(dict.fromkeys(label for run in runs for label in run.figures))
        if wanted is None:
            return found
        chosen = {name: [label for label in found if name in _names(label)] for name in wanted}
        for name, labels in chosen.items():
            if not labels:
                raise ConfigError(f"no run has a figure {name}; measured were: {', '.join(found) or 'none'}")
        return list(dict.fromkeys(label for labels in chosen.values() for label in labels))


def _names(label: str) -> set[str]:
    """What after_ema/gFID[x]@N=9 may be called: in full, after_ema/gFID, and gFID."""
    name = label.split("[")[0].split("@")[0]
    return {label, name, name.rpartition("/")[2]}


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line per row under a line of headings."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def show(rows: list[Row]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    # labels have brackets; a file has no width
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
