"""Frechet distance: symmetric eigenproblems against the usual ways, and accumulating second moments.

    python benchmarks/fid.py --d 512 --n 2000

All variants run in one process on the same data, the repeats interleaved; the ratio is of the medians.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tessera.metrics.fid import frechet_distance


def spread(variants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant, the repeats interleaved so that other load hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(title: str, seconds: dict[str, list[float]], baseline: str) -> None:
    """Print medians, ranges and ratios to the baseline."""
    lines = [title]
    base = statistics.median(seconds[baseline])
    for name, values in seconds.items():
        median = statistics.median(values)
        lines.append(
            f"  {name:<40} {median * 1e3:10.1f} ms  ({min(values) * 1e3:.1f}..{max(values) * 1e3:.1f})"
            f"  {base / median:6.2f}x"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def by_numpy_eigvals(mu1: Tensor, s1: Tensor, mu2: Tensor, s2: Tensor) -> float:
    """torch-fidelity 0.4: eigenvalues of the non-symmetric product."""
    root = np.sqrt(np.linalg.eigvals((s1 @ s2).numpy()).astype(complex)).real.sum()
    return float((mu1 - mu2).square().sum() + s1.trace() + s2.trace()) - 2 * float(root)


def by_torch_eigvals(mu1: Tensor, s1: Tensor, mu2: Tensor, s2: Tensor) -> float:
    """torchmetrics 1.9: the same by torch."""
    root = torch.linalg.eigvals(s1 @ s2).sqrt().real.sum()
    return float((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * root)


def by_sqrtm(mu1: Tensor, s1: Tensor, mu2: Tensor, s2: Tensor) -> float:
    """ADM and pytorch-fid: the matrix square root."""
    from scipy.linalg import sqrtm

    root = np.trace(sqrtm((s1 @ s2).numpy())).real
    return float((mu1 - mu2).square().sum() + s1.trace() + s2.trace()) - 2 * float(root)


def by_eigh(mu1: Tensor, s1: Tensor, mu2: Tensor, s2: Tensor) -> float:
    """Our fallback: eigenvectors in place of the Cholesky factor."""
    values, vectors = torch.linalg.eigh(s1)
    root = vectors * values.clamp_min(0).sqrt()
    inner = torch.linalg.eigvalsh(root.T @ s2 @ root).clamp_min(0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + s1.trace() + s2.trace() - 2 * inner)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=512, help="features (2048 for Inception)")
    parser.add_argument("--n", type=int, default=2000, help="samples per side")
    parser.add_argument("--batch", type=int, default=50, help="samples per update")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sqrtm", action="store_true", help="also time scipy's matrix square root")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(options.d) + 0.3 * torch.randn(options.d, options.d, generator=generator) / options.d**0.5
    x, y = (torch.randn(options.n, options.d, generator=generator) @ mix * scale for scale in (1.0, 1.1))
    sides = [(z.double().mean(0), z.double().T.cov()) for z in (x, y)]
    arguments = (*sides[0], *sides[1])

    ways = {
        "numpy eigvals (torch-fidelity)": by_numpy_eigvals,
        "torch eigvals (torchmetrics)": by_torch_eigvals,
        "eigh + eigvalsh (ours, singular)": by_eigh,
        "Cholesky + eigvalsh (ours)": lambda *a: float(frechet_distance(*a)),
    }
    if options.sqrtm:
        ways = {"scipy sqrtm (ADM)": by_sqrtm} | ways
    values = {name: way(*arguments) for name, way in ways.items()}
    worst = max(abs(value - values["torch eigvals (torchmetrics)"]) for value in values.values())
    seconds = spread({name: lambda way=way: way(*arguments) for name, way in ways.items()}, options.repeats)
    report(f"distance, d={options.d} (largest difference {worst:.1e})", seconds, "torch eigvals (torchmetrics)")

    def addmm() -> None:
        outer = torch.zeros(options.d, options.d, dtype=torch.float64)
        for part in x.split(options.batch):
            wide = part.double()
            outer.addmm_(wide.T, wide)

    def product() -> None:
        outer = torch.zeros(options.d, options.d, dtype=torch.float64)
        for part in x.split(options.batch):
            wide = part.double()
            outer = outer + wide.T @ wide

    def one_by_one() -> None:
        outer = torch.zeros(options.d, options.d, dtype=torch.float64)
        for row in x[: options.batch].double():
            outer += torch.outer(row, row)

    seconds = spread({"sum + X^T X (torchmetrics)": product, "addmm_ (ours)": addmm}, options.repeats)
    loops = spread({"": one_by_one}, 1)[""]
    seconds["outer product per sample (1d-tokenizer)"] = [loops[0] * options.n / options.batch]
    report(f"second moments of {options.n} samples, d={options.d}", seconds, "sum + X^T X (torchmetrics)")


if __name__ == "__main__":
    main()
