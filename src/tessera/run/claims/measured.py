"""What the runs of the claims study measured, and the summary of it that the report is made of."""

import json
from pathlib import Path
from typing import Any

from tessera.errors import MissingFileError
from tessera.run.claims.plan import all_runs
from tessera.run.results import read_results

# run name -> seed -> state of the decoder ("" outside of post-training) -> metric -> value
Measured = dict[str, dict[int, dict[str, dict[str, float]]]]


def collect(outputs: Path, seeds: int) -> tuple[Measured, dict[str, Any]]:
    """What the finished runs measured.

    Returns:
        The values, and facts: per metric the `labels` that name its protocol, and `seconds` of training over all runs.
    """
    measured: Measured = {}
    labels: dict[str, set[str]] = {}
    seconds = 0.0
    for run in all_runs():
        for seed in range(seeds):
            results = read_results(outputs / run.folder(seed))
            if results is None:
                continue
            figures = results["figures"]
            by_state = figures if isinstance(figures, dict) else {"": figures}
            measured.setdefault(run.name, {})[seed] = {
                state: {figure["name"]: figure["value"] for figure in found} for state, found in by_state.items()
            }
            for figure in (figure for found in by_state.values() for figure in found):
                labels.setdefault(figure["name"], set()).add(figure["label"])
            seconds += results["seconds"]
    facts = {"labels": {name: sorted(found) for name, found in labels.items()}, "seconds": round(seconds)}
    return measured, facts


def save_summary(path: Path, measured: Measured, facts: dict[str, Any]) -> None:
    """Write values and facts as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**facts, "runs": measured}, indent=1, sort_keys=True) + "\n")


def load_summary(path: Path) -> tuple[Measured, dict[str, Any]]:
    """(values, facts) of a summary.

    Raises:
        MissingFileError: no such file.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist; `make claims` writes it")
    content = json.loads(path.read_text())
    runs = {name: {int(seed): states for seed, states in found.items()} for name, found in content.pop("runs").items()}
    return runs, content
