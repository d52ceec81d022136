"""Transformer layers of the Llama generator: rotary attention, gated MLP, RMSNorm modulated by the class.

Linear layers have no bias but for the adaptive projections. Parameter names are those of IBQ's published checkpoints.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.generators.cache import KVCache, Position
from tessera.generators.layers import Linear, adaptive_projection
from tessera.generators.rotary import rotate

HEAD_EPS = 1e-5  # of the norm before the head, whatever that of the blocks is


class ClassEmbedding(nn.Module):
    """One vector per class, and a last one that stands for no class."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, ids: Tensor) -> Tensor:
        """(...,) int64 in [0, num_classes] -> (..., d)."""
        return self.embedding_table(ids)


class RotaryAttention(nn.Module):
    """Causal multi-head self-attention whose queries and keys are turned by position.

    Args:
        dim: channels d.
        num_heads: H; divides d.
        dropout: after the projection.
        attention_dropout: on the attention probabilities.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0, attention_dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.wqkv = Linear(dim, 3 * dim, bias=False)
        self.wo = Linear(dim, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotation: Tensor, cache: KVCache | None = None, layer: int = 0, position: Position = 0
    ) -> Tensor:
        """Attend to this and earlier positions.

        Args:
            x: (B, N, d); whole sequences, or with a cache the one position `position`.
            rotation: (2, N, d / H), rows of `rotary_table`.
            cache: holds the earlier positions; gets that of x added.
            layer: this layer's place in the cache.

        Returns:
            (B, N, d).
        """
        batch, length, dim = x.shape
        qkv = self.wqkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        turned = rotate(qkv[:, :, :2], rotation[:, :, None, None])
        q, k = (part.transpose(1, 2) for part in turned.unbind(2))
        v = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            out = cache.attend(layer, position, q, k, v)
        else:
            dropout = self.attention_dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.dropout(self.wo(out.transpose(1, 2).reshape(batch, length, dim)))


class SwiGLU(nn.Module):
    """w2(SiLU(w1 x) * w3 x), with dropout after w2.

    Args:
        dim: channels in and out.
        hidden: channels between.
        dropout: its probability.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.w1, self.w3 = Linear(dim, hidden, bias=False), Linear(dim, hidden, bias=False)
        self.w2 = Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class LlamaBlock(nn.Module):
    """Transformer block whose norms are shifted and scaled, and whose branches are gated, by the class.

    x += gate1 * attention(RMS1(x) * (1 + scale1) + shift1)
    x += gate2 * mlp(RMS2(x) * (1 + scale2) + shift2)

    with (gate1, gate2, scale1, scale2, shift1, shift2) = split(W SiLU(class embedding) + b).

    Args:
        dim: channels d.
        num_heads: H; divides d.
        mlp_size: hidden channels of the MLP.
        norm_eps: of both norms.
        residual_dropout, mlp_dropout, attention_dropout: see `RotaryAttention` and `SwiGLU`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_size: int,
        norm_eps: float = 1e-5,
        residual_dropout: float = 0.0,
        mlp_dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        self.attention = RotaryAttention(dim, num_heads, residual_dropout, attention_dropout)
        self.feed_forward = SwiGLU(dim, mlp_size, mlp_dropout)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps), nn.RMSNorm(dim, eps=norm_eps)
        self.ada_lin = adaptive_projection(dim, 6)

    def modulation(self, activated: Tensor) -> Tensor:
        """Modulation as `extend` takes it.

        Args:
            activated: (..., d), SiLU of the class embedding.

        Returns:
            (..., 6, d): gate1, gate2, 1 + scale1, 1 + scale2, shift1, shift2.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = self.ada_lin(activated).chunk(6, -1)
        return torch.stack([gate1, gate2, 1 + scale1, 1 + scale2, shift1, shift2], -2)

    def forward(self, x: Tensor, activated: Tensor, rotation: Tensor) -> Tensor:
        """Whole sequences.

        Args:
            x: (B, N, d).
            activated: (B, 1, d), SiLU of the class embedding.
            rotation: (2, N, d / H), rows of `rotary_table`.

        Returns:
            (B, N, d).
        """
        return self._run(x, self.modulation(activated), rotation)

    def extend(
        self, x: Tensor, modulation: Tensor, rotation: Tensor, cache: KVCache, layer: int, position: Position
    ) -> Tensor:
        """The next position of growing sequences.

        Args:
            x: (B, 1, d).
            modulation: (B, 1, 6, d), from `modulation`.
            rotation: (2, 1, d / H), this position's row.
            cache: keys and values of the earlier positions; gets this one added.
            layer: this block's place in the cache.
            position: number of this one.

        Returns:
            (B, 1, d).
        """
        return self._run(x, modulation, rotation, cache=cache, layer=layer, position=position)

    def _run(self, x: Tensor, modulation: Tensor, rotation: Tensor, **past: KVCache | Position) -> Tensor:
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(-2)
        x = x + gate1 * self.attention(self.attention_norm(x) * scale1 + shift1, rotation, **past)
        return x + gate2 * self.feed_forward(self.ffn_norm(x) * scale2 + shift2)


class AdaptiveRMSNorm(nn.Module):
    """RMSNorm scaled and shifted by the class, before the head.

    RMS(x) * (1 + scale) + shift with (scale, shift) = split(W SiLU(class embedding) + b).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.rmsnorm = nn.RMSNorm(dim, eps=HEAD_EPS)
        self.ada_lin = adaptive_projection(dim, 2)

    def modulation(self, activated: Tensor) -> Tensor:
        """(..., d) SiLU of the class embedding -> (..., 2, d): 1 + scale, shift."""
        scale, shift = self.ada_lin(activated).chunk(2, -1)
        return torch.stack([1 + scale, shift], -2)

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """(B, N, d), (B, 1, d) -> (B, N, d)."""
        return self.modulate(x, self.modulation(activated))

    def modulate(self, x: Tensor, modulation: Tensor) -> Tensor:
        """(..., d), (..., 2, d) -> (..., d)."""
        scale, shift = modulation.unbind(-2)
        return self.rmsnorm(x) * scale + shift
