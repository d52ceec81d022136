"""The loop by which the public code samples from VAR, on the weights of a `VAR`.

Re-created from a description of its structure:

- the modulation of every layer projected anew at each scale, for every row of both halves, though the class decides it;
- keys and values grown by concatenation; bias of the joint projection and scale of the queries put together per call;
- both halves of guidance at any weight, each with its own product of the head, combined as logits;
- filters by a full sort of the codes, behind top-k;
- codes enlarged by `interpolate`, branch by branch, and the map of a next scale even after the last.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.generators import VAR, SamplingConfig
from tessera.generators.sampling import Draw
from tessera.generators.var_layers import MAX_LOG_SCALE, ScaleAttention, VARBlock
from tessera.quantizers import MultiScaleQuantizer, ProductQuantizer, VQCodebook

# depth, branches, channels and scales of the published models; width 64 depth
SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIZES = {name: (depth, 1, 32, SIDES) for name, depth in (("d16", 16), ("d20", 20), ("d24", 24), ("d30", 30))}
SIZES["d17_pq2"] = (17, 2, 32, (1, 1, 2, 3, 3, 4, 5, 6, 8, 11))


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Plain x W^T + b, without what our layer does for few rows."""
    return F.linear(x, layer.weight, layer.bias)


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(..., K) logits with -inf where a code is out: top-k by the k-th value, then top-p by a full sort."""
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        values, order = logits.sort(-1)
        removed = values.softmax(-1).cumsum(-1) <= 1 - top_p
        removed[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -torch.inf)
    return logits


class PlainVAR:
    """Sampling as in the public code.

    Args:
        model: bound to a multi-scale quantizer, in eval mode.
    """

    def __init__(self, model: VAR):
        self.model = model

    def __call__(self, labels: Tensor, sampling: SamplingConfig, draw: Draw) -> Tensor:
        """Tokens (B, P, L) of labels (B,) for draw(probabilities (B, P, n, K), scale) -> (B, P, n)."""
        model, batch, scales = self.model, len(labels), len(self.model.grids)
        weights = sampling.guidance_weights(scales) or [1.0] * scales
        temperatures = sampling.temperatures(scales)
        self.past: list[tuple[Tensor, Tensor] | None] = [None] * len(model.blocks)
        drawn: list[Tensor] = []
        with torch.no_grad():
            classes = model.class_emb(torch.cat([labels, torch.full_like(labels, model.num_classes)]))
            places = model.places()[None]
            total = torch.zeros(batch, model.latent_channels, *model.grids[-1], device=labels.device)
            x, end = classes[:, None] + model.pos_start, 0
            for scale, size in enumerate(model.scale_sizes):
                x = x + places[:, end : end + size]
                end += size
                conditional, unconditional = self.forward(x, classes).float().split(batch)
                t = weights[scale] - 1
                logits = (1 + t) * conditional - t * unconditional
                logits = logits.view(batch, size, model.num_branches, -1).transpose(1, 2) / temperatures[scale]
                logits = filtered(logits, sampling.top_k or 0, sampling.top_p or 1.0)
                drawn.append(draw(logits.softmax(-1), scale))
                total, following = self.next_map(total, drawn[-1], scale)
                if scale < scales - 1:
                    x = linear(model.word_embed, following.flatten(2).transpose(1, 2).to(x.dtype)).repeat(2, 1, 1)
        return torch.cat(drawn, 2)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """(2B, n, C) input of a scale -> (2B, n, P K) logits."""
        model = self.model
        for index, block in enumerate(model.blocks):
            x = self.block(block, x, classes, index)
        scale, shift = linear(model.head_nm.ada_lin[1], F.silu(classes))[:, None].chunk(2, -1)
        return linear(model.head, F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)

    def block(self, block: VARBlock, x: Tensor, classes: Tensor, index: int) -> Tensor:
        if block.ada_gss is None:
            vectors = linear(block.ada_lin[1], F.silu(classes)).unflatten(-1, (1, 6, -1))
        else:
            vectors = linear(self.model.shared_ada_lin[1], F.silu(classes)).unflatten(-1, (1, 6, -1)) + block.ada_gss
        gate1, gate2, scale1, scale2, shift1, shift2 = vectors.unbind(2)
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(block.attn, normed, index)
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * linear(block.ffn.fc2, F.gelu(linear(block.ffn.fc1, normed), approximate="tanh"))

    def attention(self, layer: ScaleAttention, x: Tensor, index: int) -> Tensor:
        rows, count, dim = x.shape
        bias = torch.cat([layer.q_bias, torch.zeros_like(layer.q_bias), layer.v_bias])
        qkv = F.linear(x, layer.mat_qkv.weight, bias).view(rows, count, 3, layer.num_heads, dim // layer.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if layer.scale_mul_1H11 is not None:
            q = F.normalize(q, dim=-1) * layer.scale_mul_1H11.clamp_max(MAX_LOG_SCALE).exp()
            k = F.normalize(k, dim=-1)
        if self.past[index] is not None:
            k, v = torch.cat([self.past[index][0], k], 2), torch.cat([self.past[index][1], v], 2)
        self.past[index] = (k, v)
        out = F.scaled_dot_product_attention(q, k, v, scale=layer.factor)
        return linear(layer.proj, out.transpose(1, 2).reshape(rows, count, dim))

    def next_map(self, total: Tensor, drawn: Tensor, scale: int) -> tuple[Tensor, Tensor]:
        """Sum (B, P D, h, w) with a scale's codes added, and its area means at the size of the next scale."""
        quantizer, grids = self.model.quantizer, self.model.grids
        updates = []
        for branch, tokens in zip(quantizer.branches, drawn.unbind(1), strict=True):
            codes = branch.embed(tokens, scale).transpose(1, 2).unflatten(2, grids[scale]) * branch.gain**scale
            if scale < len(grids) - 1:
                codes = F.interpolate(codes, grids[-1], mode="bicubic")
            updates.append(branch.phi.refine(codes, scale))
        total = total + torch.cat(updates, 1)
        return total, F.interpolate(total, grids[min(scale + 1, len(grids) - 1)], mode="area")


def build(options: argparse.Namespace) -> VAR:
    """VAR of a published width with weights spread enough for the blocks and the head to matter, bound to a quantizer.

    Args:
        options: size (of `SIZES`), depth (0: the size's own), codebook_size, device, dtype.
    """
    depth, branches, channels, sides = SIZES[options.size]
    torch.manual_seed(0)
    codebook = lambda dim: VQCodebook(dim, options.codebook_size, l2_normalize=False)  # noqa: E731
    quantizer = ProductQuantizer(lambda dim: MultiScaleQuantizer(dim, codebook, sides), branches, branches * channels)
    model = VAR(**VAR.sizes(quantizer, 1000), depth=options.depth or depth, hidden_size=64 * depth, num_heads=depth)
    for name, parameter in model.named_parameters():
        if name.endswith((".1.weight", "head.weight")):
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(options.device, getattr(torch, options.dtype)).eval()
    model.bind(quantizer.to(options.device).eval())
    return model
