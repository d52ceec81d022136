"""Claim: RAR samples the same tokens several times faster than the loop the public code is built around.

Both samplers run alternately in one process on the same weights, labels and draws; their tokens are
compared and must be equal. The public loop is re-created from a description of its structure:

- both position tables, with all their rows, repeated for every sequence of the doubled batch and gathered at
  every step; raster orders rebuilt from one small tensor per sequence;
- the whole prefix embedded again at every step, of which the last row is used;
- keys and values grown by concatenation; an additive float mask at the first step;
- modulation by a product per layer, step and row of the doubled batch;
- the head on both halves, guidance weight from tensor operations.

    python benchmarks/rar_sampling.py [--size b] [--depth 24] [--batch 1] [--device cuda --dtype bfloat16]

The defaults (4 layers of RAR-B, 64 tokens) take well under a minute on one CPU core; `--depth 24 --steps 256` is
the published shape.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from measure import peak_bytes

from tessera.generators import RAR, SamplingConfig
from tessera.generators.inference import evaluating

# hidden size, depth, MLP size
SIZES = {"b": (768, 24, 3072), "l": (1024, 24, 4096), "xl": (1280, 32, 5120), "xxl": (1408, 40, 6144)}
TEMPERATURE, SCALE, POWER = 1.02, 4.0, 2.75


def linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    """Plain x W^T + b, without what our layer does for few rows."""
    return F.linear(x, layer.weight, layer.bias)


class PublicLoop:
    """The published sampling loop's structure on a RAR's weights (one branch)."""

    def __init__(self, model: RAR):
        self.model = model
        rows = model.pos_embed.shape[1]
        self.mask = torch.full((rows, rows), -math.inf, device=model.pos_embed.device).triu(1)
        self.mask = self.mask.to(model.pos_embed.dtype)

    def __call__(self, labels: Tensor, noise: Tensor) -> Tensor:
        """(B,) labels and Exp(1) noise (L, B, K) -> (B, 1, L) tokens."""
        model, batch, device = self.model, len(labels), labels.device
        conditions = torch.cat([model.condition_ids(labels), torch.full_like(labels, model.none_id)])
        ids = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * len(model.blocks)
        with evaluating(model):
            for step in range(model.num_tokens):
                logits = self.forward(torch.cat([ids, ids]), conditions)[:, -1]
                conditional, unconditional = logits.chunk(2)
                ratio = torch.tensor(step / model.num_tokens, device=device) ** POWER
                weight = 1 + (SCALE - 1) * (1 - torch.cos(math.pi * ratio)) / 2
                logits = unconditional + weight * (conditional - unconditional)
                probs = (logits.float() / TEMPERATURE).softmax(-1)
                ids = torch.cat([ids, (probs / noise[step]).argmax(-1, keepdim=True)], 1)
        return ids[:, None]

    def forward(self, ids: Tensor, conditions: Tensor) -> Tensor:
        """(2B, t) tokens so far -> logits of the new positions."""
        model, rows, device = self.model, len(ids), ids.device
        length = model.num_tokens
        orders = torch.stack([torch.arange(length, device=device) for _ in range(rows)])
        positions = self.permuted(model.pos_embed, orders)
        targets = self.permuted(model.target_aware_pos_embed, orders)
        content = torch.cat([model.embeddings(conditions)[:, None], model.embeddings(ids)], 1)
        count = content.shape[1]
        x = content + positions[:, 1 : 1 + count] + targets[:, 2 : 2 + count]
        x = torch.cat([model.cls_token.expand(rows, -1, -1) + positions[:, :1], x], 1)
        steps = model.timesteps_embeddings[:, : x.shape[1]].expand(rows, -1, -1)
        condition = model.embeddings(conditions)[:, None] + steps
        if self.past[0] is not None:
            x, condition = x[:, -1:], condition[:, -1:]
        for index, block in enumerate(model.blocks):
            x = self.block(block, x, condition, index)
        scale, shift = linear(model.adaln_before_head.adaLN_modulation[1], F.silu(condition)).chunk(2, -1)
        return linear(model.lm_head, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)

    @staticmethod
    def permuted(table: Tensor, orders: Tensor) -> Tensor:
        """The whole table for every row, with the image's places in each row's order."""
        rows, length = orders.shape
        full = table.repeat(rows, 1, 1)
        places = full[:, 2 : 2 + length].gather(1, orders[..., None].expand(-1, -1, full.shape[-1]))
        return torch.cat([full[:, :2], places, full[:, 2 + length :]], 1)

    def block(self, block: torch.nn.Module, x: Tensor, condition: Tensor, index: int) -> Tensor:
        modulation = linear(block.adaLN_modulation[1], F.silu(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
        x = x + gate1 * self.attention(block.attn, block.norm1(x) * (1 + scale1) + shift1, index)
        hidden = F.gelu(linear(block.mlp.fc1, block.norm2(x) * (1 + scale2) + shift2))
        return x + gate2 * linear(block.mlp.fc2, hidden)

    def attention(self, layer: torch.nn.Module, x: Tensor, index: int) -> Tensor:
        rows, count, dim = x.shape
        qkv = linear(layer.qkv, x).view(rows, count, 3, layer.num_heads, dim // layer.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k, mask = layer.q_norm(q), layer.k_norm(k), self.mask[:count, :count]
        if self.past[index] is not None:
            k, v = torch.cat([self.past[index][0], k], 2), torch.cat([self.past[index][1], v], 2)
            mask = None
        self.past[index] = (k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return linear(layer.proj, out.transpose(1, 2).reshape(rows, count, dim))


def seconds(function: Callable[[], None], device: torch.device) -> float:
    """Wall seconds of one call on an accelerator; CPU seconds on the CPU, which other processes disturb less."""
    if device.type == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def build(options: argparse.Namespace) -> RAR:
    """RAR of the published width with weights spread enough for the blocks to matter."""
    hidden, depth, mlp = SIZES[options.size]
    torch.manual_seed(0)
    model = RAR(
        options.codebook_size, options.steps, 1000, hidden_size=hidden, depth=options.depth or depth, mlp_size=mlp
    )
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name == "cls_token":
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(options.device, getattr(torch, options.dtype)).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="b", choices=SIZES)
    parser.add_argument("--depth", default=4, type=int, help="blocks; 0: the size's published number")
    parser.add_argument("--batch", default=[1, 4], type=int, nargs="+")
    parser.add_argument("--steps", default=64, type=int, help="tokens of an image")
    parser.add_argument("--codebook-size", default=1024, type=int)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", default=2, type=int, help="runs of each, of which the best counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    model = build(options)
    public, sampling = PublicLoop(model), SamplingConfig(TEMPERATURE, SCALE, POWER)
    name = f"RAR-{options.size.upper()}, {len(model.blocks)} layers, {options.steps} tokens, {options.dtype}"
    print(f"{name}, {options.device}")
    results = []
    for batch in options.batch:
        generator = torch.Generator().manual_seed(batch)
        labels = torch.randint(0, 1000, (batch,), generator=generator).to(options.device)
        noise = torch.empty(options.steps, batch, options.codebook_size).exponential_(generator=generator)
        noise = noise.clamp_min(1e-7).to(options.device)

        tokens: dict[str, Tensor] = {}

        def ours(labels: Tensor = labels, noise: Tensor = noise, tokens: dict = tokens) -> None:
            draw = lambda probs, step: (probs / noise[step][:, None]).argmax(-1)  # noqa: E731
            tokens["ours"] = model.generate(labels, sampling, rng=draw)

        def theirs(labels: Tensor = labels, noise: Tensor = noise, tokens: dict = tokens) -> None:
            tokens["public"] = public(labels, noise)

        times = [[seconds(sampler, options.device) for sampler in (theirs, ours)] for _ in range(options.repeats)]
        public_seconds, ours_seconds = (min(column) for column in zip(*times, strict=True))
        agreement = (tokens["ours"] == tokens["public"]).float().mean().item()
        if options.dtype == "float32" and agreement < 1:
            raise SystemExit(f"batch {batch}: tokens differ (agreement {agreement:.4f}); the comparison is void")
        row = {"case": name, "device": str(options.device), "batch": batch, "agreement": agreement}
        row |= {"public_seconds": public_seconds, "ours_seconds": ours_seconds, "ratio": public_seconds / ours_seconds}
        line = (
            f"batch {batch:4d}: public loop {public_seconds:8.3f} s, ours {ours_seconds:8.3f} s, {row['ratio']:.2f}x; "
            f"{batch / ours_seconds:.2f} images/s; tokens equal {agreement:.1%}"
        )
        if options.device.type == "cuda":
            row["public_peak_bytes"] = peak_bytes(theirs, options.device)
            row["ours_peak_bytes"] = peak_bytes(ours, options.device)
            line += f"; peak {row['public_peak_bytes'] / 2**20:.0f} / {row['ours_peak_bytes'] / 2**20:.0f} MiB"
        results.append(row)
        print(line)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
