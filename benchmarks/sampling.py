"""Claim: each generator samples the same tokens faster than the loop the public code is built around.

Ours and the plain loop (`benchmarks/plain/`, which says what each does) alternate in one process on the same weights,
labels and draws. In float32 their tokens must be equal, or no figure is printed.

The limit is the time that the call's products would take at the machine's matrix-product rate, or its bytes at the
machine's memory rate, whichever is longer; both rates are measured in the same run. Counted are, of the exact function,
2 FLOPs per multiply-add of the blocks at every position of both halves of guidance, of the modulation once per class
(RAR: and position), of the head once per sample, and of attention to what is visible; and the bytes of the weights at
every step and of all keys and values read.

    python benchmarks/sampling.py [--families rar var:d30] [--full] [--batch 1 8 64 128]
        [--device cuda --dtype bfloat16] [--compile]

The defaults (published width, 2 layers, 32 tokens of RAR and Llama) take about a minute on one CPU core.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import clock, peak_bytes
from plain import llama, maskgit, rar, var

from tessera.generators import Generator, MaskGITSampling, SamplingConfig
from tessera.generators.packing import is_large, onednn_linear, pack
from tessera.generators.sampling import make_draw
from tessera.rng import IndexedRng


class Work(NamedTuple):
    """What one call for B samples must do.

    rows: sequences in a step, both halves of guidance.
    positions: that each row feeds, over all steps.
    modulated: rows for which the modulation is projected.
    pairs: of a query and a key it sees, per row and layer.
    keys: read per row and layer, as each is shared by the queries of a step.
    heads: rows of the head.
    steps: after each of which all weights are read again.
    """

    rows: int
    positions: int
    modulated: int
    pairs: int
    keys: int
    heads: int
    steps: int


def sequence_work(model: Generator, batch: int, prefix: int, modulated: int) -> Work:
    """One position per step, after the first step's `prefix`."""
    length = model.num_tokens + prefix - 1
    pairs = length * (length + 1) // 2
    return Work(2 * batch, length, modulated, pairs, pairs, batch * model.num_tokens, model.num_tokens)


def rar_work(model: Generator, batch: int, sampling: SamplingConfig) -> Work:
    return sequence_work(model, batch, 2, (batch + 1) * (model.num_tokens + 1))


def llama_work(model: Generator, batch: int, sampling: SamplingConfig) -> Work:
    return sequence_work(model, batch, 1, batch + 1)


def var_work(model: Generator, batch: int, sampling: SamplingConfig) -> Work:
    keys = [sum(model.scale_sizes[: scale + 1]) for scale in range(len(model.scale_sizes))]
    pairs = sum(size * seen for size, seen in zip(model.scale_sizes, keys, strict=True))
    length = model.num_tokens
    return Work(2 * batch, length, batch + 1, pairs, sum(keys), batch * length, len(keys))


def maskgit_work(model: Generator, batch: int, sampling: MaskGITSampling) -> Work:
    weights = sampling.guidance_weights(sampling.num_steps) or [1.0] * sampling.num_steps
    rounds = sum(1 if weight == 1 else 2 for weight in weights)  # of B rows
    length, steps = model.num_tokens + 1, sampling.num_steps
    return Work(batch, rounds * length, 0, rounds * length**2, 0, batch * steps * (length - 1), steps)


class Family(NamedTuple):
    """A family's plain loop, its published sampling and code count, and what a call must do."""

    module: ModuleType
    loop: type
    size: str
    codes: int
    sampling: SamplingConfig
    work: Callable[[Generator, int, Any], Work]


FAMILIES = {
    "rar": Family(rar, rar.PlainRAR, "b", 1024, SamplingConfig(1.0, 16.0, 2.75), rar_work),
    "var": Family(
        var, var.PlainVAR, "d16", 4096,
        SamplingConfig(guidance_scale=2.5, guidance_schedule="ramp", top_k=900, top_p=0.96), var_work,
    ),
    "llama": Family(
        llama, llama.PlainLlama, "b", 16384, SamplingConfig(1.1, 2.25, guidance_schedule="constant"), llama_work
    ),
    "maskgit": Family(
        maskgit, maskgit.PlainMaskGIT, "l32", 4096,
        MaskGITSampling(
            gumbel_temperature=9.5, guidance_scale=5.5, guidance_schedule="linear", temperature=1.3, temperature_end=0.5
        ),
        maskgit_work,
    ),
}  # fmt: skip


