"""Claim: exact nearest-code search in tiles is faster than the three-term N x K table, and needs a fraction of its
memory.

Both sides run alternately in one process on the same data; the codes they find are compared. The bound is the bare
product x E^T, which any exact search must compute.

    python benchmarks/nearest_code.py [--device cuda] [--repeats 5] [--json results.json]
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from measure import peak_bytes, seconds

from tessera.quantizers import nearest_codes

# name, N (batch times tokens), K, D, normalised
CASES = [
    ("XQ-GAN 4096x64, 32 images", 32 * 256, 4096, 64, True),
    ("plain 4096x64, 32 images", 32 * 256, 4096, 64, False),
    ("LlamaGen 16384x8, 16 images", 16 * 256, 16384, 8, True),
    ("IBQ 262144x256, 1 image", 256, 262144, 256, False),
]


def three_terms(x: Tensor, codebook: Tensor) -> Tensor:
    """|x|^2 + |e|^2 - 2 x.e over all pairs, as the public tokenizers write it."""
    distances = x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * x @ codebook.t()
    return distances.argmin(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    device = options.device
    if device.type == "cpu":
        torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    results = []
    for name, n, k, d, normalized in CASES:
        x, codebook = (torch.randn(size, d, generator=generator).to(device) for size in (n, k))
        if normalized:
            x, codebook = F.normalize(x, dim=1), F.normalize(codebook, dim=1)
        metric = "dot" if normalized else "euclidean"

        def ours(x=x, codebook=codebook, metric=metric) -> Tensor:
            return nearest_codes(x, codebook, metric=metric)

        def naive(x=x, codebook=codebook) -> Tensor:
            return three_terms(x, codebook)

        def product(x=x, codebook=codebook) -> Tensor:
            return x @ codebook.t()

        times = {f.__name__: seconds(f, options.repeats, device) for f in (naive, ours, product)}
        memory = {f.__name__: peak_bytes(f, device) for f in (naive, ours)}
        result = {
            "case": name,
            "agreement": (naive() == ours()).float().mean().item(),
            "seconds": times,
            "peak_bytes": memory,
            "speedup": times["naive"] / times["ours"],
            "memory_ratio": memory["naive"] / memory["ours"],
            "over_bare_product": times["ours"] / times["product"],
        }
        results.append(result)
        print(
            f"{name:30s} {result['speedup']:5.2f}x faster  {result['memory_ratio']:7.1f}x less memory "
            f"({memory['naive'] / 2**20:.0f} -> {memory['ours'] / 2**20:.1f} MiB)  "
            f"{result['over_bare_product']:.2f}x of the bare product  same codes {result['agreement']:.4%}"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
