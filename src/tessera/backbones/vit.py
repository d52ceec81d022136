"""Vision-transformer encoder and decoder with latent queries: a grid of tokens beside those of the patches.

The transformer is timm's (DINOv2, with or without registers, in any size). Positions are ours, because the same table
serves the patches and, resampled, the latent grid.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.backbones.to_pixel import LinearPixels
from tessera.errors import ConfigError
from tessera.frozen import timm_vit

DINOV2_BASE = "vit_base_patch14_dinov2.lvd142m"
POSITIONS = ("absolute", "learned")


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


def _sides(grid: int | Sequence[int], key: str) -> tuple[int, int]:
    pair = (grid, grid) if isinstance(grid, int) else tuple(int(side) for side in grid)
    if len(pair) != 2 or min(pair) < 1:
        raise ConfigError(f"{key}.grid={grid!r} is no grid; give (height, width), both at least 1, or one number")
    return pair


class _LatentViT(nn.Module):
    """What encoder and decoder share: the network, the grids and the positions of both.

    Attributes:
        network: timm's transformer.
        grid: (h, w) of the latent.
        patch_grid: (rows, columns) of the patches.
        num_prefix: class token and registers.
    """

    lora_targets = r"blocks\.\d+\.mlp\.fc\d"
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
        self.grid, self.position = _sides(grid, key), position
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
        patches = table[:, prefix:].float()
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
        prefix = torch.cat(tokens, dim=1).float()
        return prefix if network.no_embed_class else prefix + network.pos_embed[:, : self.num_prefix].float()

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


class ViTEncoder(_LatentViT):
    """Images (B, 3, H, W) -> latents (B, P D, h, w): learned latent tokens read the patches in a transformer.

    Sequence: class token (and registers), patches, then P grids of latent tokens; the result is the last.

    Positions of the latents, by `position`:
        absolute: the patches' table resampled to the latent grid (bicubic, antialiased), the same for every branch,
            plus a level embedding: one for class and patch tokens, one for each branch.
        learned: a table of their own, and no level embedding.

    Args:
        grid: (h, w) of the latent, or one number for a square; need not be the patches' grid.
        model: timm's name, with the tag of its weights.
        resolution: H = W, in pixels.
        patch_size: in pixels.
        groups: P, latent grids; the number of branches, or 1.
        position: absolute or learned.
        pretrained: start from published weights, resampled to patch size and resolution; False: from random ones.
        weights: a local file of them; None: from the hub.
        drop_path: rate of the last block; rises linearly from 0 at the first.
        width, depth, num_heads, layer_scale: replace the model's own; None: as timm has them (`layer_scale` is the
            initial value, 1e-5 in DINOv2, with which a random network hardly starts to train).
        position_std: of the initial positions, those of pretrained weights aside. Beside random patch embeddings, 0.02
            is too little for small networks to tell the patches apart soon.

    Raises:
        ConfigError: a value out of range, or an unsuitable model.
        MissingFileError, CheckpointError: pretrained weights that are missing or don't fit.

    Source: ImageFolder (arXiv:2410.01756), XQ-GAN (arXiv:2412.01762), `DINOv2Encoder` of lxa9867/ImageFolder. Sizes
        follow from the true token counts here, so that every resolution and register tokens work; and sequences enter
        the first block in float32, where the public code rounds them to the autocast type.
    """

    key = "backbone.encoder"

    def __init__(
        self,
        grid: int | Sequence[int] = 16,
        model: str = DINOV2_BASE,
        resolution: int = 256,
        patch_size: int = 16,
        groups: int = 1,
        position: str = "absolute",
        pretrained: bool = True,
        weights: str | Path | None = None,
        drop_path: float = 0.1,
        width: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        layer_scale: float | None = None,
        position_std: float = 0.02,
    ):
        if groups < 1:
            raise ConfigError(f"{self.key}.groups={groups} must be at least 1; it is the number of branches, or 1")
        super().__init__(
            grid,
            model,
            resolution,
            patch_size,
            position,
            pretrained,
            weights,
            drop_path,
            width,
            depth,
            num_heads,
            layer_scale,
            position_std,
        )
        self.groups, self.out_channels = groups, self.width
        size = groups * self.grid[0] * self.grid[1]
        self.latent_tokens = nn.Parameter(torch.empty(1, size, self.width).normal_(std=1e-6))
        self.level_embed = self.latent_pos_embed = None
        if position == "absolute":
            self.level_embed = _level_embed(1 + groups, self.width)
        else:
            self.latent_pos_embed = nn.Parameter(_truncated(1, size, self.width, std=position_std))

    def latent_grid(self, resolution: int) -> tuple[int, int]:
        """(h, w) of the latent; ConfigError for a resolution it wasn't built for."""
        self._check_resolution(resolution)
        return self.grid

    def _sequence(self, images: Tensor) -> Tensor:
        """(B, num_prefix + patches + P h w, D) float32."""
        patches = self.network.patch_embed(images)
        with torch.autocast(images.device.type, enabled=False):
            prefix, at_patches = self.prefix(), self.positions(self.patch_grid)
            if self.level_embed is not None:
                levels = self.level_embed.float()
                prefix, at_patches = prefix + levels[0], at_patches + levels[0]
                at_latents = self.positions(self.grid)[:, None] + levels[1:, None]  # (1, P, h w, D)
                latents = self.latent_tokens.float() + at_latents.flatten(1, 2)
            else:
                latents = (self.latent_tokens + self.latent_pos_embed).float()
            count = len(images)
            return torch.cat(
                [prefix.expand(count, -1, -1), patches.float() + at_patches, latents.expand(count, -1, -1)], dim=1
            )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, P D, h, w)."""
        tokens = self._run(self._sequence(images))[:, -self.latent_tokens.shape[1] :]
        maps = self.network.norm(tokens).view(len(images), self.groups, *self.grid, self.width)
        return maps.permute(0, 1, 4, 2, 3).reshape(len(images), -1, *self.grid)


class ViTDecoder(_LatentViT):
    """Latent (B, D, h, w) -> images (B, 3, H, W), not clamped: mask tokens at the patches read the latent tokens.

    Sequence: class token (and registers), one mask token per patch, then the latent tokens; the result are the patches'
    tokens, through a pixel head. `position` is that of `ViTEncoder`; with absolute positions the latent tokens bring
    class token and registers of their own.

    Args:
        grid, model, resolution, patch_size, position, pretrained, weights, drop_path, width, depth, num_heads,
            layer_scale, position_std: as in `ViTEncoder`.
        to_pixel: factory of the pixel head, called with `width` and `patch_size`; None: `LinearPixels`.

    Raises:
        ConfigError, MissingFileError, CheckpointError: as `ViTEncoder`.

    Source: as `ViTEncoder`, `DINOv2Decoder`.
    """

    key = "backbone.decoder"

    def __init__(
        self,
        grid: int | Sequence[int] = 16,
        model: str = DINOV2_BASE,
        resolution: int = 256,
        patch_size: int = 16,
        position: str = "absolute",
        pretrained: bool = True,
        weights: str | Path | None = None,
        drop_path: float = 0.1,
        width: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        layer_scale: float | None = None,
        position_std: float = 0.02,
        to_pixel: Callable[..., nn.Module] | None = None,
    ):
        super().__init__(
            grid,
            model,
            resolution,
            patch_size,
            position,
            pretrained,
            weights,
            drop_path,
            width,
            depth,
            num_heads,
            layer_scale,
            position_std,
        )
        self.network.patch_embed = nn.Identity()  # no image enters here
        self.in_channels = self.width
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.width).normal_(std=1e-6))
        self.level_embed = self.latent_pos_embed = None
        if position == "absolute":
            self.level_embed = _level_embed(2, self.width)
        else:
            self.latent_pos_embed = nn.Parameter(
                _truncated(1, self.grid[0] * self.grid[1], self.width, std=position_std)
            )
        self.to_pixel = (to_pixel or LinearPixels)(width=self.width, patch_size=patch_size)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the pixel head's last layer, where the adaptive adversarial weight is measured."""
        return self.to_pixel.last_layer

    def resolution(self, grid: tuple[int, int]) -> int:
        """Side in pixels of the images made from a latent grid (h, w), which must be its own."""
        if tuple(grid) != self.grid:
            raise ConfigError(
                f"the encoder makes a latent grid of {tuple(grid)}, but the decoder was built for "
                f"{self.key}.grid={self.grid}; set it to the encoder's"
            )
        return self.image_resolution

    def _sequence(self, z: Tensor) -> Tensor:
        """(B, num_prefix + patches + latent tokens, D) float32."""
        tokens = z.flatten(2).transpose(1, 2)
        with torch.autocast(z.device.type, enabled=False):
            prefix, patches = self.prefix(), self.mask_token.float() + self.positions(self.patch_grid)
            queries, tokens = torch.cat([prefix, patches], dim=1), tokens.float()
            if self.level_embed is None:
                return torch.cat([queries.expand(len(z), -1, -1), tokens + self.latent_pos_embed.float()], dim=1)
            levels = self.level_embed.float()
            constant = torch.cat([queries + levels[0], prefix + levels[1]], dim=1)
            return torch.cat([constant.expand(len(z), -1, -1), tokens + (self.positions(self.grid) + levels[1])], dim=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, 3, H, W)."""
        first = self.num_prefix
        tokens = self._run(self._sequence(z))[:, first : first + math.prod(self.patch_grid)]
        return self.to_pixel(self.network.norm(tokens), self.patch_grid)


def _truncated(*shape: int, std: float) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(*shape), std=std, a=-2 * std, b=2 * std)


def _level_embed(levels: int, width: int) -> nn.Parameter:
    return nn.Parameter(_truncated(levels, width, std=math.sqrt(1 / (3 * width))))
