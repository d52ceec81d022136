"""Claim: a memory-mapped token cache serves batches much faster than JSON lines, from a fraction of the space.

Both sides serve the same shuffled batches of the same synthetic tokens. "lines" parses the lines of a batch as it is
asked for (their offsets in the file are known), which is what a training loop on the published files needs unless it
holds all of them as Python objects; the time and the memory of that, once per process, are given too.

    python benchmarks/token_cache.py [--rows 20000] [--length 256] [--batch 64] [--json results.json]
"""

import argparse
import json
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from measure import seconds

from tessera.data import TokenCache, export_jsonl, import_jsonl


class Lines:
    """Random access to the lines of a file."""

    def __init__(self, path: Path):
        self.file = open(path, "rb")  # noqa: SIM115 (open as long as the benchmark runs)
        lengths = [len(line) for line in self.file]
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])

    def rows(self, numbers: list[int]) -> dict[str, Tensor]:
        """A batch, as `TokenCache.rows` gives it."""
        found = []
        for number in numbers:
            self.file.seek(self.offsets[number])
            found.append(json.loads(self.file.readline()))
        tokens = torch.tensor([line["tokens"] for line in found])[:, None]
        return {"tokens": tokens, "label": torch.tensor([line["class_id"] for line in found])}


def write_lines(path: Path, rows: int, length: int, codebook_size: int) -> None:
    generator = np.random.default_rng(0)
    with open(path, "w") as file:
        for _ in range(rows):
            line = {
                "class_id": int(generator.integers(1000)),
                "tokens": generator.integers(codebook_size, size=length).tolist(),
            }
            file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=20_000, type=int)
    parser.add_argument("--length", default=256, type=int)
    parser.add_argument("--batch", default=64, type=int)
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    codebook_size = 4096
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "tokens.jsonl"
        write_lines(path, options.rows, options.length, codebook_size)
        settings = {"tokenizer_fingerprint": "synthetic", "codebook_size": codebook_size, "num_classes": 1000}
        cache = TokenCache.open(import_jsonl(path, folder / "cache", **settings))
        lines = Lines(path)
        order = np.random.default_rng(1).permutation(options.rows)
        batches = [part.tolist() for part in np.array_split(order, max(1, options.rows // options.batch))]

        def serve(source) -> None:
            for numbers in batches:
                source.rows(numbers)

        for numbers in batches[:3]:
            ours, theirs = cache.rows(numbers), lines.rows(numbers)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert export_jsonl(cache, folder / "back.jsonl").read_bytes() == path.read_bytes()
        device = torch.device("cpu")
        times = {
            "lines": seconds(lambda: serve(lines), options.repeats, device),
            "cache": seconds(lambda: serve(cache), options.repeats, device),
            "open_cache": seconds(lambda: TokenCache.open(folder / "cache"), options.repeats, device),
            "load_lines": seconds(lambda: [json.loads(line) for line in path.read_text().splitlines()], 1, device),
        }
        part = max(1, options.rows // 10)
        tracemalloc.start()
        with open(path) as file:
            held = [json.loads(next(file)) for _ in range(part)]
        loaded_bytes = tracemalloc.get_traced_memory()[0] * options.rows // len(held)
        tracemalloc.stop()
        sizes = {
            "lines": path.stat().st_size,
            "cache": sum(file.stat().st_size for file in (folder / "cache").glob("*.bin")),
            "loaded_lines": loaded_bytes,
        }
    print(
        f"{options.rows} rows of {options.length} tokens: batches {times['lines'] / times['cache']:.0f}x faster "
        f"({options.rows / times['lines']:.0f} -> {options.rows / times['cache']:.0f} rows/s), "
        f"{sizes['lines'] / sizes['cache']:.2f}x less space "
        f"({sizes['lines'] / 2**20:.1f} -> {sizes['cache'] / 2**20:.1f} MiB), "
        f"opening {times['load_lines'] / times['open_cache']:.0f}x faster than loading all lines "
        f"({times['load_lines']:.2f} s -> {times['open_cache'] * 1e3:.2f} ms), which would hold "
        f"{sizes['loaded_lines'] / 2**20:.0f} MiB per process"
    )
    if options.json:
        options.json.write_text(
            json.dumps({"seconds": times, "bytes": sizes, **vars(options)}, indent=2, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
