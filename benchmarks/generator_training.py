"""Claim: a training step of each generator runs near the machine's matrix-product rate, and no slower than a plain one.

Ours and a plain step alternate in one process on the same weights, tokens and draws; their losses must agree. The
plain step is how the public training code is built, by a description of its structure:

- attention behind a dense additive float mask, in place of a causal flag (RAR, Llama) or of a call per scale (VAR);
- RAR's orders from a Python loop over samples, and both position tables repeated for every sample and gathered;
- the logits of all tokens and codes at once;
- loss and accuracy read back to the host at every step.

A step is a forward and a backward pass; no optimizer, which is the same on both sides. Dropout is off, as its draws
would differ. The rate is that of the machine's own square matrix product in the same type, measured in the same run;
FLOPs count 2 per multiply-add of what the model needs: attention to visible positions, no recomputation.

    python benchmarks/generator_training.py [--models rar var] [--full] [--batch 32]
        [--device cuda --dtype bfloat16] [--compile] [--checkpoint]

The defaults (full width, 2 layers, 2 images) take less than a minute of one CPU core.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from measure import clock, peak_bytes

from tessera.generators import RAR, VAR, Generator, Llama, MaskGITViT, rar, scores, var_layers
from tessera.quantizers import MultiScaleQuantizer, ProductQuantizer, SingleGridQuantizer, VQCodebook
from tessera.rng import IndexedRng

CLASSES = 1000
VAR_GRIDS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


class Case(NamedTuple):
    """A published model: its class and options, depth, tokens (grids and codes), and the FLOPs of an image's forward
    pass as a function of the model and the number of layers."""

    name: str
    make: type[Generator]
    options: dict[str, object]
    depth: int
    grids: tuple[tuple[int, int], ...]
    codes: int
    flops: Callable[[Generator, int], float]


def causal(length: int) -> int:
    """Pairs of a position and one that it sees."""
    return length * (length + 1) // 2


def rar_flops(model: RAR, layers: int) -> float:
    """Blocks and their modulation at every position, attention, modulated head at all but the first."""
    d, length = model.hidden_size, model.num_tokens + 1
    mlp = model.blocks[0].mlp.fc1.out_features
    positions = layers * (4 * d * d + 2 * d * mlp + 6 * d * d)
    head = d * model.num_branches * model.codebook_size + 2 * d * d
    return 2 * (length * positions + model.num_tokens * head + 2 * d * layers * causal(length))


def llama_flops(model: Llama, layers: int) -> float:
    """Blocks at every position, modulation once, attention, head."""
    d, length = model.hidden_size, model.num_tokens
    mlp = model.blocks[0].feed_forward.w1.out_features
    head = d * model.num_branches * model.codebook_size
    modulation = 6 * layers * d * d + 2 * d * d
    return 2 * (length * (layers * (4 * d * d + 3 * d * mlp) + head) + modulation + 2 * d * layers * causal(length))


def var_flops(model: VAR, layers: int) -> float:
    """Blocks at every position, modulation once, attention of each scale to those up to it, head, word embedding."""
    d, length = model.hidden_size, model.num_tokens
    mlp = model.blocks[0].ffn.fc1.out_features
    seen, pairs = 0, 0
    for size in model.scale_sizes:
        seen += size
        pairs += size * seen
    head = d * model.num_branches * model.codebook_size
    word = (length - model.scale_sizes[0]) * model.latent_channels * d
    modulation = 6 * layers * d * d + 2 * d * d
    return 2 * (length * (layers * (4 * d * d + 2 * d * mlp) + head) + word + modulation + 2 * d * layers * pairs)


def maskgit_flops(model: MaskGITViT, layers: int) -> float:
    """Blocks at every position, attention of all to all, head."""
    d, length = model.pos_embed.shape[-1], model.num_tokens + 1
    mlp = model.blocks[0].mlp.fc1.out_features
    head = model.num_tokens * d * model.num_branches * model.codebook_size
    return 2 * (length * layers * (4 * d * d + 2 * d * mlp) + head + 2 * d * layers * length * length)


NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}
CASES = {
    "rar": Case("RAR-B", RAR, NO_DROPOUT, 24, ((16, 16),), 1024, rar_flops),
    "var": Case(
        "VAR-d16", VAR, {"hidden_size": 1024, "num_heads": 16, "drop_path": 0.0}, 16,
        tuple((side, side) for side in VAR_GRIDS), 4096, var_flops,
    ),
    "llama": Case(
        "Llama-B", Llama, {"token_dropout": 0.0, "residual_dropout": 0.0, "mlp_dropout": 0.0}, 16, ((16, 16),), 16384,
        llama_flops,
    ),
    "maskgit": Case("MaskGIT-B64", MaskGITViT, NO_DROPOUT, 24, ((1, 64),), 4096, maskgit_flops),
}  # fmt: skip


def build(case: Case, depth: int, **changes: object) -> Generator:
    """The model with `depth` layers, in training mode, bound to a quantizer of its tokens."""
    codebook = partial(VQCodebook, codebook_size=case.codes)
    structure = SingleGridQuantizer if len(case.grids) == 1 else partial(MultiScaleQuantizer, grids=case.grids)
    quantizer = ProductQuantizer(partial(structure, codebook=codebook), 1, dim=32).eval().requires_grad_(False)
    quantizer.bind_grid(case.grids[-1])
    model = case.make(**{**case.options, **changes}, depth=depth, **case.make.sizes(quantizer, CLASSES))
    model.bind(quantizer)
    return model.train()


def dense_mask(visible: Tensor, like: Tensor) -> Tensor:
    """(L, L) additive float mask of bool `visible`."""
    return torch.zeros_like(visible, dtype=like.dtype).masked_fill(~visible, -torch.inf)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: object) -> Tensor:
    """`F.scaled_dot_product_attention` with a dense mask where a causal flag is given."""
    if options.pop("is_causal", False):
        length = q.shape[-2]
        attn_mask = dense_mask(torch.ones(length, length, dtype=torch.bool, device=q.device).tril(), q)
    return torch._C._nn.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)


def masked_scales(q: Tensor, k: Tensor, v: Tensor, sizes: list[int], factor: float) -> Tensor:
    """`scale_causal_attention` by one call with a dense mask."""
    scale = torch.arange(len(sizes), device=q.device).repeat_interleave(torch.tensor(sizes, device=q.device))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_mask(scale[:, None] >= scale, q), scale=factor)


def looped_orders(draws: IndexedRng, batch: int, length: int, ratio: float, device: torch.device) -> Tensor:
    """`sample_orders` by a loop over samples."""
    chosen, noise = draws.uniform("order/random"), draws.uniform("order/permutation", length)
    orders = []
    for row in range(batch):
        raster = torch.arange(length, device=device)
        orders.append(noise[row].to(device).argsort(stable=True) if chosen[row].item() < ratio else raster)
    return torch.stack(orders)


def repeated_tables(model: RAR, tokens: Tensor, conditions: Tensor, orders: Tensor) -> Tensor:
    """`RAR.sequence` from whole tables, repeated for every sample."""
    batch, _, length = tokens.shape
    places = (orders + 2)[..., None].expand(-1, -1, model.hidden_size)
    tables = []
    for table in (model.pos_embed, model.target_aware_pos_embed):
        whole = table.repeat(batch, 1, 1)
        moved = whole.gather(1, places)
        tables.append(torch.cat([whole[:, :2], moved, whole[:, 2 + moved.shape[1] :]], 1))
    condition, cls = model.embeddings(conditions)[:, None], model.cls_token.expand(batch, -1, -1)
    content = torch.cat([cls, condition, model.embed_tokens(tokens)], 1)
    target = tables[1][:, 2 : 2 + length + 1]
    return content + tables[0][:, : length + 2] + F.pad(target, (0, 0, 1, 0))


def full_losses(
    features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`head_losses` from all logits at once."""
    logits = F.linear(features, weight, bias).float().unflatten(-1, (targets.shape[1], -1))
    flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=label_smoothing)
    return flat.view_as(targets), logits.argmax(-1) == targets


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Inside, generators train the plain way."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(scores, "head_losses", full_losses))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", masked_attention))
        stack.enter_context(mock.patch.object(var_layers, "scale_causal_attention", masked_scales))
        stack.enter_context(mock.patch.object(rar, "sample_orders", looped_orders))
        stack.enter_context(mock.patch.object(RAR, "sequence", repeated_tables))
        yield


