"""Claim: the loss of a large head needs no N x K table of logits; without one it takes a fourth product beside three.

Per case, in one run, on the same features, weight and targets: loss, hits and gradients of `head_losses` by tiles, and
by the plain form that makes all logits at once. Times on a CPU are CPU seconds of one thread, which other processes
disturb less; peak memory is by the allocator's records and includes the gradients. The plain form is left out where it
would need more than `--memory` GiB. Losses and gradients are compared, and must agree.

    python benchmarks/cross_entropy.py             # small cases, about a minute
    python benchmarks/cross_entropy.py --full      # N 1024, 4096; K 16384, 262144
    python benchmarks/cross_entropy.py --tokens 6144 --sizes 16384 --device cuda --dtype bfloat16 [--json FILE]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from measure import peak_bytes

from tessera.generators import scores

QUICK = ((256, 16384), (1024, 16384), (256, 65536))
TOKENS, SIZES = (1024, 4096), (16384, 262144)
PLAIN_TABLES = 4  # of N x K float32 that the plain form holds at once, at most


def step(tile_bytes: int, inputs: tuple[Tensor, Tensor], targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and gradients of features and weight, by tiles of so many bytes."""
    scores.TILE_BYTES = tile_bytes
    losses, _ = scores.head_losses(*inputs, None, targets)
    return losses.detach(), *torch.autograd.grad(losses.mean(), inputs)


def seconds(function: Callable[[], Any], repeats: int, device: torch.device, patience: float) -> float:
    """Least time of a call; none is repeated once they took `patience` together."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times: list[float] = []
    while len(times) < repeats and sum(times) < patience:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return min(times)


def difference(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest difference, relative to the largest value of each tensor."""
    gaps = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(actual, expected, strict=True)]
    return torch.stack(gaps).max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the sizes of the claim")
    parser.add_argument("--tokens", type=int, nargs="+", help="N, rows of features")
    parser.add_argument("--sizes", type=int, nargs="+", help="K, codes")
    parser.add_argument("--dim", default=1024, type=int)
    parser.add_argument("--tile-mib", default=[16, 256], type=float, nargs="+", help="logits alive at once")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--memory", default=6.0, type=float, help="GiB that the plain form may take")
    parser.add_argument("--repeats", default=3, type=int, help="runs of each, of which the best counts")
    parser.add_argument("--patience", default=120.0, type=float, help="seconds after which no run is repeated")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    tokens, sizes = options.tokens or TOKENS, options.sizes or SIZES
    cases = [(n, k) for n in tokens for k in sizes]
    if not (options.full or options.tokens or options.sizes):
        cases = QUICK
    dtype, rows = getattr(torch, options.dtype), []
    print(f"{options.device}, {options.dtype}, d = {options.dim}: forward and backward")
    for n, k in cases:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(n, options.dim, generator=generator)
        weight = 0.02 * torch.randn(k, options.dim, generator=generator)
        inputs = tuple(value.to(options.device, dtype).requires_grad_() for value in (features, weight))
        targets = torch.randint(0, k, (n, 1), generator=generator).to(options.device)
        budgets = [int(mib * 2**20) for mib in options.tile_mib]
        if 4 * n * k * PLAIN_TABLES <= options.memory * 2**30:
            budgets = [0, *budgets]  # 0: plain
        plain = None
        for budget in budgets:

            def run(budget: int = budget, inputs: tuple = inputs, targets: Tensor = targets) -> tuple[Tensor, ...]:
                return step(budget or 2**62, inputs, targets)

            if 0 < 4 * n * k <= budget:
                continue  # it would be the plain form
            row = {"tokens": n, "size": k, "tile_bytes": budget or None, "device": str(options.device)}
            row["seconds"] = seconds(run, options.repeats, options.device, options.patience)
            row["peak_bytes"] = peak_bytes(run, options.device)
            line = f"N {n:5d}, K {k:6d}: {row['seconds']:8.3f} s, peak {row['peak_bytes'] / 2**20:7.0f} MiB, "
            if budget == 0:
                plain, expected = row, run()
                line += "plain"
            else:
                line += f"tiles of {budget / 2**20:.0f} MiB"
            if budget and plain:
                row["difference"] = difference(run(), expected)
                row["time_ratio"] = row["seconds"] / plain["seconds"]
                row["memory_ratio"] = row["peak_bytes"] / plain["peak_bytes"]
                line += f": {row['time_ratio']:.2f}x the time, {row['memory_ratio']:.2f}x the memory"
                if row["difference"] > (1e-3 if options.dtype == "float32" else 5e-2):
                    raise SystemExit(f"{line}; they differ by {row['difference']:.1e}, the comparison is void")
            print(line, flush=True)
            rows.append(row)
        if plain is None:
            print(f"N {n:5d}, K {k:6d}: plain skipped, it needs about {4 * n * k * PLAIN_TABLES / 2**30:.0f} GiB")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
