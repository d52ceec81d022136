"""Transformer layers of VAR: attention from scale to earlier scales, and blocks modulated by the class.

Parameter names are those of the published files. LayerNorms have eps 1e-6 and no parameters.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.generators.cache import KVCache
from tessera.generators.layers import EPS, Linear, adaptive_projection

MAX_LOG_SCALE = math.log(100)


def normalise(x: Tensor) -> Tensor:
    """LayerNorm of the last dimension, without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def scale_causal_attention(q: Tensor, k: Tensor, v: Tensor, sizes: Sequence[int], factor: float) -> Tensor:
    """Attention of each scale to itself and to all earlier scales, a call per scale in place of a mask.

    It computes only what the mask would leave (0.62 of the products for VAR's ten scales), and suits kernels that take
    no mask. On a CPU core, forward and backward: 114 ms against 159 ms with a mask for 680 tokens (2 images, 16 heads),
    24 against 30 for 286.

    Args:
        q, k, v: (B, H, L, D).
        sizes: tokens of each scale, of sum L.
        factor: by which scores are multiplied.

    Returns:
        (B, H, L, D).
    """
    outputs, end = [], 0
    for queries in q.split(list(sizes), 2):
        end += queries.shape[2]
        outputs.append(F.scaled_dot_product_attention(queries, k[:, :, :end], v[:, :, :end], scale=factor))
    return torch.cat(outputs, 2)


class AttentionConstants(NamedTuple):
    """What of `ScaleAttention` depends on its parameters alone, so that sampling computes it once."""

    bias: Tensor  # (3 C,) of the joint projection; keys have none
    query_scale: Tensor | None  # (1, H, 1, 1) float32, of unit queries


