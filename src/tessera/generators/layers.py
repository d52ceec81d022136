"""Transformer layers of the generators: attention with normalised queries and keys, MLP, adaptive LayerNorm.

Normalisations have eps 1e-6. Parameter names are those of timm's vision transformer, on which the public code
builds.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tessera.generators.cache import KVCache, Position
from tessera.generators.packing import onednn_linear, uses_onednn

EPS = 1e-6


class Linear(nn.Linear):
    """`nn.Linear` that is quick in sampling on a CPU (`tessera.generators.packing`).

    Attributes:
        packed: copy of the weight in oneDNN's layout while `packed` holds one, else None.
        is_packable: False for a layer that runs too seldom for a copy to pay.
    """

    packed: Tensor | None = None
    is_packable: bool = True

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight = self.weight if self.packed is None else self.packed
        if uses_onednn(x, weight):
            return onednn_linear(x, weight, self.bias)
        return super().forward(x)


class Attention(nn.Module):
    """Causal multi-head self-attention with per-head LayerNorm of queries and keys.

    Args:
        dim: channels d.
        num_heads: H; divides d.
        dropout: after the projection.
        attention_dropout: on the attention probabilities.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0, attention_dropout: float = 0.0):
        super().__init__()
        self.num_heads, self.attention_dropout = num_heads, attention_dropout
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=EPS)
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=EPS)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0, position: Position = 0) -> Tensor:
        """Attend to this and earlier positions.

        Args:
            x: (B, N, d); whole sequences, or with a cache the N positions from `position` on.
            cache: holds the earlier positions; gets those of x added.
            layer: this layer's place in the cache.

        Returns:
            (B, N, d).
        """
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # under autocast the norms return float32 where the product needs one type
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        if cache is not None:
            out = cache.attend(layer, position, q, k, v)
        else:
            dropout = self.attention_dropout if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, length, dim)))


class MLP(nn.Module):
    """fc2(GELU(fc1(x))) with dropout after the activation and after fc2; exact GELU.

    Args:
        dim: channels in and out.
        hidden: channels between.
        dropout: probability of both dropouts.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden), Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


def adaptive_projection(dim: int, outputs: int) -> nn.Sequential:
    """Projection of a condition to `outputs` modulation vectors, zero at initialisation.

    The activation before it (SiLU) depends on the condition alone, so the model applies it once for all
    layers; its slot 0 stays for the published parameter names.
    """
    projection = nn.Sequential(nn.Identity(), Linear(dim, outputs * dim))
    projection[1].is_packable = False
    nn.init.zeros_(projection[1].weight)
    nn.init.zeros_(projection[1].bias)
    return projection


class AdaptiveBlock(nn.Module):
    """Transformer block whose norms are shifted and scaled, and whose branches are gated, by a condition.

    x += gate1 * attention(norm1(x) * (1 + scale1) + shift1)
    x += gate2 * mlp(norm2(x) * (1 + scale2) + shift2)

    with (shift1, scale1, gate1, shift2, scale2, gate2) = split(W SiLU(condition) + b), W and b zero at first.

    Args:
        dim: channels d.
        num_heads: H; divides d.
        mlp_size: hidden channels of the MLP.
        dropout, attention_dropout: see `Attention` and `MLP`.

    Source: Peebles and Xie 2023 (arXiv:2212.09748), adaLN-Zero; with affine norms, as in RAR's public code.
    """

    def __init__(self, dim: int, num_heads: int, mlp_size: int, dropout: float = 0.0, attention_dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=EPS), nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, num_heads, dropout, attention_dropout)
        self.mlp = MLP(dim, mlp_size, dropout)
        self.adaLN_modulation = adaptive_projection(dim, 6)

    def modulation(self, activated: Tensor) -> Tensor:
        """Modulation as `extend` takes it.

        Args:
            activated: (..., d), SiLU of the condition.

        Returns:
            (..., 6, d): shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2.
        """
        modulation = self.adaLN_modulation(activated).unflatten(-1, (6, -1))
        modulation[..., 1::3, :] += 1
        return modulation

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """Whole sequences.

        Args:
            x: (B, N, d).
            activated: (B, N, d), SiLU of the condition of each position.

        Returns:
            (B, N, d).
        """
        return self._run(x, *self._modulation(activated))

    def extend(self, x: Tensor, modulation: Tensor, cache: KVCache, layer: int, position: Position) -> Tensor:
        """The next positions of growing sequences.

        Args:
            x: (B, N, d), the N positions from `position` on.
            modulation: (B, N, 6, d) of these positions, from `modulation`.
            cache: keys and values of the earlier positions; gets these added.
            layer: this block's place in the cache.

        Returns:
            (B, N, d).
        """
        return self._run(x, *modulation.unbind(-2), cache=cache, layer=layer, position=position)

    def _modulation(self, activated: Tensor) -> tuple[Tensor, ...]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(activated).chunk(6, -1)
        return shift1, 1 + scale1, gate1, shift2, 1 + scale2, gate2

    def _run(
        self,
        x: Tensor,
        shift1: Tensor,
        scale1: Tensor,
        gate1: Tensor,
        shift2: Tensor,
        scale2: Tensor,
        gate2: Tensor,
        **past: KVCache | Position,
    ) -> Tensor:
        x = x + gate1 * self.attn(self.norm1(x) * scale1 + shift1, **past)
        return x + gate2 * self.mlp(self.norm2(x) * scale2 + shift2)


class AdaptiveNorm(nn.Module):
    """LayerNorm without affine parameters, scaled and shifted by a condition: the layer before the head.

    norm(x) * (1 + scale) + shift with (scale, shift) = split(W SiLU(condition) + b): scale first, the
    opposite of the blocks' order.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.adaLN_modulation = adaptive_projection(dim, 2)

    def modulation(self, activated: Tensor) -> Tensor:
        """(..., d) SiLU of the condition -> (..., 2, d): 1 + scale, shift."""
        modulation = self.adaLN_modulation(activated).unflatten(-1, (2, -1))
        modulation[..., 0, :] += 1
        return modulation

    def forward(self, x: Tensor, activated: Tensor) -> Tensor:
        """(B, N, d), (B, N, d) -> (B, N, d)."""
        scale, shift = self.adaLN_modulation(activated).chunk(2, -1)
        return self._run(x, 1 + scale, shift)

    def modulate(self, x: Tensor, modulation: Tensor) -> Tensor:
        """(..., d), (..., 2, d) -> (..., d)."""
        return self._run(x, *modulation.unbind(-2))

    def _run(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,), eps=EPS) * scale + shift
