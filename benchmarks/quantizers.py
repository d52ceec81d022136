"""Claim: exact quantizers need no N x K table, and are faster without one.

Per case, in one run, on the same latents and codes: our quantizer, the same formula on N x K tables as public
tokenizers write it (naive), and vector-quantize-pytorch where it has such a quantizer. For search and vq also the
bound: block-wise products with a row maximum, in several block sizes. Sides run one after the other, each the best of
several runs after one to warm up; peak memory is by the allocator's records and includes gradients. Sides that would
need more than `--memory` (by default 60 % of what is free) or take more than `--patience` are named and left out.

`search`: the codes alone. `vq`: unit vectors, codebook and commitment loss; the library's with its moving averages
instead of a gradient of the codes. `ibq`: with both entropy terms. `lfq`, `bsq`: log2 K bits (whatever d), entropy
terms: ours in closed form over bits, naive over the K codes; the library computes entropies in training only. `mslfq`,
`msbsq`: those bits on ten grids up to 16 x 16, of N / 256 images; naive differs in the entropy terms alone.

    python benchmarks/quantizers.py           # a few sizes, minutes
    python benchmarks/quantizers.py --all     # N 1024, 16384; d 32, 64, 256; K 4096, 16384, 262144: an hour or two
    python benchmarks/quantizers.py --kinds ibq --tokens 1024 --dims 256 --sizes 262144 [--device cuda] [--json FILE]
"""

import argparse
import importlib.util
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from measure import peak_bytes, seconds

import tessera.quantizers as ours
from tessera.quantizers import IBQCodebook, MultiScaleQuantizer, VQCodebook, nearest_codes
from tessera.quantizers.multiscale import rows_of

KINDS = ("search", "vq", "ibq", "lfq", "bsq", "mslfq", "msbsq")
BINARY = KINDS[3:]
QUICK = [(1024, 64, 4096), (1024, 256, 16384), (1024, 256, 262144)]
TOKENS, DIMS, SIZES = (1024, 16384), (32, 64, 256), (4096, 16384, 262144)
GRIDS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
LIBRARY = "vector-quantize-pytorch"
# N x K tables of 4 bytes that a side holds at its peak (forward, forward+backward), measured at small sizes, to refuse
# in time what can't fit
TABLES = {
    "naive": {"search": (3, 3), "vq": (4, 4), "ibq": (8, 9), "lfq": (5, 6), "mslfq": (5, 24)},
    LIBRARY: {"vq": (5, 5), "lfq": (0, 8)},
}
for _tables in TABLES.values():
    _tables |= {kind.replace("lfq", "bsq"): tables for kind, tables in _tables.items() if "lfq" in kind}

# latents (N, d) with gradient -> (quantised (N, d) or None, indices (N,), loss)
Quantize = Callable[[Tensor], tuple[Tensor | None, Tensor, Tensor | None]]


@dataclass
class Side:
    """One implementation: what to call, and the parameters its backward pass fills."""

    name: str
    quantize: Quantize
    module: nn.Module | None = None
    parameters: tuple[Tensor, ...] = ()


@dataclass
class Result:
    """A line of the table; `tables` is the peak in units of one N x K float32 table."""

    kind: str
    tokens: int
    dim: int
    size: int
    what: str
    precision: str
    side: str
    seconds: float
    over_ours: float
    peak_bytes: int
    tables: float
    same_codes: float


