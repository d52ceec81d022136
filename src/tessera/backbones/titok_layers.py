"""The plain pre-norm transformer inside TiTok's encoder and decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError

# (width, layers, heads)
SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}
MLP_RATIO = 4


def transformer_size(
    key: str, size: str, width: int | None, layers: int | None, heads: int | None
) -> tuple[int, int, int]:
    """(width, layers, heads) of a named size, with the given ones replaced.

    Raises:
        ConfigError: an unknown size, a number below 1, or heads not dividing the width; `key` names the config node.
    """
    if size not in SIZES:
        raise ConfigError(f"{key}.size={size!r} is unknown; choose one of {', '.join(SIZES)}")
    chosen = tuple(
        given if given is not None else named for given, named in zip((width, layers, heads), SIZES[size], strict=True)
    )
    for name, value in zip(("width", "layers", "heads"), chosen, strict=True):
        if value < 1:
            raise ConfigError(f"{key}.{name}={value} must be at least 1")
    if chosen[0] % chosen[2]:
        raise ConfigError(f"{key}.heads={chosen[2]} does not divide {key}.width={chosen[0]}")
    return chosen


class Attention(nn.Module):
    """Multi-head self-attention over all positions, x (B, N, W) -> (B, N, W)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def extra_repr(self) -> str:
        """The head count, which no weight shows (the tokenizer's fingerprint hashes it)."""
        return f"heads={self.heads}"

    def forward(self, x: Tensor) -> Tensor:
        # (B, N, 3 W) -> 3 x (B, heads, N, W / heads)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """norm, blocks; the rows that are kept of the result pass `norm`."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.norm_in, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor, kept: slice) -> Tensor:
        """Positions `kept` (B, n, W) of the result for x (B, N, W)."""
        x = self.norm_in(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, kept])


def init_weights(module: nn.Module) -> None:
    """Truncated normal of 0.02 and zero biases for linear and convolutional layers, Xavier for q, k, v."""
    for child in module.modules():
        if isinstance(child, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    for child in module.modules():
        if isinstance(child, Attention):
            nn.init.xavier_uniform_(child.qkv.weight)


def embedding(*shape: int) -> nn.Parameter:
    """Learned rows of width W = shape[-1], N(0, 1 / W)."""
    return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)
