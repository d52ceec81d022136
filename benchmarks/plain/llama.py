"""The loop by which the public code samples from IBQ's generators, on the weights of a `Llama`.

Re-created from a description of its structure:

- keys and values of all slots (positions rounded up to a multiple of 8) from the first step on, behind a boolean mask
  whose row is repeated for every sequence; both copied once more for grouped heads, which these models don't have;
- the modulation of every layer projected anew at each step, from the class of every row;
- the class token and then one token at a time, in both halves of guidance, each with its own product of the head;
- filters by a full sort of the codes.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.generators import Llama, SamplingConfig
from tessera.generators.llama_layers import LlamaBlock, RotaryAttention
from tessera.generators.sampling import Draw

# hidden size, depth and heads
SIZES = {"b": (1024, 16), "l": (1280, 20), "xl": (1536, 24), "xxl": (1920, 30)}


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Plain x W^T + b, without what our layer does for few rows."""
    return F.linear(x, layer.weight, layer.bias)


def rms_norm(layer: nn.RMSNorm, x: Tensor) -> Tensor:
    """By its formula, in float32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + layer.eps)).to(x.dtype) * layer.weight


def rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """Pairs of the last dimension of (R, N, H, D), turned by (N, D / 2, 2) cosines and sines."""
    pairs, factors = x.float().unflatten(-1, (-1, 2)), frequencies[None, :, None]
    turned = [
        pairs[..., 0] * factors[..., 0] - pairs[..., 1] * factors[..., 1],
        pairs[..., 1] * factors[..., 0] + pairs[..., 0] * factors[..., 1],
    ]
    return torch.stack(turned, -1).flatten(3).to(x.dtype)


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, K) logits with -inf where a code is out: top-k by the k-th value, then top-p by a full sort."""
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        values, order = logits.sort(descending=True)
        removed = values.softmax(-1).cumsum(-1) > top_p
        removed[..., 1:] = removed[..., :-1].clone()
        removed[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -torch.inf)
    return logits


class PlainLlama:
    """Sampling as in the public code.

    Args:
        model: of one branch and one grid, in eval mode.
    """

    def __init__(self, model: Llama):
        assert model.num_branches == 1 and len(model.grids) == 1
        self.model = model
        self.slots = -(-(1 + model.num_tokens) // 8) * 8
        cos, sin = model.rotation()
        self.frequencies = torch.stack([cos[:, ::2], sin[:, 1::2]], -1)

    def __call__(self, labels: Tensor, sampling: SamplingConfig, draw: Draw) -> Tensor:
        """Tokens (B, 1, L) of labels (B,) for draw(probabilities (B, 1, K), step) -> (B, 1).

        Guidance is constant, as there, and always on.
        """
        model, batch = self.model, len(labels)
        conditions = torch.cat([labels, torch.full_like(labels, model.none_id)])
        shape = (len(conditions), model.num_heads, self.slots, model.hidden_size // model.num_heads)
        self.caches = [tuple(model.head.weight.new_zeros(shape) for _ in "kv") for _ in model.blocks]
        mask = torch.ones(self.slots, self.slots, dtype=torch.bool, device=labels.device).tril()
        self.mask = mask.repeat(len(conditions), 1, 1)
        scale = 1.0 if sampling.guidance_scale is None else sampling.guidance_scale
        drawn: list[Tensor] = []
        with torch.no_grad():
            condition = model.class_emb(conditions)[:, None]
            for step in range(model.num_tokens):
                x = model.tok_emb(torch.cat([drawn[-1], drawn[-1]])) if drawn else condition
                conditional, unconditional = self.forward(x, condition, step)[:, -1].split(batch)
                logits = unconditional + (conditional - unconditional) * scale
                logits = filtered(logits / sampling.temperature, sampling.top_k or 0, sampling.top_p or 1.0)
                drawn.append(draw(logits.float().softmax(-1)[:, None], step))
        return torch.cat(drawn, 1)[:, None]

    def forward(self, x: Tensor, condition: Tensor, position: int) -> Tensor:
        """(2B, 1, d) input of a position -> (2B, 1, K) logits."""
        model = self.model
        place = torch.tensor([position], device=x.device)
        frequencies, mask = self.frequencies[place], self.mask[:, None, place]
        for block, cache in zip(model.blocks, self.caches, strict=True):
            x = self.block(block, x, condition, frequencies, cache, place, mask)
        scale, shift = linear(model.head_nm.ada_lin[1], F.silu(condition)).chunk(2, -1)
        return linear(model.head, rms_norm(model.head_nm.rmsnorm, x) * (1 + scale) + shift)

    def block(self, block: LlamaBlock, x: Tensor, condition: Tensor, frequencies: Tensor, *past: Tensor) -> Tensor:
        modulation = linear(block.ada_lin[1], F.silu(condition))
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.chunk(6, -1)
        normed = rms_norm(block.attention_norm, x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(block.attention, normed, frequencies, *past)
        normed, mlp = rms_norm(block.ffn_norm, x) * (1 + scale2) + shift2, block.feed_forward
        return x + gate2 * linear(mlp.w2, F.silu(linear(mlp.w1, normed)) * linear(mlp.w3, normed))

    @staticmethod
    def attention(
        layer: RotaryAttention,
        x: Tensor,
        frequencies: Tensor,
        cache: tuple[Tensor, Tensor],
        place: Tensor,
        mask: Tensor,
    ) -> Tensor:
        rows, count, dim = x.shape
        q, k, v = (
            part.view(rows, count, layer.num_heads, dim // layer.num_heads)
            for part in linear(layer.wqkv, x).chunk(3, -1)
        )
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, frequencies), rotate(k, frequencies), v))
        cache[0][:, :, place], cache[1][:, :, place] = k, v
        groups = torch.ones(layer.num_heads, dtype=torch.int64, device=x.device)
        k, v = (part.repeat_interleave(groups, 1, output_size=layer.num_heads) for part in cache)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return linear(layer.wo, out.transpose(1, 2).reshape(rows, count, dim))


def build(options: argparse.Namespace) -> Llama:
    """Llama of the published width with weights spread enough for the blocks and the head to matter.

    Args:
        options: size (of `SIZES`), depth (0: the size's own), steps (tokens of an image), codebook_size, device, dtype.
    """
    hidden, depth = SIZES[options.size]
    side = math.isqrt(options.steps)
    torch.manual_seed(0)
    model = Llama(
        options.codebook_size,
        options.steps,
        1000,
        [(side, side) if side**2 == options.steps else (1, options.steps)],
        hidden_size=hidden,
        depth=options.depth or depth,
        num_heads=depth,
    )
    nn.init.normal_(model.head.weight, std=0.02)
    for layer in (*model.blocks, model.head_nm):
        nn.init.normal_(layer.ada_lin[1].weight, std=0.02)
    return model.to(options.device, getattr(torch, options.dtype)).eval()
