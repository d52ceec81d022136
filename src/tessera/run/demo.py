"""The whole chain on a small data set: two tokenizers, a generator on each, post-training of both decoders.

Run as `python -m tessera.run.demo`. The two chains run side by side, one thread each. Ends with a table of figures, the
protocols they were measured by, seconds per stage, and the paths of the pictures. A part that is finished is not
repeated, and one that was stopped continues.
"""

import argparse
import logging
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tessera.run.recipes import run_recipe, single_threaded
from tessera.run.results import mean_and_half_range

KINDS = {"plain": "tokenizer", "perturbed": "tokenizer_perturbed"}
STATES = {"before": "before post-training", "after_raw": "after, raw weights", "after_ema": "after, averaged weights"}
COLUMNS = ("PSNR", "rFID", "pFID", "gFID")

log = logging.getLogger(__name__)
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Chain:
    """One tokenizer, the generator on it, and the post-training of its decoder.

    Attributes:
        dataset: folder of the recipes in conf/experiment.
        kind: plain or perturbed.
        seed: of all three parts.
        outputs: paths.outputs.
        overrides: further Hydra overrides of every part.
    """

    dataset: str
    kind: str
    seed: int
    outputs: Path
    overrides: tuple[str, ...]

    def name(self, part: str) -> str:
        """Run folder of a part, below `outputs`."""
        return f"demo/{self.dataset}/seed{self.seed}/{self.kind}/{part}"

    def parts(self) -> list[tuple[str, str, str, list[str]]]:
        """(name, script, recipe, overrides) in order."""
        tokenizer, generator = (
            f"{part}.path={self.outputs / self.name(part) / 'checkpoints' / 'last.ckpt'}"
            for part in ("tokenizer", "generator")
        )
        return [
            ("tokenizer", "train", KINDS[self.kind], []),
            ("generator", "train", "generator", [tokenizer]),
            ("post_train", "post_train", "post_train", [tokenizer, generator]),
        ]


def run_chain(chain: Chain) -> Results:
    """Train the parts of a chain in order; returns their results by part."""
    logging.basicConfig(level=logging.INFO, format=f"[%(asctime)s {chain.kind:9s}] %(message)s", datefmt="%H:%M:%S")
    results: Results = {}
    for part, script, recipe, overrides in chain.parts():
        start = time.perf_counter()
        results[part] = run_part(chain, part, script, recipe, overrides)
        if results[part]["stopped_by"] is not None:
            break
        log.info("%s done in %.0f s", chain.name(part), time.perf_counter() - start)
    return results


def run_part(chain: Chain, part: str, script: str, recipe: str, overrides: list[str]) -> dict[str, Any]:
    """Train one part, or read its results where it is finished."""
    given = [f"experiment={chain.dataset}/{recipe}", f"name={chain.name(part)}", f"paths.outputs={chain.outputs}"]
    given += [f"seed={chain.seed}", *overrides, *chain.overrides]
    log.info("%s: python %s.py %s", part, script, " ".join(given[:1] + overrides))
    return run_recipe(script, given)


def table_rows(chains: dict[tuple[str, int], Results]) -> list[tuple[str, str, dict[str, list[float]]]]:
    """(tokenizer, state of its decoder, figures by label, one value per seed), in the order of the table."""
    rows = []
    for kind in KINDS:
        seeds = [results["post_train"]["figures"] for (which, _), results in sorted(chains.items()) if which == kind]
        for state in STATES:
            values: dict[str, list[float]] = {}
            for figures in seeds:
                for figure in figures[state]:
                    values.setdefault(figure["label"], []).append(figure["value"])
            rows.append((kind, state, values))
    return rows


def print_table(chains: dict[tuple[str, int], Results]) -> None:
    """Print mean (and half the range over seeds) of each figure, and below the labels that name the protocols."""
    from rich.console import Console
    from rich.table import Table

    rows = table_rows(chains)
    labels = {
        column: next(label for label in rows[0][2] if label.split("[")[0].split("@")[0] == column) for column in COLUMNS
    }
    table = Table(title="Decoders on the same images and the same generated tokens")
    for heading in ("tokenizer", "decoder", *COLUMNS):
        table.add_column(heading, justify="right" if heading in COLUMNS else "left")
    for kind, state, values in rows:
        cells = []
        for label in labels.values():
            mean, spread = mean_and_half_range(values[label])
            cells.append(f"{mean:.3f}" + (f" ± {spread:.2f}" if len(values[label]) > 1 else ""))
        table.add_row(kind, STATES[state], *cells)
    console = Console(width=110)
    console.print(table)
    console.print("Measured as " + ", ".join(labels.values()), markup=False, highlight=False)
    for part in ("tokenizer", "generator", "post_train"):
        seconds = [results[part]["seconds"] for results in chains.values()]
        console.print(f"{part:10s} {sum(seconds) / len(seconds):6.0f} s of training on average", highlight=False)


def pictures(chains: list[Chain]) -> list[Path]:
    """The newest picture of each kind in every run folder."""
    newest: dict[tuple[Path, str], Path] = {}
    for chain in chains:
        for part, *_ in chain.parts():
            for path in sorted((chain.outputs / chain.name(part) / "images").glob("*.png")):
                newest[path.parent, path.name.split("_step")[0]] = path
    return list(newest.values())


def main(arguments: list[str] | None = None) -> None:
    """Run the chains and print what they show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", choices=("digits", "fashion_mnist"))
    parser.add_argument("--seeds", type=int, default=1, help="repetitions; the table then shows mean and half range")
    parser.add_argument("--outputs", type=Path, default=Path(os.environ.get("TESSERA_OUTPUTS", "outputs")))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="chains at a time")
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides, for every part")
    args = parser.parse_args(arguments)
    single_threaded()
    start = time.perf_counter()
    chains = [
        Chain(args.dataset, kind, seed, args.outputs.absolute(), tuple(args.overrides))
        for seed in range(args.seeds)
        for kind in KINDS
    ]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run_chain, chains))
    for part, content in (item for chain in results for item in chain.items()):
        if content["stopped_by"] is not None:
            raise SystemExit(f"{part} was stopped by {content['stopped_by']}; the same command continues it")
    print_table({(chain.kind, chain.seed): result for chain, result in zip(chains, results, strict=True)})
    print(f"everything {time.perf_counter() - start:6.0f} s\npictures{' of seed 0' if args.seeds > 1 else ''}:")
    for path in pictures([chain for chain in chains if chain.seed == 0]):
        print(f"  {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
