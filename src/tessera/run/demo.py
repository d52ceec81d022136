"""The whole chain on a small data set: two tokenizers, a generator on each, post-training of both decoders.

Run as `python -m tessera.run.demo`. Prints a table of figures with their protocols and the paths of the pictures.
A part whose results exist is not repeated, so an interrupted demo continues where it stopped.
"""

import argparse
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONF = Path(__file__).parents[3] / "conf"
TOKENIZERS = ("plain", "perturbed")
STEPS = ("tokenizer", "generator", "post_train")


@dataclass(frozen=True)
class Part:
    """One training of the chain: which script, which recipe, and where it writes."""

    script: str
    experiment: str
    name: str
    overrides: tuple[str, ...] = ()


def parts(dataset: str, root: str, seed: int) -> list[Part]:
    """The six trainings of one seed, in order."""
    chain = []
    for kind in TOKENIZERS:
        name = {step: f"{root}/seed{seed}/{kind}/{step}" for step in STEPS}
        recipe = "tokenizer" if kind == "plain" else "tokenizer_perturbed"
        tokenizer = f"tokenizer.path=${{paths.outputs}}/{name['tokenizer']}/checkpoints/last.ckpt"
        generator = f"generator.path=${{paths.outputs}}/{name['generator']}/checkpoints/last.ckpt"
        chain += [
            Part("train", f"{dataset}/{recipe}", name["tokenizer"]),
            Part("train", f"{dataset}/generator", name["generator"], (tokenizer,)),
            Part("post_train", f"{dataset}/post_train", name["post_train"], (tokenizer, generator)),
        ]
    return chain


def run_part(part: Part, seed: int, extra: list[str]) -> dict[str, Any]:
    """Train one part, or read its results where they exist."""
    from hydra import compose, initialize_config_dir

    from tessera.run.post_train import post_train
    from tessera.run.results import read_results
    from tessera.run.train import train

    overrides = [
        f"experiment={part.experiment}",
        f"name={part.name}",
        f"seed={seed}",
        "ckpt=auto",
        *part.overrides,
        *extra,
    ]
    with initialize_config_dir(str(CONF), version_base=None):
        cfg = compose(part.script, overrides=overrides)
    if (found := read_results(Path(cfg.paths.run))) is not None:
        return found
    return {"train": train, "post_train": post_train}[part.script](cfg)


@dataclass(frozen=True)
class Row:
    """One line of the table: a decoder, and its figures by label."""

    name: str
    figures: dict[str, float]


COLUMNS = ("PSNR", "rFID", "pFID", "gFID")


def rows(results: dict[str, dict[str, Any]], root: str) -> list[Row]:
    """Table lines of one seed: each tokenizer's decoder before and after post-training (raw and averaged)."""
    table = []
    for kind in TOKENIZERS:
        content = results[f"{root}/{kind}/post_train"]["figures"]
        for when in ("before", "after_raw", "after_ema"):
            found = {figure["label"]: figure["value"] for figure in content[when]}
            table.append(Row(f"{kind}, {when.replace('_', ' post-training, ').replace('before', 'before')}", found))
    return table


def column_of(label: str) -> str | None:
    """The table column a figure label belongs to."""
    return next((column for column in COLUMNS if label.split("[")[0].split("@")[0] == column), None)


def print_table(seeds: dict[int, list[Row]]) -> None:
    """Print the figures, with mean and spread where there are several seeds, and what their labels are."""
    from rich.console import Console
    from rich.table import Table

    first = next(iter(seeds.values()))
    labels = {column: next(label for label in first[0].figures if column_of(label) == column) for column in COLUMNS}
    table = Table(title="Decoders on the same images and the same generated tokens")
    table.add_column("tokenizer, decoder")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for number, row in enumerate(first):
        cells = []
        for column in COLUMNS:
            values = [per_seed[number].figures[labels[column]] for per_seed in seeds.values()]
            mean = sum(values) / len(values)
            spread = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
            cells.append(f"{mean:.3f}{spread}")
        table.add_row(row.name, *cells)
    console = Console(width=120)
    console.print(table)
    for column, label in labels.items():
        console.print(f"{column}: {label}", markup=False, highlight=False)


def pictures(results: dict[str, dict[str, Any]], outputs: Path) -> list[Path]:
    """The newest picture of each kind in every run folder."""
    newest: dict[tuple[Path, str], Path] = {}
    for name in results:
        for path in sorted((outputs / name / "images").glob("*.png")):
            newest[path.parent, path.name.split("_step")[0]] = path
    return list(newest.values())


def main(arguments: list[str] | None = None) -> None:
    """Run the chain and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits", choices=("digits", "fashion_mnist"))
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds; the table shows mean and half range")
    parser.add_argument("--outputs", type=Path, default=Path(os.environ.get("TESSERA_OUTPUTS", "outputs")))
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides, for every part")
    args = parser.parse_args(arguments)
    os.environ["TESSERA_OUTPUTS"] = str(args.outputs)
    logging.basicConfig(level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    root = f"demo/{args.dataset}"
    results: dict[str, dict[str, Any]] = {}
    tables: dict[int, list[Row]] = {}
    for seed in range(args.seeds):
        for part in parts(args.dataset, root, seed):
            start = time.perf_counter()
            results[part.name] = run_part(part, seed, args.overrides)
            logging.info("%s: %.0f s", part.name, time.perf_counter() - start)
            if results[part.name]["stopped_by"] is not None:
                raise SystemExit(f"stopped by {results[part.name]['stopped_by']}; run the same command to continue")
        tables[seed] = rows(results, f"{root}/seed{seed}")
    print_table(tables)
    for name, content in results.items():
        print(f"{name:45s} {content['seconds']:7.1f} s training")
    print("pictures:")
    for path in pictures(results, args.outputs):
        print(f"  {path}")


if __name__ == "__main__":
    main()
