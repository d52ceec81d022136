"""Transformer blocks of the MaskGIT generators: every position attends to every other.

Parameter names are those of timm's vision transformer, in both kinds of block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.generators.layers import MLP, Linear


class SelfAttention(nn.Module):
    """Bidirectional multi-head self-attention.

    Args:
        dim: channels d.
        num_heads: H; divides d.
        qkv_bias: whether queries, keys and values have a bias.
        dropout: after the projection.
        attention_dropout: on the attention probabilities.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, dropout: float = 0.0, attention_dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d)."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, length, dim)))


class PostNormBlock(nn.Module):
    """Block of BERT: x = LN(x + attention(x)), then x = LN(x + MLP(x)); LayerNorm eps 1e-12.

    Args:
        dim, num_heads, attention_dropout: see `SelfAttention`.
        mlp_size: hidden channels of the MLP.
        dropout: of both branches before they are added.
    """

    def __init__(self, dim: int, num_heads: int, mlp_size: int, dropout: float = 0.0, attention_dropout: float = 0.0):
        super().__init__()
        self.attn = SelfAttention(dim, num_heads, True, dropout, attention_dropout)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = MLP(dim, mlp_size)
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d)."""
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.drop(self.mlp(x)))


class PreNormBlock(nn.Module):
    """Block of U-ViT: x + attention(LN(x)), then x + MLP(LN(x)); no bias on queries, keys and values.

    Args:
        dim, num_heads, attention_dropout: see `SelfAttention`.
        mlp_size: hidden channels of the MLP.
        has_skip: whether an earlier block's output is merged with the input, by a linear layer.
        dropout: after the attention's projection and both layers of the MLP.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_size: int,
        has_skip: bool,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        self.skip_linear = Linear(2 * dim, dim) if has_skip else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads, False, dropout, attention_dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, mlp_size, dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, N, d) -> (B, N, d); skip (B, N, d) where `has_skip`."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))