class ScaleAttention(nn.Module):
    """Multi-head self-attention over scales.

    With normalised queries and keys, scores are exp(min(s_h, ln 100)) times their cosine, s_h learned per head;
    without, they are 0.25 / sqrt(D) times the product.

    Args:
        dim: channels C.
        num_heads: H; divides C.
        sizes: tokens of each scale.
        normalized: whether queries and keys are.

    Source: `SelfAttention` of FoundationVision/VAR; the factor 0.25 is its own.
    """

    def __init__(self, dim: int, num_heads: int, sizes: Sequence[int], normalized: bool):
        super().__init__()
        self.num_heads, self.sizes = num_heads, list(sizes)
        self.factor = 1.0 if normalized else 0.25 / math.sqrt(dim // num_heads)
        self.mat_qkv = Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4))) if normalized else None
        self.proj = Linear(dim, dim)

    def constants(self) -> AttentionConstants:
        """Bias of the joint projection and scale of queries."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if self.scale_mul_1H11 is None:
            return AttentionConstants(bias, None)
        return AttentionConstants(bias, self.scale_mul_1H11.float().clamp_max(MAX_LOG_SCALE).exp())

    def _heads(self, qkv: Tensor, query_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Joint projections (B, N, 3 C) -> queries, keys and values (B, H, N, D)."""
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if query_scale is not None:
            # normalised in float32 whatever the type of the products
            q = (F.normalize(q.float(), dim=-1) * query_scale).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        return q, k, v

    def _merge(self, heads: Tensor) -> Tensor:
        return self.proj(heads.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        """All scales, (B, L, C) -> (B, L, C)."""
        bias, query_scale = self.constants()
        heads = self._heads(F.linear(x, self.mat_qkv.weight, bias), query_scale)
        return self._merge(scale_causal_attention(*heads, self.sizes, self.factor))

    def extend(self, x: Tensor, constants: AttentionConstants, cache: KVCache, layer: int, position: int) -> Tensor:
        """The next scale, which sees itself and what the cache holds; no mask is needed.

        Args:
            x: (B, N, C), positions `position` to `position` + N - 1.
            constants: from `constants`.
            cache: keys and values of the earlier scales; gets these added.
            layer: this layer's place in the cache.

        Returns:
            (B, N, C).
        """
        # the bias apart: sampling has quicker products for layers as they are
        q, k, v = self._heads(self.mat_qkv(x) + constants.bias, constants.query_scale)
        keys, values = cache.write(layer, position, k, v)
        return self._merge(F.scaled_dot_product_attention(q, keys, values, scale=self.factor))


class FeedForward(nn.Module):
    """fc2(GELU(fc1(x))), the GELU by its tanh approximation."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VARBlock(nn.Module):
    """Transformer block whose norms are scaled and shifted, and whose branches are gated, by the class.

    x += gate1 * attention(norm(x) * (1 + scale1) + shift1)
    x += gate2 * ffn(norm(x) * (1 + scale2) + shift2)

    with (gate1, gate2, scale1, scale2, shift1, shift2) = W SiLU(class) + b of its own, or W shared by all blocks and an
    offset of its own.

    Args:
        dim, num_heads, sizes, normalized: see `ScaleAttention`.
        hidden: channels inside the feed-forward network.
        shared_modulation: whether W is shared; `modulation` then takes its result.

    Source: `AdaLNSelfAttn` of FoundationVision/VAR.
    """

    def __init__(
        self, dim: int, num_heads: int, sizes: Sequence[int], hidden: int, normalized: bool, shared_modulation: bool
    ):
        super().__init__()
        self.attn = ScaleAttention(dim, num_heads, sizes, normalized)
        self.ffn = FeedForward(dim, hidden)
        if shared_modulation:
            self.ada_lin, self.ada_gss = None, nn.Parameter(torch.zeros(1, 1, 6, dim))
        else:
            self.ada_lin, self.ada_gss = adaptive_projection(dim, 6), None

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """What `extend` takes.

        Args:
            condition: (B, C), SiLU of the class embedding; with shared modulation (B, 6 C), its projection.

        Returns:
            gate1, gate2, 1 + scale1, 1 + scale2, shift1, shift2, each (B, 1, C).
        """
        own = condition if self.ada_lin is None else self.ada_lin(condition)
        vectors = own.unflatten(-1, (1, 6, -1))
        if self.ada_gss is not None:
            vectors = vectors + self.ada_gss
        gate1, gate2, scale1, scale2, shift1, shift2 = vectors.unbind(2)
        return gate1, gate2, 1 + scale1, 1 + scale2, shift1, shift2

    def forward(self, x: Tensor, condition: Tensor, survival: Tensor | None = None) -> Tensor:
        """All scales.

        Args:
            x: (B, L, C).
            condition: see `modulation`.
            survival: (B, 2), factors of the two branches: 0 where stochastic depth drops one; None: all 1.

        Returns:
            (B, L, C).
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = self.modulation(condition)
        if survival is not None:
            factors = survival.to(gate1.dtype)[:, :, None, None]
            gate1, gate2 = gate1 * factors[:, 0], gate2 * factors[:, 1]
        x = x + gate1 * self.attn(normalise(x) * scale1 + shift1)
        return x + gate2 * self.ffn(normalise(x) * scale2 + shift2)

    def extend(
        self,
        x: Tensor,
        modulation: Sequence[Tensor],
        constants: AttentionConstants,
        cache: KVCache,
        layer: int,
        position: int,
    ) -> Tensor:
        """The next scale; arguments as in `ScaleAttention.extend`, and what `modulation` gives for the rows of x."""
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation
        x = x + gate1 * self.attn.extend(normalise(x) * scale1 + shift1, constants, cache, layer, position)
        return x + gate2 * self.ffn(normalise(x) * scale2 + shift2)


class HeadNorm(nn.Module):
    """norm(x) * (1 + scale) + shift before the head, with (scale, shift) = W SiLU(class) + b."""

    def __init__(self, dim: int):
        super().__init__()
        self.ada_lin = adaptive_projection(dim, 2)

    def modulation(self, activated: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C) SiLU of the class embedding -> 1 + scale, shift, each (B, 1, C)."""
        scale, shift = self.ada_lin(activated)[:, None].chunk(2, -1)
        return 1 + scale, shift

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """(B, N, C) and what `modulation` gives -> (B, N, C)."""
        return normalise(x) * scale + shift
