"""Claim: a memory-mapped token cache gives its first batch at once and costs a loader process no memory of its own.

"lines" is what the published training code does with a file of JSON lines: each loader process reads the whole file
into a list of strings and parses a sample when it is asked for. Each side runs in a fresh process that opens the
tokens, serves a first shuffled batch, and then more of them; what the process holds beyond the page cache, which all
processes share, is its private memory. For two numbers of lines, as the cache's cost must not grow with them.

    python benchmarks/token_cache.py [--rows 50000 200000] [--length 256] [--batch 64] [--json results.json]
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.data import TokenCache, export_jsonl, import_jsonl

CODES, CLASSES = 4096, 1000
MIB = 2**20


class Lines:
    """All lines of a file in memory, parsed one by one."""

    def __init__(self, path: Path):
        with open(path) as file:
            self.lines = file.readlines()

    def __len__(self) -> int:
        return len(self.lines)

    def rows(self, numbers: list[int]) -> dict[str, Tensor]:
        """A batch, as `TokenCache.rows` gives it."""
        found = [json.loads(self.lines[number]) for number in numbers]
        tokens = torch.tensor([line["tokens"] for line in found])[:, None]
        return {"tokens": tokens, "label": torch.tensor([line["class_id"] for line in found])}


SIDES = {"lines": Lines, "cache": TokenCache.open}


def private_bytes() -> int:
    """Memory of this process that it shares with no other: all but the pages of files."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel doesn't report private memory")


def serve(side: str, path: Path, batch: int, batches: int) -> dict[str, Any]:
    """Seconds to the first batch and for the others, private memory, and the first batch; in a process of its own."""
    torch.set_num_threads(1)
    # a first small call of everything: what is measured is the tokens' cost, not the libraries'
    torch.tensor([[1]])[:, None], np.random.default_rng(1).permutation(3)
    before, start = private_bytes(), time.perf_counter()
    source = SIDES[side](path)
    generator = np.random.default_rng(1)
    first = source.rows(generator.integers(len(source), size=batch).tolist())
    opened = time.perf_counter()
    for _ in range(batches):
        source.rows(generator.integers(len(source), size=batch).tolist())
    end = time.perf_counter()
    return {
        "first_batch_s": opened - start,
        "batch_s": (end - opened) / batches,
        "private_bytes": private_bytes() - before,
        "batch": {key: first[key].tolist() for key in ("tokens", "label")},
    }


def measure(side: str, path: Path, batch: int, batches: int, repeats: int) -> dict[str, Any]:
    """The least disturbed of some fresh processes."""
    found = []
    for _ in range(repeats):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found.append(pool.apply(serve, (side, path, batch, batches)))
    best = {key: min(result[key] for result in found) for key in ("first_batch_s", "batch_s", "private_bytes")}
    return {**best, "batch": found[0]["batch"]}


def write_lines(path: Path, rows: int, length: int) -> None:
    generator = np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(rows):
            tokens = generator.integers(CODES, size=length).tolist()
            file.write(json.dumps({"class_id": int(generator.integers(CLASSES)), "tokens": tokens}) + "\n")


def compare(folder: Path, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides on the same tokens."""
    lines, cache = folder / f"{rows}.jsonl", folder / f"{rows}"
    write_lines(lines, rows, options.length)
    import_jsonl(lines, cache, tokenizer_fingerprint="synthetic", codebook_size=CODES, num_classes=CLASSES)
    assert export_jsonl(TokenCache.open(cache), folder / "back.jsonl").read_bytes() == lines.read_bytes()
    paths = {"lines": lines, "cache": cache}
    found = {side: measure(side, paths[side], options.batch, options.batches, options.repeats) for side in SIDES}
    assert found["lines"].pop("batch") == found["cache"].pop("batch")
    found["lines"]["disk_bytes"] = lines.stat().st_size
    found["cache"]["disk_bytes"] = sum(file.stat().st_size for file in cache.glob("*.bin"))
    return {"rows": rows, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=[50_000, 200_000], type=int, nargs="+")
    parser.add_argument("--length", default=256, type=int)
    parser.add_argument("--batch", default=64, type=int)
    parser.add_argument("--batches", default=100, type=int, help="after the first")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        for rows in options.rows:
            found = compare(Path(name), rows, options)
            results.append(found)
            lines, cache = found["lines"], found["cache"]
            print(
                f"{rows} rows of {options.length} tokens: "
                f"first batch {lines['first_batch_s'] / cache['first_batch_s']:.0f}x faster "
                f"({lines['first_batch_s'] * 1e3:.0f} -> {cache['first_batch_s'] * 1e3:.2f} ms), "
                f"private memory per process {lines['private_bytes'] / MIB:.1f} -> {cache['private_bytes'] / MIB:.2f} "
                f"MiB, further batches {lines['batch_s'] / cache['batch_s']:.0f}x faster "
                f"({lines['batch_s'] * 1e3:.2f} -> {cache['batch_s'] * 1e3:.3f} ms), "
                f"{lines['disk_bytes'] / cache['disk_bytes']:.2f}x less space on disk"
            )
    if options.json:
        options.json.write_text(json.dumps({"results": results, **vars(options)}, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
