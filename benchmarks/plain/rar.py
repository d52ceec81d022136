"""The loop by which the public code samples from RAR, on the weights of a `RAR`.

Re-created from a description of its structure:

- both position tables, with all their rows, repeated for every sequence of the doubled batch and gathered at
  every step; raster orders rebuilt from one small tensor per sequence;
- the whole prefix embedded again at every step, of which the last row is used;
- keys and values grown by concatenation; an additive float mask at the first step;
- modulation by a product per layer, step and row of the doubled batch;
- the head on both halves, guidance weight from tensor operations.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tessera.generators import RAR, SamplingConfig
from tessera.generators.sampling import Draw

# hidden size, depth, MLP size
SIZES = {"b": (768, 24, 3072), "l": (1024, 24, 4096), "xl": (1280, 32, 5120), "xxl": (1408, 40, 6144)}


def linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    """Plain x W^T + b, without what our layer does for few rows."""
    return F.linear(x, layer.weight, layer.bias)


class PlainRAR:
    """Sampling as in the public code.

    Args:
        model: of one branch, in eval mode.
    """

    def __init__(self, model: RAR):
        assert model.num_branches == 1
        self.model = model
        rows = model.pos_embed.shape[1]
        self.mask = torch.full((rows, rows), -math.inf, device=model.pos_embed.device).triu(1)
        self.mask = self.mask.to(model.pos_embed.dtype)

    def __call__(self, labels: Tensor, sampling: SamplingConfig, draw: Draw) -> Tensor:
        """Tokens (B, 1, L) of labels (B,) for draw(probabilities (B, 1, K), step) -> (B, 1).

        Guidance is always on, and nothing is filtered, as there.
        """
        model, batch, device = self.model, len(labels), labels.device
        conditions = torch.cat([model.condition_ids(labels), torch.full_like(labels, model.none_id)])
        ids = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * len(model.blocks)
        scale = 1.0 if sampling.guidance_scale is None else sampling.guidance_scale
        with torch.no_grad():
            for step in range(model.num_tokens):
                logits = self.forward(torch.cat([ids, ids]), conditions)[:, -1]
                conditional, unconditional = logits.chunk(2)
                ratio = torch.tensor(step / model.num_tokens, device=device) ** sampling.guidance_power
                weight = 1 + (scale - 1) * (1 - torch.cos(math.pi * ratio)) / 2
                logits = unconditional + weight * (conditional - unconditional)
                probs = (logits.float() / sampling.temperature).softmax(-1)
                ids = torch.cat([ids, draw(probs[:, None], step)], 1)
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


def build(options: argparse.Namespace) -> RAR:
    """RAR of a published width with weights spread enough for the blocks to matter.

    Args:
        options: size (of `SIZES`), depth (0: the size's own), steps (tokens of an image), codebook_size, device, dtype.
    """
    hidden, depth, mlp = SIZES[options.size]
    torch.manual_seed(0)
    model = RAR(
        options.codebook_size, options.steps, 1000, hidden_size=hidden, depth=options.depth or depth, mlp_size=mlp
    )
    for name, parameter in model.named_parameters():
        if "adaLN_modulation" in name or name == "cls_token":
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(options.device, getattr(torch, options.dtype)).eval()
