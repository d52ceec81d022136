"""What the vision-transformer encoder and decoder share: timm's network, and positions of patches and latent tokens."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.frozen import timm_vit
from tessera.grids import as_grid

POSITIONS = ("absolute", "learned")


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: sums of positions lose their fine steps in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def truncated_normal(*shape: int, std: float) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=std, a=-2 * std, b=2 * std)


def level_table(levels: int, width: int) -> nn.Parameter:
    return nn.Parameter(truncated_normal(levels, width, std=math.sqrt(1 / (3 * width))))


def vision_transformer(model: str, pretrained: bool, weights: str | Path | None, key: str, **options: Any) -> nn.Module:
    """A vision transformer of timm without head, with class token and learned positions.

    Args:
        model: timm's name, with the tag of the weights.
        pretrained, weights: see `timm_vit`; on the meta device nothing is read. Random weights are Xavier's: timm's own
            standard deviation of 0.02 suits large widths only.
        key: of the configuration, for messages.
        **options: of timm's constructor.

    Raises:
        ConfigError: not such a model.
        MissingFileError: the weights are neither here nor to be had.
        CheckpointError: the weights don't fit the model.
    """
    from timm.models import is_model_in_modules, list_models

    if not is_model_in_modules(model.split(".")[0], {"vision_transformer"}):
        near = ", ".join(list_models("vit_*_dinov2"))
        raise ConfigError(f"{key}.model={model!r} is no vision transformer of timm; choose e.g. one of {near}")
    load = pretrained and torch.get_default_device().type != "meta"
    if not load:
        weights, options["weight_init"] = None, "jax"
    network = timm_vit(model, load, weights, key, **options)
    if network.cls_token is None or network.pos_embed is None:
        raise ConfigError(f"{key}.model={model!r} has no class token or no learned positions; choose a DINOv2")
    return network


class LatentViT(nn.Module):
    """What encoder and decoder share: the network, the grids and the positions of both.

    Attributes:
        network: timm's transformer.
        grid: (h, w) of the latent.
        patch_grid: (rows, columns) of the patches.
        num_prefix: class token and registers.
    """

    lora_targets = r"blocks\.\d+\.mlp\.fc\d"
    lora_trained = ("norm",)
    key: str

    def __init__(
        self,
        grid: int | Sequence[int],
        model: str,
        resolution: int,
        patch_size: int,
        position: str,
        pretrained: bool,
        weights: str | Path | None,
        drop_path: float,
        width: int | None,
        depth: int | None,
        num_heads: int | None,
        layer_scale: float | None,
        position_std: float,
    ):
        super().__init__()
        key = self.key
        self.grid, self.position = as_grid(grid, f"{key}.grid"), position
        if position not in POSITIONS:
            raise ConfigError(f"{key}.position={position!r} is unknown; choose one of {', '.join(POSITIONS)}")
        if not 0.0 <= drop_path < 1.0:
            raise ConfigError(f"{key}.drop_path={drop_path} is outside [0, 1)")
        if patch_size < 1 or resolution < 1 or resolution % patch_size:
            raise ConfigError(
                f"{key}.resolution={resolution} is not divisible by {key}.patch_size={patch_size}; both are in pixels"
            )
        sizes = {"embed_dim": width, "depth": depth, "num_heads": num_heads, "init_values": layer_scale}
        for argument, value in {**sizes, "position_std": position_std}.items():
            if value is not None and value <= 0:
                ours = {"embed_dim": "width", "init_values": "layer_scale"}.get(argument, argument)
                raise ConfigError(f"{key}.{ours}={value} must be positive")
        if width is not None and num_heads is not None and width % num_heads:
            raise ConfigError(f"{key}.num_heads={num_heads} does not divide {key}.width={width}")
        self.network = vision_transformer(
            model,
            pretrained,
            weights,
            key,
            img_size=resolution,
            patch_size=patch_size,
            drop_path_rate=drop_path,
            **{argument: value for argument, value in sizes.items() if value is not None},
        )
        if not pretrained:
            nn.init.trunc_normal_(self.network.pos_embed, std=position_std, a=-2 * position_std, b=2 * position_std)
        self.model, self.image_resolution, self.patch_size = model.split(".")[0], resolution, patch_size
        self.width: int = self.network.embed_dim
        self.patch_grid: tuple[int, int] = (resolution // patch_size,) * 2
        self.num_prefix: int = self.network.num_prefix_tokens
        self._positions: dict[tuple[int, int], tuple[tuple[Any, ...], Tensor]] = {}

    def extra_repr(self) -> str:
        """What the weights don't show of the function they make (the tokenizer's fingerprint hashes it)."""
        heads = self.network.blocks[0].attn.num_heads
        return (
            f"model={self.model}, resolution={self.image_resolution}, patch_size={self.patch_size}, grid={self.grid}, "
            f"position={self.position}, num_heads={heads}"
        )

    def _resampled(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a grid (1, h w, D) float32: the patches' own, resampled where the grid is another."""
        table = self.network.pos_embed
        prefix = 0 if self.network.no_embed_class else self.num_prefix
        patches = wide(table[:, prefix:])
        if grid == self.patch_grid:
            return patches
        plane = patches.transpose(1, 2).unflatten(2, self.patch_grid)
        plane = F.interpolate(plane, size=grid, mode="bicubic", antialias=True, align_corners=False)
        return plane.flatten(2).transpose(1, 2)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """As `_resampled`; kept between calls where nothing trains, until the table changes."""
        table = self.network.pos_embed
        trains = table.requires_grad and torch.is_grad_enabled()
        if trains or torch.compiler.is_compiling() or table.is_inference() or table.is_meta:
            return self._resampled(grid)
        # the version counts changes in place (an optimizer's, or another state dict), the pointer moves
        state = (table.data_ptr(), table._version, table.device, table.dtype)
        found = self._positions.get(grid)
        if found is None or found[0] != state:
            # inference tensors must not outlive their mode
            with torch.inference_mode(False), torch.no_grad():
                found = self._positions[grid] = (state, self._resampled(grid).clone())
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_positions": {}}

    def prefix(self) -> Tensor:
        """Class token and registers with their positions, (1, num_prefix, D) float32."""
        network = self.network
        tokens = [token for token in (network.cls_token, network.reg_token) if token is not None]
        prefix = wide(torch.cat(tokens, dim=1))
        return prefix if network.no_embed_class else prefix + wide(network.pos_embed[:, : self.num_prefix])

    def _run(self, sequence: Tensor) -> Tensor:
        """Blocks of the network; the positions' float32 island ends here."""
        network = self.network
        return network.blocks(network.norm_pre(sequence.to(network.cls_token.dtype)))

    def _check_resolution(self, resolution: int) -> None:
        if resolution != self.image_resolution:
            raise ConfigError(
                f"data.dataset.resolution={resolution}, but the transformer was built for {self.key}.resolution="
                f"{self.image_resolution}; set them to the same value"
            )
