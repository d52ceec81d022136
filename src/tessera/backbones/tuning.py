"""Which weights of a backbone train: all of them, low-rank adapters, or none.

Applied while a tokenizer is built, thus before optimizers and averages exist that would have to know the weights.
"""

import copy
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError

MODES = ("full", "lora", "frozen")


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters: W x becomes W x + (alpha / rank) B A x, W frozen, A and B trained.

    Args:
        rank: rows of A.
        alpha: strength.
        train: names of sub-modules of the network that train in full besides the adapters; None: those that the
            backbone's `lora_trained` names (a ViT's final norm).
        targets: pattern of the whole names of the network's linear layers that get adapters; None: the backbone's
            `lora_targets` (a ViT's MLPs).

    Raises:
        ConfigError: a value out of range.

    Source: Hu et al. 2021 (arXiv:2106.09685); XQ-GAN adapts the MLPs of all blocks with rank 8 and alpha 8 and trains
        the final norm (with `train` = [norm, patch_embed.proj] also the patch embedding).
    """

    rank: int = 8
    alpha: float = 8.0
    train: Sequence[str] | None = None
    targets: str | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise ConfigError(f"LoRA needs rank >= 1 and alpha > 0, not rank={self.rank} and alpha={self.alpha}")


class LoRALinear(nn.Linear):
    """A linear layer with frozen weights and a trained low-rank addition, which starts at zero.

    Keeps the keys `weight` and `bias` of the layer it replaces, beside `lora_a` (rank, in) and `lora_b` (out, rank).
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.requires_grad_(False)
        self.rank, self.alpha = rank, alpha
        self.lora_a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def extra_repr(self) -> str:
        """What, besides the weights, decides the result."""
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha}"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_a) * (self.alpha / self.rank), self.lora_b)

    def merged(self) -> nn.Linear:
        """The plain layer of weight W + (alpha / rank) B A."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        addition = self.lora_b.detach().float() @ self.lora_a.detach().float() * (self.alpha / self.rank)
        layer.weight = nn.Parameter((self.weight.detach().float() + addition).to(self.weight.dtype))
        layer.bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return layer


def tune(backbone: nn.Module, mode: str | LoRA, key: str) -> None:
    """Choose what of a backbone trains, in place.

    "full" leaves all as it is; "frozen" takes the gradient from the network; "lora" (or a `LoRA` with other settings)
    also puts adapters into it. The network is the backbone's `network`, where it has one, so that tokens, positions and
    pixel heads around a pretrained network train in any mode; else the whole backbone.

    Args:
        backbone: encoder or decoder. Adapters need `lora_targets`, a pattern of the names of its network's linear
            layers; `lora_trained` names further parts that train.
        mode: full, lora, frozen, or a `LoRA`.
        key: of the configuration, for messages.

    Raises:
        ConfigError: unknown mode; adapters for a backbone that can't have them.
    """
    lora = LoRA() if mode == "lora" else mode
    if not isinstance(lora, LoRA) and mode not in MODES:
        raise ConfigError(f"{key}={mode!r} is unknown; choose one of {', '.join(MODES)}, or give a tessera LoRA")
    if mode == "full":
        return
    network = getattr(backbone, "network", backbone)
    if not isinstance(lora, LoRA):
        network.requires_grad_(False)
        return
    pattern = getattr(backbone, "lora_targets", None)
    if pattern is None:
        raise ConfigError(
            f"{key}=lora needs a transformer that names layers for adapters, which {type(backbone).__name__} does not; "
            f"choose {key}=full or {key}=frozen, or backbone=vit"
        )
    pattern = lora.targets or pattern
    network.requires_grad_(False)
    targets = [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and re.fullmatch(pattern, name) and not isinstance(layer, LoRALinear)
    ]
    if not targets:
        raise ConfigError(f"{key}=lora: no linear layer of this {type(backbone).__name__} is named like {pattern}")
    for name in targets:
        _replace(network, name, LoRALinear(network.get_submodule(name), lora.rank, lora.alpha))
    for name in getattr(backbone, "lora_trained", ()) if lora.train is None else lora.train:
        try:
            network.get_submodule(name).requires_grad_(True)
        except AttributeError:
            raise ConfigError(f"{key}.train names {name}, which this {type(backbone).__name__} lacks") from None


def _replace(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, child)


def adapters(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Name and layer of every adapter in a module."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoRALinear))


def merge(module: nn.Module) -> nn.Module:
    """The same function without adapters: a copy with W + (alpha / rank) B A in their place.

    Returns:
        The module itself where it has no adapters.
    """
    if not any(True for _ in adapters(module)):
        return module
    with torch.no_grad():
        merged = copy.deepcopy(module)
        for name, layer in list(adapters(merged)):
            _replace(merged, name, layer.merged())
    return merged
