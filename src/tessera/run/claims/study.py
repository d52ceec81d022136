"""The claims study: which statements of the papers hold on Fashion-MNIST, with controls and several seeds.

Run as `python -m tessera.run.claims.study`. Trains what is not trained yet, a chain of runs per process and one thread
each, and writes docs/claims.md.
"""

import argparse
import logging
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tessera.run.claims.measured import collect, load_summary, save_summary
from tessera.run.claims.plan import Run, chains
from tessera.run.claims.report import write_report
from tessera.run.recipes import run_recipe, single_threaded
from tessera.run.record import git_state

DOCS = Path(__file__).parents[4] / "docs"

log = logging.getLogger(__name__)


def run_chain(chain: list[Run], seed: int, outputs: Path) -> None:
    """Train the runs of a chain in order."""
    logging.basicConfig(level=logging.WARNING, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    for run in chain:
        start = time.perf_counter()
        overrides = [*run.arguments(seed, outputs), f"paths.outputs={outputs}", "logger=none"]
        if (signal := run_recipe(run.script, overrides)["stopped_by"]) is not None:
            raise SystemExit(f"{run.folder(seed)} was stopped by {signal}; the same command continues it")
        log.info("%s: %.0f s", run.folder(seed), time.perf_counter() - start)


def train_all(seeds: int, outputs: Path, jobs: int) -> None:
    """Train every run of every seed, `jobs` chains at a time; what is finished stays as it is."""
    single_threaded()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = [pool.submit(run_chain, chain, seed, outputs) for seed in range(seeds) for chain in chains()]
        for future in waiting:
            future.result()


def main(arguments: list[str] | None = None) -> None:
    """Train, and write the summary of what was measured and the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--outputs", type=Path, default=Path(os.environ.get("TESSERA_OUTPUTS", "outputs")))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="chains of runs at a time")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the report")
    parser.add_argument("--report-only", action="store_true", help="train nothing; report what is finished")
    parser.add_argument("--from-summary", action="store_true", help="train nothing; report the summary in --docs")
    args = parser.parse_args(arguments)
    summary = args.docs / "claims" / "results.json"
    if not args.from_summary:
        outputs = args.outputs.absolute()
        if not args.report_only:
            train_all(args.seeds, outputs, args.jobs)
        measured, facts = collect(outputs, args.seeds)
        save_summary(summary, measured, {**facts, "git": git_state()})
    path = write_report(args.docs, *load_summary(summary))
    print(f"written to {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
