"""The loop by which the public code samples from TiTok's generators, on the weights of a `MaskGIT`.

Re-created from a description of its structure:

- the two halves of guidance as two passes, one after the other, each with its own product of the head;
- queries, keys and values of BERT by three products; those of U-ViT cast to float32 for attention;
- how many tokens to mask again read back to the host in every round, from the first sample, and applied to all by a
  full sort of the confidences.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.generators import MaskGITSampling, MaskGITUViT, MaskGITViT
from tessera.generators.layers import MLP
from tessera.generators.maskgit import MaskGIT
from tessera.generators.maskgit_layers import PostNormBlock, PreNormBlock, SelfAttention
from tessera.rng import SampleRng

# class, tokens, hidden size, depth, hidden size of the MLPs
SIZES = {
    "l32": (MaskGITViT, 32, 768, 24, 3072),
    "b64": (MaskGITViT, 64, 768, 24, 3072),
    "s128": (MaskGITUViT, 128, 1024, 21, 4096),
}


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Plain x W^T + b, without what our layer does when sampling."""
    return F.linear(x, layer.weight, layer.bias)


def mlp(layer: MLP, x: Tensor) -> Tensor:
    return linear(layer.fc2, F.gelu(linear(layer.fc1, x)))


def gumbel(uniform: Tensor) -> Tensor:
    """By its formula, with a new tensor for every operation."""
    inner = -torch.log(torch.clamp(uniform, min=1e-20))
    return -torch.log(torch.clamp(inner, min=1e-20))


class PlainMaskGIT:
    """Sampling as in the public code.

    Args:
        model: of one branch, in eval mode.
    """

    def __init__(self, model: MaskGIT):
        assert model.num_branches == 1
        self.model = model

    def __call__(self, labels: Tensor, sampling: MaskGITSampling, rng: SampleRng) -> Tensor:
        """Tokens (B, 1, L) of labels (B,); filters and the confidence "log_prob" don't exist there."""
        assert sampling.confidence == "logit" and not sampling.top_k and sampling.top_p in (None, 1.0)
        model, batch, steps = self.model, len(labels), sampling.num_steps
        length, codes = model.num_tokens, model.codebook_size
        conditional, unconditional = model.condition_ids(labels), torch.full_like(labels, model.none_id)
        ids = torch.full((batch, length), model.mask_id, device=labels.device)
        weights = sampling.guidance_weights(steps) or [1.0] * steps
        with torch.no_grad():
            for step in range(steps):
                ratio = (step + 1) / steps
                noise = sampling.gumbel_temperature * (1 - ratio)
                is_masked = ids == model.mask_id
                logits = self.forward(ids, conditional)
                if weights[step] != 1:
                    other = self.forward(ids, unconditional)
                    logits = other + weights[step] * (logits - other)
                logits = logits.float() / sampling.temperatures(steps)[step]
                uniform = rng.uniform(f"sample/{step}", 1, length, codes).to(labels.device)[:, 0]
                drawn = (logits + noise * gumbel(uniform)).argmax(-1)
                confidence = torch.gather(logits, -1, drawn[..., None])[..., 0]
                confidence = torch.where(is_masked, confidence, torch.inf)
                drawn = torch.where(is_masked, drawn, ids)
                if step == steps - 1:
                    return drawn[:, None]
                left = math.floor(length * math.acos(ratio) / (math.pi / 2))
                left = max(1, min(is_masked[0].sum().item() - 1, left))
                uniform = rng.uniform(f"confidence/{step}", 1, length).to(labels.device)[:, 0]
                confidence = confidence + noise * gumbel(uniform)
                limit = confidence.sort(-1).values[:, left - 1 : left]
                ids = torch.where(confidence <= limit, model.mask_id, drawn)

    def forward(self, ids: Tensor, conditions: Tensor) -> Tensor:
        """(B, L) ids and (B,) conditions -> (B, L, K) logits."""
        model = self.model
        x = model.embeddings(torch.cat([conditions[:, None], ids], 1)) + model.pos_embed
        if isinstance(model, MaskGITViT):
            x = model.embed_norm(x + model.type_embed[0])
            for block in model.blocks:
                x = self.post_norm(block, x)
            return linear(model.lm_head, x[:, 1:])
        skips = []
        for block in model.in_blocks:
            x = self.pre_norm(block, x)
            skips.append(x)
        x = self.pre_norm(model.mid_block, x)
        for block in model.out_blocks:
            x = self.pre_norm(block, linear(block.skip_linear, torch.cat([x, skips.pop()], -1)))
        return linear(model.lm_head, model.norm(x)[:, 1:])

    def post_norm(self, block: PostNormBlock, x: Tensor) -> Tensor:
        weights, biases = block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3)
        parts = [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        x = block.norm1(x + self.attention(block.attn, *parts))
        return block.norm2(x + mlp(block.mlp, x))

    def pre_norm(self, block: PreNormBlock, x: Tensor) -> Tensor:
        parts = linear(block.attn.qkv, block.norm1(x)).float().chunk(3, -1)
        x = x + self.attention(block.attn, *parts)
        return x + mlp(block.mlp, block.norm2(x))

    @staticmethod
    def attention(layer: SelfAttention, *parts: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for part in parts]
        out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return linear(layer.proj, out.to(layer.proj.weight.dtype))


def build(options: argparse.Namespace) -> MaskGIT:
    """A generator of TiTok's published shape with weights spread enough for the blocks and the head to matter.

    Args:
        options: size (of `SIZES`), depth (0: the size's own), codebook_size, device, dtype.
    """
    kind, tokens, hidden, depth, mlp = SIZES[options.size]
    torch.manual_seed(0)
    model = kind(
        options.codebook_size,
        tokens,
        1000,
        hidden_size=hidden,
        depth=options.depth or depth,
        num_heads=16,
        mlp_size=mlp,
    )
    nn.init.normal_(model.lm_head.weight, std=0.1)
    return model.to(options.device, getattr(torch, options.dtype)).eval()
