"""Vision-transformer encoder and decoder with latent queries: a grid of tokens beside those of the patches."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.backbones.to_pixel import LinearPixels
from tessera.backbones.vit_network import LatentViT, level_table, truncated_normal, wide
from tessera.errors import ConfigError

DINOV2_BASE = "vit_base_patch14_dinov2.lvd142m"


class ViTEncoder(LatentViT):
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
            self.level_embed = level_table(1 + groups, self.width)
        else:
            self.latent_pos_embed = nn.Parameter(truncated_normal(1, size, self.width, std=position_std))

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
                levels = wide(self.level_embed)
                prefix, at_patches = prefix + levels[0], at_patches + levels[0]
                at_latents = self.positions(self.grid)[:, None] + levels[1:, None]  # (1, P, h w, D)
                latents = wide(self.latent_tokens) + at_latents.flatten(1, 2)
            else:
                latents = wide(self.latent_tokens) + wide(self.latent_pos_embed)
            count = len(images)
            return torch.cat(
                [prefix.expand(count, -1, -1), wide(patches) + at_patches, latents.expand(count, -1, -1)], dim=1
            )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, P D, h, w)."""
        tokens = self._run(self._sequence(images))[:, -self.latent_tokens.shape[1] :]
        maps = self.network.norm(tokens).view(len(images), self.groups, *self.grid, self.width)
        return maps.permute(0, 1, 4, 2, 3).reshape(len(images), -1, *self.grid)


class ViTDecoder(LatentViT):
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
            self.level_embed = level_table(2, self.width)
        else:
            self.latent_pos_embed = nn.Parameter(
                truncated_normal(1, self.grid[0] * self.grid[1], self.width, std=position_std)
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
            prefix, patches = self.prefix(), wide(self.mask_token) + self.positions(self.patch_grid)
            queries, tokens = torch.cat([prefix, patches], dim=1), wide(tokens)
            if self.level_embed is None:
                return torch.cat([queries.expand(len(z), -1, -1), tokens + wide(self.latent_pos_embed)], dim=1)
            levels = wide(self.level_embed)
            constant = torch.cat([queries + levels[0], prefix + levels[1]], dim=1)
            return torch.cat([constant.expand(len(z), -1, -1), tokens + (self.positions(self.grid) + levels[1])], dim=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, 3, H, W)."""
        first = self.num_prefix
        tokens = self._run(self._sequence(z))[:, first : first + math.prod(self.patch_grid)]
        return self.to_pixel(self.network.norm(tokens), self.patch_grid)