class Step:
    """Forward and backward pass of one batch; `losses` holds the last loss."""

    def __init__(self, model: Generator, tokens: Tensor, labels: Tensor, dtype: torch.dtype, is_plain: bool):
        self.model, self.tokens, self.labels, self.dtype, self.is_plain = model, tokens, labels, dtype, is_plain
        self.rng = IndexedRng(0, torch.arange(len(labels), device=labels.device))

    def __call__(self) -> None:
        kind, half = self.labels.device.type, self.dtype != torch.float32
        self.model.zero_grad()
        with plainly() if self.is_plain else contextlib.nullcontext():
            with torch.autocast(kind, self.dtype, enabled=half):
                result = self.model.loss(self.tokens, self.labels, progress=0.5, rng=self.rng)
            result["loss"].backward()
            self.loss = result["loss"].detach()
            if self.is_plain:
                self.loss.item(), result["accuracy"].item()


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, the best of several."""
    size = 1536 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    clock(lambda: a @ b, device)
    return 2 * size**3 / min(clock(lambda: a @ b, device) for _ in range(5))


def compare(case: Case, options: argparse.Namespace, rate: float) -> dict[str, object]:
    """Time, memory and rate of both steps; they must agree."""
    device, dtype = options.device, getattr(torch, options.dtype)
    depth = case.depth if options.full else options.depth
    torch.manual_seed(0)
    model = build(case, depth).to(device)
    shape = (options.batch, 1, model.num_tokens)
    tokens = torch.randint(0, case.codes, shape, device=device)
    labels = torch.randint(0, CLASSES, (options.batch,), device=device)
    plain, ours = (Step(model, tokens, labels, dtype, is_plain) for is_plain in (True, False))
    times, peaks = {"plain": [], "ours": []}, {}
    sides = {"plain": plain, "ours": ours}
    for name, step in sides.items():  # warms up, too
        configure(model, options, name)
        step()
        model.zero_grad()
        peaks[name] = peak_bytes(step, device)
    gap = abs(plain.loss.item() - ours.loss.item())
    if gap > (1e-4 if dtype == torch.float32 else 2e-2) * plain.loss.item():
        raise SystemExit(f"{case.name}: losses differ ({plain.loss} and {ours.loss}); the comparison is void")
    for _ in range(options.repeats):
        for name, step in sides.items():
            configure(model, options, name)
            times[name].append(clock(step, device))
    flops = 3 * options.batch * case.flops(model, depth)
    row: dict[str, object] = {"model": case.name, "layers": depth, "batch": options.batch, "tokens": model.num_tokens}
    row |= {"device": str(device), "dtype": options.dtype, "gflop": flops / 1e9, "loss": ours.loss.item()}
    for name in sides:
        best = min(times[name])
        row[name] = {
            "seconds": best,
            "tokens_per_second": options.batch * model.num_tokens / best,
            "peak_bytes": peaks[name],
            "share_of_matmul_rate": flops / best / rate,
        }
    row["ratio"] = row["plain"]["seconds"] / row["ours"]["seconds"]
    return row


def configure(model: Generator, options: argparse.Namespace, side: str) -> None:
    """Recomputation and compiled blocks for our side alone."""
    model.checkpoint_blocks = options.checkpoint and side == "ours"
    for block in model.blocks:
        if options.compile and side == "ours":
            if block._compiled_call_impl is None:
                block.compile()
        else:
            block._compiled_call_impl = None


def report(row: dict[str, object]) -> str:
    parts = [f"{row['model']}, {row['layers']} layers, batch {row['batch']}: {row['ratio']:.2f}x"]
    for side in ("plain", "ours"):
        figures = row[side]
        parts.append(
            f"{side} {1e3 * figures['seconds']:.1f} ms/step, {figures['tokens_per_second']:.0f} tokens/s, "
            f"peak {figures['peak_bytes'] / 2**20:.0f} MiB, {figures['share_of_matmul_rate']:.0%} of the matmul rate"
        )
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=list(CASES), choices=CASES, nargs="+")
    parser.add_argument("--depth", default=2, type=int, help="layers")
    parser.add_argument("--full", action="store_true", help="the published number of layers")
    parser.add_argument("--batch", default=2, type=int, help="images")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="by autocast")
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--checkpoint", action="store_true", help="recompute our blocks in the backward pass")
    parser.add_argument("--repeats", default=2, type=int, help="steps of each side, of which the best counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    rate = matmul_rate(options.device, getattr(torch, options.dtype))
    print(f"{options.device}, {options.dtype}: matrix product {rate / 1e9:.0f} GFLOP/s")
    rows = []
    for name in options.models:
        rows.append(compare(CASES[name], options, rate))
        print(report(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"matmul_rate": rate, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