def flops_and_bytes(model: Generator, work: Work) -> tuple[float, float]:
    """FLOPs of a call, and bytes that it must read."""
    linears = {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    (head,) = (weight for name, weight in linears.items() if name in ("head", "lm_head"))
    modulation = sum(weight.numel() for name, weight in linears.items() if "ada" in name.lower())
    blocks = sum(weight.numel() for weight in linears.values()) - modulation - head.numel()
    attention = work.rows * len(model.blocks) * 2 * head.shape[1]  # products, and numbers, per pair and per key
    products = work.rows * work.positions * blocks + work.modulated * modulation + work.heads * head.numel()
    read = work.steps * (blocks + head.numel()) + (modulation if work.modulated else 0) + attention * work.keys
    return 2.0 * (products + attention * work.pairs), float(head.element_size() * read)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, by the quickest way there is."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    ways = [lambda: a @ b]
    if is_large(b):
        layout = pack(b)
        ways.append(lambda: onednn_linear(a, layout, None))
    return 2 * size**3 / min(clock(way, device) for way in ways for _ in range(4))


def memory_rate(device: torch.device) -> float:
    """Bytes per second of the quicker of copying and reading."""
    source = torch.ones(2**26 if device.type == "cpu" else 2**29, device=device)
    target = torch.empty_like(source)
    copying = min(clock(lambda: target.copy_(source), device) for _ in range(4))
    reading = min(clock(lambda: source.sum(), device) for _ in range(4))
    return max(2 * source.nbytes / copying, source.nbytes / reading)


def compare(
    family: Family, model: Generator, batch: int, options: argparse.Namespace, rates: tuple[float, float]
) -> dict[str, Any]:
    """Both sides' figures for a batch.

    Raises:
        SystemExit: float32 tokens differ.
    """
    device = options.device
    labels = torch.randint(0, 1000, (batch,), generator=torch.Generator().manual_seed(batch)).to(device)
    loop, tokens = family.loop(model), {}

    def source() -> Any:
        """The same draws for both sides: belonging to step and sample."""
        rng = IndexedRng(0, torch.arange(batch, device=device))
        return rng if family.module is maskgit else make_draw(rng, batch, device)

    def ours() -> None:
        tokens["ours"] = model.generate(labels, family.sampling, rng=source())

    def plain() -> None:
        tokens["plain"] = loop(labels, family.sampling, source())

    peaks = [peak_bytes(side, device) for side in (plain, ours)]  # and warm up
    agreement = (tokens["ours"] == tokens["plain"]).float().mean().item()
    if options.dtype == "float32" and agreement < 1:
        raise SystemExit(f"batch {batch}: tokens differ (agreement {agreement:.4f}); the comparison is void")
    times = [[clock(side, device) for side in (plain, ours)] for _ in range(options.repeats)]
    plain_seconds, ours_seconds = (min(column) for column in zip(*times, strict=True))
    work = family.work(model, batch, family.sampling)
    flops, read = flops_and_bytes(model, work)
    limit = max(flops / rates[0], read / rates[1])
    return {
        "batch": batch,
        "agreement": agreement,
        "plain_seconds": plain_seconds,
        "ours_seconds": ours_seconds,
        "ratio": plain_seconds / ours_seconds,
        "images_per_second": batch / ours_seconds,
        "tokens_per_second": tokens["ours"].numel() / ours_seconds,
        "ms_per_step": 1000 * ours_seconds / work.steps,
        "plain_peak_bytes": peaks[0],
        "ours_peak_bytes": peaks[1],
        "limit_seconds": limit,
        "limit": "products" if flops / rates[0] > read / rates[1] else "memory",
        "of_limit": limit / ours_seconds,
        "plain_of_limit": limit / plain_seconds,
    }


def report(row: dict[str, Any]) -> str:
    """A row as a line."""
    return (
        f"  batch {row['batch']:4d}: plain {row['plain_seconds']:8.3f} s, ours {row['ours_seconds']:8.3f} s, "
        f"{row['ratio']:.2f}x; {row['images_per_second']:.3g} images/s, {row['tokens_per_second']:.4g} tokens/s, "
        f"{row['ms_per_step']:.3g} ms/step; {row['of_limit']:.0%} of the limit ({row['limit']}), plain "
        f"{row['plain_of_limit']:.0%}; peak {row['ours_peak_bytes'] / 2**20:.0f} MiB, plain "
        f"{row['plain_peak_bytes'] / 2**20:.0f}; tokens equal {row['agreement']:.1%}"
    )


def built(name: str, options: argparse.Namespace) -> tuple[Family, Generator, str]:
    """A family's model at a size, as `family` or `family:size`; and a title."""
    key, _, size = name.partition(":")
    if key not in FAMILIES:
        raise SystemExit(f"family {key!r} is unknown; choose from {', '.join(FAMILIES)}")
    family = FAMILIES[key]
    size = size or family.size
    if size not in family.module.SIZES:
        raise SystemExit(f"{key} has no size {size!r}; choose from {', '.join(family.module.SIZES)}")
    sizes = argparse.Namespace(
        size=size,
        depth=0 if options.full else options.depth,
        steps=256 if options.full else options.steps,
        codebook_size=family.codes,
        device=options.device,
        dtype=options.dtype,
    )
    model = family.module.build(sizes)
    if options.compile and model.can_compile_sampling:
        model.compile_sampling()
    how = ", compiled" if model.compiles_sampling else ", without a compiled step" if options.compile else ""
    tokens = f"{model.num_branches} x {model.num_tokens}" if model.num_branches > 1 else str(model.num_tokens)
    return family, model, f"{key} {size}, {len(model.blocks)} layers, {tokens} tokens, {options.dtype}{how}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=list(FAMILIES), nargs="+", help="each with its size behind a colon")
    parser.add_argument("--full", action="store_true", help="published depth and number of tokens")
    parser.add_argument("--depth", default=2, type=int, help="blocks; 0: the size's published number")
    parser.add_argument("--steps", default=32, type=int, help="tokens of an image of RAR and Llama")
    parser.add_argument("--batch", default=[1, 4], type=int, nargs="+")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="compile our step, where the generator has one")
    parser.add_argument("--repeats", default=2, type=int, help="runs of each, of which the best counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    rates = product_rate(options.device, getattr(torch, options.dtype)), memory_rate(options.device)
    where = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "CPU, one thread"
    print(f"{where}: {rates[0] / 1e9:.4g} GFLOP/s, {rates[1] / 1e9:.3g} GB/s")
    results = []
    for name in options.families:
        family, model, title = built(name, options)
        print(title)
        for batch in options.batch:
            row = compare(family, model, batch, options, rates)
            results.append({"case": title, "device": where, "flops_rate": rates[0], "bytes_rate": rates[1], **row})
            print(report(row), flush=True)
        del model
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
