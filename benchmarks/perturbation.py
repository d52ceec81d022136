"""Claim: latent perturbation costs little beyond the quantizer's forward, and nothing when it is off.

The public code searches the neighbours of every token, whatever share of the images uses them, on an N x K table. Here
only selected images are searched. Neighbours of codes are searched once per code in use while the codebook trains, and
gathered from a table while it stays as it is. All sides run in one process on the same data.

    python benchmarks/perturbation.py [--device cuda] [--repeats 5] [--json results.json]
"""

import argparse
import copy
import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from measure import peak_bytes, seconds

from tessera.perturbation import GaussianPerturbation, NearestCodePerturbation, Perturbation, RandomCodePerturbation
from tessera.quantizers import ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.rng import IndexedRng

SIZE, DIM, GRID, DELTA = 4096, 64, (16, 16), 100


def public_way(z: Tensor, z_q: Tensor, embedding: Tensor, alpha: float, beta: float, delta: int) -> Tensor:
    """Neighbours of all tokens on one N x K table, then only the first floor(beta B) images are used."""
    latents = F.normalize(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), dim=1)
    codes = F.normalize(embedding, dim=1)
    distances = latents.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * latents @ codes.t()
    neighbors = distances.topk(delta, dim=1, largest=False).indices
    rank = torch.randint(delta, (len(latents), 1), device=z.device)
    rank = torch.where(torch.rand(len(latents), 1, device=z.device) > alpha, 0, rank)
    chosen = codes[neighbors.gather(1, rank).squeeze(1)]
    replaced = latents + (chosen - latents).detach()
    replaced = replaced.view(z.shape[0], *z.shape[2:], z.shape[1]).permute(0, 3, 1, 2)
    first = torch.arange(z.shape[0], device=z.device) < int(beta * z.shape[0])
    return torch.where(first[:, None, None, None], replaced, z_q)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--batch", default=30, type=int)
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    device, batch = options.device, options.batch
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    codebook = partial(VQCodebook, codebook_size=SIZE)
    quantizer = ProductQuantizer(partial(SingleGridQuantizer, codebook=codebook), branches=1, dim=DIM).to(device)
    quantizer.bind_grid(GRID)
    z = torch.randn(batch, DIM, *GRID, device=device)
    clean = quantizer(z)
    embedding = quantizer.branches[0].codebooks[0].embedding
    # a step whose Bernoulli(beta) draw selects just beta * batch images, so that both sides perturb the same number
    index = torch.arange(batch, device=device)
    wanted = int(0.1 * batch)
    step = next(s for s in range(1000) if (IndexedRng(0, index, s).uniform("perturb/image") < 0.1).sum() == wanted)

    def ours(strategy: Perturbation, codes: ProductQuantizer = quantizer) -> Tensor:
        return strategy(codes, z, clean, progress=0.0, rng=IndexedRng(0, index, step))[0].z_q

    def after_a_step(strategy: Perturbation, codes: ProductQuantizer) -> Tensor:
        with torch.no_grad():
            codes.branches[0].codebooks[0].embedding.mul_(1.0001)
        return ours(strategy, codes)

    trained = copy.deepcopy(quantizer)
    frozen, training = (NearestCodePerturbation(1.0, 0.1, DELTA, neighbors_of="code") for _ in range(2))
    for _ in range(20):  # until as many codes were searched as there are, and the table is built
        ours(frozen)
    sides = {
        "quantizer forward": lambda: quantizer(z),
        "public, beta 0.1": lambda: public_way(z, clean.z_q, embedding, 1.0, 0.1, DELTA),
        "ours, beta 0.1": lambda: ours(NearestCodePerturbation(1.0, 0.1, DELTA)),
        "ours, beta 1": lambda: ours(NearestCodePerturbation(1.0, 1.0, DELTA)),
        "public, off": lambda: public_way(z, clean.z_q, embedding, 0.0, 0.0, DELTA),
        "ours, off": lambda: ours(NearestCodePerturbation(1.0, 0.0, DELTA)),
        "of codes, training": lambda: after_a_step(training, trained),
        "of codes, frozen": lambda: ours(frozen),
        "random codes": lambda: ours(RandomCodePerturbation(1.0, 0.1)),
        "noise": lambda: ours(GaussianPerturbation(1.0, 0.1, std=0.5)),
    }
    times = {name: seconds(side, options.repeats, device) for name, side in sides.items()}
    memory = {name: peak_bytes(side, device) for name, side in sides.items()}
    forward = times["quantizer forward"]
    print(f"{batch} images of {GRID[0]}x{GRID[1]} tokens, {SIZE} codes of {DIM} dimensions, delta {DELTA}")
    for name in sides:
        print(
            f"{name:20s} {times[name] * 1e3:9.2f} ms  {times[name] / forward:7.2%} of the quantizer's forward  "
            f"peak {memory[name] / 2**20:7.1f} MiB"
        )
    for case in ("beta 0.1", "off"):
        print(f"public / ours, {case}: {times[f'public, {case}'] / times[f'ours, {case}']:.1f}x")
    if options.json:
        options.json.write_text(json.dumps({"seconds": times, "peak_bytes": memory}, indent=2) + "\n")


if __name__ == "__main__":
    main()