def straight_through(latents: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors and the sum of codebook and commitment loss."""
    loss = F.mse_loss(codes, latents.detach()) + 0.25 * F.mse_loss(latents, codes.detach())
    return latents + (codes - latents).detach(), loss


def naive_distances(x: Tensor, codes: Tensor) -> Tensor:
    """|x|^2 + |e|^2 - 2 x.e over all pairs, as the public tokenizers write it."""
    return x.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * x @ codes.t()


def naive_entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    mean = p.mean(0)
    return -(p * log_p).sum(1).mean(), (mean * (mean + 1e-5).log()).sum()


class NaiveVQ(nn.Module):
    def __init__(self, codes: Tensor):
        super().__init__()
        self.codes = nn.Parameter(codes.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, codes = F.normalize(x, dim=1), F.normalize(self.codes, dim=1)
        indices = naive_distances(x, codes).argmin(1)
        vectors, loss = straight_through(x, codes[indices])
        return vectors, indices, loss


class NaiveIBQ(nn.Module):
    def __init__(self, codes: Tensor):
        super().__init__()
        self.codes = nn.Parameter(codes.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.codes.t()
        soft = logits.softmax(1)
        indices = soft.argmax(1)
        hard = torch.zeros_like(logits).scatter_(1, indices[:, None], 1.0)
        vectors, codes = (hard - soft.detach() + soft) @ self.codes, hard @ self.codes
        loss = F.mse_loss(vectors, x) + F.mse_loss(x, codes.detach()) + 0.25 * F.mse_loss(codes, x.detach())
        sample, batch = naive_entropies(logits / 0.01)
        return vectors, indices, loss + 0.05 * (sample + batch)


class NaiveBinary(nn.Module):
    """LFQ, on the unit sphere BSQ, with entropies over all K sign patterns."""

    def __init__(self, bits: int, spherical: bool, device: torch.device):
        super().__init__()
        self.scale, self.spherical = bits**-0.5 if spherical else 1.0, spherical
        self.place = 2 ** torch.arange(bits, device=device)
        patterns = (torch.arange(2**bits, device=device)[:, None] & self.place) != 0
        self.codes = (2.0 * patterns - 1) * self.scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.normalize(x, dim=1) if self.spherical else x
        positive = x > 0
        codes = (2.0 * positive - 1) * self.scale
        sample, batch = naive_entropies(2 * x @ self.codes.t())
        return x + (codes - x).detach(), (positive * self.place).sum(1), F.mse_loss(x, codes) + 0.1 * (sample + batch)


def naive_penalties(codebook: nn.Module, device: torch.device) -> Callable[..., dict[str, Tensor]]:
    """Entropy terms of a binary codebook over its K codes, to stand in for its own `penalties`."""
    codes = codebook.lookup(torch.arange(codebook.codebook_size, device=device))

    def penalties(x: Tensor, mask: Tensor | None = None, gain: float = 1.0) -> dict[str, Tensor]:
        sample, batch = naive_entropies(2 * gain * x @ codes.t())
        return {"entropy_sample": sample, "entropy_batch": batch}

    return penalties


def our_loss(losses: dict[str, Tensor]) -> Tensor:
    weights = {"joint": 1.0, "codebook": 1.0, "commitment": 0.25, "entropy_sample": 0.05, "entropy_batch": 0.05}
    if "joint" in losses:
        weights |= {"commitment": 1.0, "codebook": 0.25}
    return sum(weights[name] * value for name, value in losses.items())


def codebook_side(codebook: nn.Module) -> Side:
    def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = codebook(x)
        return out.vectors, out.indices, our_loss(out.losses)

    return Side("ours", quantize, codebook, tuple(codebook.parameters()))


def module_side(name: str, module: nn.Module) -> Side:
    return Side(name, module, module, tuple(p for p in module.parameters() if p.requires_grad))


def library_side(module: nn.Module, reverse: bool = False) -> Side:
    def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # of bits, the library makes the first channel the highest
        vectors, indices, loss = module((x.flip(1) if reverse else x)[None])
        return vectors[0], indices[0], loss.sum()

    return Side(LIBRARY, quantize, module, tuple(p for p in module.parameters() if p.requires_grad))


def multiscale_side(name: str, codebook: Callable[..., nn.Module], dim: int, device: torch.device) -> Side:
    torch.manual_seed(0)  # of phi, so that the sides walk through the same residuals
    quantizer = MultiScaleQuantizer(dim, codebook, GRIDS).to(device)
    if name == "naive":
        for unit in quantizer.codebooks:
            unit.penalties = naive_penalties(unit, device)

    def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = quantizer(x.view(-1, GRIDS[-1], GRIDS[-1], dim).permute(0, 3, 1, 2))
        return rows_of(out.z_q), out.tokens, our_loss(out.losses)

    return Side(name, quantize, quantizer, tuple(quantizer.parameters()))


def bound(x: Tensor, codes: Tensor, scores: int) -> Tensor:
    rows = max(16, scores // len(codes))
    return torch.cat([(part @ codes.t()).max(1).indices for part in x.split(rows)])


def bounds(codes: Tensor) -> Iterator[Side]:
    """Block-wise searches for unit codes, in the block sizes that are fastest."""
    for scores in (18, 20, 22) if codes.device.type == "cpu" else (25, 28):
        yield Side(f"bound, blocks of 2^{scores}", lambda x, s=scores: (None, bound(x, codes, 1 << s), None))


def sides(kind: str, what: str, x: Tensor, codes: Tensor) -> Iterator[Side]:
    """The implementations of a kind, ours first; made one by one, so that each has the memory to itself."""
    (size, dim), device = codes.shape, x.device
    installed = importlib.util.find_spec("vector_quantize_pytorch")
    library = importlib.import_module("vector_quantize_pytorch") if installed else None
    if kind == "search":
        unit = F.normalize(codes, dim=1)
        yield Side("ours", lambda x: (None, nearest_codes(x, unit, metric="dot"), None))
        yield Side("naive", lambda x: (None, naive_distances(x, unit).argmin(1), None))
        yield from bounds(unit)
    elif kind in ("vq", "ibq"):
        codebook = (VQCodebook if kind == "vq" else IBQCodebook)(dim, size).to(device)
        with torch.no_grad():
            codebook.embedding.copy_(codes)
        yield codebook_side(codebook)
        del codebook
        if kind == "vq" and what == "forward":
            yield from bounds(F.normalize(codes, dim=1))
        yield module_side("naive", (NaiveVQ if kind == "vq" else NaiveIBQ)(codes))
        if kind == "vq" and library:
            # its cosine codebook learns by moving averages only; decay 1 does the work and leaves the codes as they are
            module = library.VectorQuantize(dim, size, use_cosine_sim=True, decay=1.0, rotation_trick=False).to(device)
            with torch.no_grad():
                module._codebook.embed.copy_(F.normalize(codes, dim=1)[None])
                module._codebook.embed_avg.copy_(module._codebook.embed)
            yield library_side(module)
    elif kind.startswith("ms"):
        codebook = partial(getattr(ours, f"{kind[2:].upper()}Codebook"), bits=dim)
        for name in ("ours", "naive"):
            yield multiscale_side(name, codebook, dim, device)
    else:
        yield codebook_side(getattr(ours, f"{kind.upper()}Codebook")(dim, bits=dim).to(device))
        yield module_side("naive", NaiveBinary(dim, kind == "bsq", device))
        if library:
            module = library.LFQ(dim=dim, codebook_size=size, spherical=kind == "bsq").to(device)
            yield library_side(module, reverse=True)


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return found[0] if found else 8 << 30


def too_large(kind: str, side: str, tokens: int, size: int, what: str, options: argparse.Namespace) -> str | None:
    """Why a side is left out; None: it fits."""
    needed = TABLES.get(side, {}).get(kind, (0, 0))[what == "forward+backward"] * 4 * tokens * size
    limit = 0.6 * available_bytes(options.device) if options.memory is None else options.memory * 2**30
    return None if needed < limit else f"needs about {needed / 2**30:.1f} GiB, more than {limit / 2**30:.1f}"


@contextmanager
def patience(limit: float) -> Iterator[None]:
    """Raise TimeoutError in the block after `limit` seconds, at the end of the operation that runs then."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, limit)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(
    kind: str, tokens: int, dim: int, size: int, what: str, half: bool, options: argparse.Namespace
) -> list[Result]:
    device = options.device
    if kind in BINARY:
        dim = round(math.log2(size))
    generator = torch.Generator().manual_seed(0)
    # the spread that IBQ's encoder has at initialisation; the other kinds don't depend on it
    x = (0.2 * torch.randn(tokens, dim, generator=generator)).to(device)
    codes = torch.randn(size, dim, generator=generator).to(device)
    upstream = torch.randn(tokens, dim, generator=generator).to(device)
    results: list[Result] = []
    reference = None
    for side in sides(kind, what, x, codes):
        case = f"{kind:6s} N={tokens:<5d} d={dim:<3d} K={size:<6d} {what:16s} {side.name}"
        reason = too_large(kind, side.name, tokens, size, what, options)
        if reason:
            print(f"  {case} skipped: {reason}", flush=True)
            continue
        if side.module is not None:
            side.module.train(what == "forward+backward")

        found: list[Tensor] = []

        def step(side: Side = side, found: list[Tensor] = found) -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                if what == "forward":
                    with torch.no_grad():
                        found[:] = [side.quantize(x)[1]]
                    return
                leaf = x.clone().requires_grad_()
                vectors, indices, loss = side.quantize(leaf)
            total = (vectors * upstream).sum() + loss
            torch.autograd.grad(total, (leaf, *side.parameters), allow_unused=True)
            found[:] = [indices]

        try:
            with patience(options.patience):
                time = seconds(step, options.repeats, device, options.limit)
                memory = peak_bytes(step, device)
        except TimeoutError as error:
            print(f"  {case} stopped: {error}", flush=True)
            continue
        reference = found[0] if reference is None else reference
        result = Result(
            kind=kind,
            tokens=tokens,
            dim=dim,
            size=size,
            what=what,
            precision="bf16" if half else "fp32",
            side=side.name,
            seconds=time,
            over_ours=time / (results[0].seconds if results else time),
            peak_bytes=memory,
            tables=memory / (4 * tokens * size),
            same_codes=(found[0].view(-1) == reference.view(-1)).float().mean().item(),
        )
        results.append(result)
        report(result)
    return results


