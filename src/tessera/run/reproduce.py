"""Reproduces a published row: `python -m tessera.run.reproduce rar-b`, or `make reproduce-rar-b`.

Prints and runs every command from the data to the row's figures, or those that evaluate its published checkpoint. The
same call continues a chain that was stopped. Without a row, lists all with their published figures.
"""

import argparse
import difflib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from tessera.errors import ConfigError, TesseraError
from tessera.run.chain import WHOLE, Chain, checkpoint_of, evaluation, training, whole
from tessera.run.dry_run import DryRun
from tessera.run.results import read_results
from tessera.run.rows import Step, row, rows
from tessera.zoo import info, names

ROOT = Path(__file__).parents[3]
USER_ERROR = 2


def find(given: str, names: list[str]) -> str | None:
    """The name that is meant, with dashes in place of slashes and underscores or not; None where there is none."""
    return {_dashed(name): name for name in names}.get(_dashed(given))


def _dashed(name: str) -> str:
    return name.lower().replace("/", "-").replace("_", "-")


def chain_of(given: str, checkpoint: bool) -> Chain:
    """The commands for a row.

    Args:
        given: its name; "robustok-b" and "robustok-l" are the whole of RobusTok.
        checkpoint: those that evaluate its published checkpoint.

    Raises:
        ConfigError: no such row, or nothing published that belongs to it.
    """
    recipes = rows()
    name = find(given, [*recipes, *WHOLE])
    if name is not None and not checkpoint:
        return whole(name) if name in WHOLE else training(row(name))
    published = find(given, names()) or (checkpoint_of(name) if name is not None else None)
    if published is None and name is None:
        near = difflib.get_close_matches(_dashed(given), map(_dashed, [*recipes, *WHOLE, *names()]), n=3)
        hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else "make reproduce-list lists them"
        raise ConfigError(f"there is no published row {given!r}; {hint}")
    if published is None:
        raise ConfigError(f"no checkpoint of {name} is published; train it, without CHECKPOINT=1")
    if not checkpoint:
        raise ConfigError(f"no recipe trains {published}; CHECKPOINT=1 evaluates its published checkpoint")
    return evaluation(published)


def show_list() -> None:
    """Print all rows: target, published figures, checkpoint."""
    from rich.console import Console
    from rich.table import Table

    table = Table("row", "published", "checkpoint (CHECKPOINT=1)", title="make reproduce-ROW")
    known = set()
    for name in sorted([*rows(), *WHOLE]):
        zoo = checkpoint_of(name)
        known.add(zoo)
        figures = whole(name).published if name in WHOLE else row(name).figures.split("; ours")[0]
        table.add_row(name.replace("/", "-", 1), figures.removeprefix("published "), zoo or "")
    for name in (name for name in names() if name not in known and info(name).repository is not None):
        figures = ", ".join(f"{key} {value:g}" for key, value in info(name).reported.items())
        table.add_row(name.replace("/", "-", 1), figures, f"{name} (only)")
    Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def given_everywhere(step: Step, overrides: list[str]) -> Step:
    """The command with further overrides, and with checkpoints where TESSERA_OUTPUTS puts them."""

    outputs = os.environ.get("TESSERA_OUTPUTS", "outputs")
    moved = (text.replace("=outputs/", f"={outputs}/") for text in step.overrides)
    return Step(step.script, (*moved, *overrides))


def run(steps: list[Step]) -> int:
    """Run the commands until one fails; returns the exit code."""
    for step in steps:
        print(f"$ {step}", flush=True)
        code = subprocess.run([sys.executable, str(ROOT / f"{step.script}.py"), *step.overrides]).returncode
        if code:
            sys.stderr.write(f"error: that command failed (exit code {code}); the same call continues the chain\n")
            return code
    return 0


def dry_run(steps: list[Step]) -> int:
    """Print and check the commands; returns the exit code."""

    check = DryRun()
    for step in steps:
        print(f"$ {step}", flush=True)
        try:
            check(step)
        except (TesseraError, HydraException, OmegaConfBaseException) as error:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            return USER_ERROR
    print(f"{len(steps)} commands checked; none was run")
    return 0


def measured(steps: list[Step]) -> Iterator[str]:
    """The figures that evaluations have left in their run folders."""
    outputs = Path(os.environ.get("TESSERA_OUTPUTS", "outputs"))
    for step in steps:
        results = read_results(outputs / (step.value("name") or "")) if step.script == "eval" else None
        for figure in (results or {}).get("figures", []):
            yield f"{figure['label']} = {figure['value']:.4f}"


def main(arguments: list[str] | None = None) -> int:
    """Run, check or list; returns the exit code."""
    parser = argparse.ArgumentParser(prog="tessera.run.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("row", nargs="?", help="e.g. rar-b; none: list all")
    parser.add_argument("--checkpoint", action="store_true", help="evaluate the published checkpoint; trains nothing")
    parser.add_argument("--dry-run", action="store_true", help="check that every command would work; run none")
    parser.add_argument("overrides", nargs="*", help="after --: further Hydra overrides of every command")
    given = sys.argv[1:] if arguments is None else arguments
    end = given.index("--") if "--" in given else len(given)
    args = parser.parse_args(given[:end])
    args.overrides += given[end + 1 :]
    if args.row is None:
        show_list()
        return 0
    try:
        chosen = chain_of(args.row, args.checkpoint)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR
    steps = [given_everywhere(step, args.overrides) for step in chosen.steps]
    print(chosen.title)
    code = dry_run(steps) if args.dry_run else run(steps)
    if code == 0 and not args.dry_run:
        for line in measured(steps):
            print(line)
    print(f"published: {chosen.published.removeprefix('published ')}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