def report(result: Result) -> None:
    print(
        f"  {result.kind:6s} N={result.tokens:<5d} d={result.dim:<3d} K={result.size:<6d} {result.what:16s} "
        f"{result.precision} {result.side:24s} {result.seconds * 1e3:10.1f} ms  {result.over_ours:6.2f}x ours  "
        f"{result.peak_bytes / 2**20:9.1f} MiB = {result.tables:7.3f} tables  same codes {result.same_codes:.2%}",
        flush=True,
    )


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int, int, int]]:
    chosen = (options.tokens, options.dims, options.sizes)
    if options.all or any(chosen):
        tokens, dims, sizes = (given or full for given, full in zip(chosen, (TOKENS, DIMS, SIZES), strict=True))
        grid = [(n, d, k) for n in tokens for k in sizes for d in dims]
    else:
        grid = QUICK
    for kind in options.kinds:
        # sign patterns have log2 K dimensions whatever d is
        once = {(n, 0, k): None for n, _, k in grid} if kind in BINARY else dict.fromkeys(grid)
        for case in once:
            yield kind, *case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    parser.add_argument("--threads", default=1, type=int, help="on a CPU")
    parser.add_argument("--all", action="store_true", help="every size")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--tokens", nargs="+", type=int, help="N")
    parser.add_argument("--dims", nargs="+", type=int, help="d")
    parser.add_argument("--sizes", nargs="+", type=int, help="K")
    parser.add_argument(
        "--passes", nargs="+", default=["forward", "forward+backward"], help="forward, forward+backward"
    )
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], help="default: fp32, with CUDA also bf16")
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--limit", default=5.0, type=float, help="seconds after which a measurement isn't repeated")
    parser.add_argument("--memory", type=float, help="GiB that a side may need; default: 60 %% of what is free")
    parser.add_argument("--patience", default=1800.0, type=float, help="seconds after which a side is stopped")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if any(n % GRIDS[-1] ** 2 for n in options.tokens or ()) and {"mslfq", "msbsq"} & set(options.kinds):
        parser.error(f"--tokens of mslfq and msbsq must be multiples of {GRIDS[-1] ** 2}, those of one image")
    if options.device.type == "cpu":
        torch.set_num_threads(options.threads)
    precisions = options.precision or (["fp32", "bf16"] if options.device.type == "cuda" else ["fp32"])
    if not importlib.util.find_spec("vector_quantize_pytorch"):
        print(f"  {LIBRARY} is not installed (requirements-dev.txt), left out")
    results: list[dict[str, Any]] = []
    for kind, tokens, dim, size in cases(options):
        for precision in precisions:
            for what in options.passes if kind != "search" else ["forward"]:
                lines = measured(kind, tokens, dim, size, what, precision == "bf16", options)
                results += [asdict(line) for line in lines]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
