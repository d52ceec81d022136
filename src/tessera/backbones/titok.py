"""TiTok: an image as a short row of latent tokens, by transformers that attend to patches and tokens together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tessera.backbones.maskgit_vqgan import MaskGITDecoder
from tessera.backbones.titok_layers import Transformer, embedding, init_weights, transformer_size
from tessera.errors import ConfigError

LAYOUTS = ("transposed", "reshaped")
# the linear layers of the transformer that may have adapters
LORA_TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.\d)"


def _patch_grid(key: str, resolution: int, patch_size: int, num_latent_tokens: int) -> int:
    """Patches per side."""
    for name, value in (("patch_size", patch_size), ("num_latent_tokens", num_latent_tokens)):
        if value < 1:
            raise ConfigError(f"{key}.{name}={value} must be at least 1")
    if resolution < 1 or resolution % patch_size:
        raise ConfigError(
            f"{key}.resolution={resolution} (data.dataset.resolution) is not divisible by {key}.patch_size={patch_size}"
        )
    return resolution // patch_size


class TiTokEncoder(nn.Module):
    """Images (B, 3, R, R) in [-1, 1] -> latent (B, width, 1, N): what the transformer makes of N learned tokens.

    Args:
        resolution: R; the learned positions fit no other one.
        num_latent_tokens: N, any number.
        size: small, base or large (width 512, 768 or 1024; 8, 12 or 24 layers; heads of 64 channels).
        width, layers, heads: replace those of `size`.
        patch_size: side of a patch in pixels.
        grid: (h, w) with h w = N as which the tokens are handed on, for a decoder that needs a map; None: (1, N).
        latent_layout: "transposed" hands on the features of token n at position n. "reshaped" reads the (N, width)
            table row by row as (width, N), so that every position mixes features of many tokens, as the weights of the
            published two-stage models expect. No permutation of weights can express that, because a norm per token
            and a map per position lie on its two sides.

    Raises:
        ConfigError: impossible sizes, an unknown layout, or a grid of other than N cells.

    Source: Yu et al. 2024 (arXiv:2406.07550) and bytedance/1d-tokenizer, blocks.py. Its final projection to the
        codebook's width is the tokenizer's `quant_conv`, which keeps torch's initialisation here.
    """

    lora_targets = LORA_TARGETS

    def __init__(
        self,
        resolution: int,
        num_latent_tokens: int,
        size: str = "base",
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        patch_size: int = 16,
        grid: Sequence[int] | None = None,
        latent_layout: str = "transposed",
    ):
        super().__init__()
        key = "backbone.encoder"
        side = _patch_grid(key, resolution, patch_size, num_latent_tokens)
        width, layers, heads = transformer_size(key, size, width, layers, heads)
        if latent_layout not in LAYOUTS:
            raise ConfigError(f"{key}.latent_layout={latent_layout!r} is unknown; choose one of {', '.join(LAYOUTS)}")
        self.grid = (1, num_latent_tokens) if grid is None else tuple(grid)
        if len(self.grid) != 2 or min(self.grid) < 1 or self.grid[0] * self.grid[1] != num_latent_tokens:
            raise ConfigError(
                f"{key}.grid={list(self.grid)} must have as many cells as {key}.num_latent_tokens={num_latent_tokens}"
            )
        self.resolution, self.latent_layout = resolution, latent_layout
        self.out_channels, self.groups = width, 1
        self.patch_embed = nn.Conv2d(3, width, patch_size, stride=patch_size)
        self.transformer = Transformer(width, layers, heads)
        init_weights(self)
        self.class_embedding = embedding(1, width)
        self.position_embedding = embedding(side**2 + 1, width)  # the class token's first
        self.latent_tokens = embedding(num_latent_tokens, width)
        self.latent_position_embedding = embedding(num_latent_tokens, width)

    @property
    def network(self) -> nn.Module:
        """What `tune` freezes or adapts; tokens, positions and heads around it train in any mode."""
        return self.transformer

    def extra_repr(self) -> str:
        """What the weights don't show of the function they make (the tokenizer's fingerprint hashes it)."""
        return f"grid={self.grid}, latent_layout={self.latent_layout}"

    def latent_grid(self, resolution: int) -> tuple[int, int]:
        """(h, w) of the latent; ConfigError for images of another resolution than the learned positions'."""
        if resolution != self.resolution:
            raise ConfigError(
                f"data.dataset.resolution={resolution} does not fit the learned positions of the encoder, which are "
                f"those of backbone.encoder.resolution={self.resolution}; make both equal and train anew"
            )
        return self.grid

    def forward(self, images: Tensor) -> Tensor:
        # patches are of images in [0, 1], as the published weights expect
        patches = self.patch_embed((images + 1) / 2).flatten(2).transpose(1, 2)
        count = len(images)
        x = torch.cat([self.class_embedding.expand(count, -1, -1), patches], dim=1) + self.position_embedding
        latents = self.latent_tokens + self.latent_position_embedding
        x = torch.cat([x, latents.expand(count, -1, -1)], dim=1)
        latents = self.transformer(x, slice(-len(self.latent_tokens), None))  # (B, N, W)
        if self.latent_layout == "transposed":
            latents = latents.transpose(1, 2)
        return latents.reshape(count, self.out_channels, *self.grid)


class _TokenDecoder(nn.Module):
    """Latent (B, width, h, w) of h w = N tokens -> features of patches (B, width, g, g)."""

    lora_targets = LORA_TARGETS

    def __init__(
        self,
        resolution: int,
        num_latent_tokens: int,
        size: str,
        width: int | None,
        layers: int | None,
        heads: int | None,
        patch_size: int,
    ):
        super().__init__()
        key = "backbone.decoder"
        self.side = _patch_grid(key, resolution, patch_size, num_latent_tokens)
        width, layers, heads = transformer_size(key, size, width, layers, heads)
        self.image_size, self.patch_size, self.in_channels = resolution, patch_size, width
        self.transformer = Transformer(width, layers, heads)
        self.class_embedding = embedding(1, width)
        self.mask_token = embedding(1, width)
        self.position_embedding = embedding(self.side**2 + 1, width)  # the class token's first
        self.latent_position_embedding = embedding(num_latent_tokens, width)

    @property
    def network(self) -> nn.Module:
        """What `tune` freezes or adapts; tokens, positions and heads around it train in any mode."""
        return self.transformer

    def resolution(self, grid: tuple[int, int]) -> int:
        """Side in pixels of the images made from a latent grid (h, w); ConfigError where it has not N cells."""
        tokens = len(self.latent_position_embedding)
        if grid[0] * grid[1] != tokens:
            raise ConfigError(
                f"the encoder makes latents on the grid {grid}, but backbone.decoder.num_latent_tokens={tokens}; set "
                f"it to {grid[0] * grid[1]}"
            )
        return self.image_size

    def patch_features(self, z: Tensor) -> Tensor:
        """(B, width, g, g) of latents (B, width, h, w)."""
        latents = z.flatten(2).transpose(1, 2) + self.latent_position_embedding
        cells = self.side**2
        queries = torch.cat([self.class_embedding, self.mask_token.expand(cells, -1)]) + self.position_embedding
        x = torch.cat([queries.expand(len(z), -1, -1), latents], dim=1)
        features = self.transformer(x, slice(1, cells + 1))
        return features.transpose(1, 2).unflatten(2, (self.side, self.side))


class TiTokDecoder(_TokenDecoder):
    """Latent (B, width, h, w) of N tokens -> images (B, 3, R, R) around [-1, 1], not clamped; one stage.

    Args:
        resolution, num_latent_tokens, size, width, layers, heads, patch_size: as in `TiTokEncoder`. The latent may lie
            on any grid of N cells.

    Raises:
        ConfigError: impossible sizes.

    Source: as `TiTokEncoder`, single-stage variants. Its projection of codes to the width is the tokenizer's
        `post_quant_conv`.
    """

    def __init__(
        self,
        resolution: int,
        num_latent_tokens: int,
        size: str = "base",
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        patch_size: int = 16,
    ):
        super().__init__(resolution, num_latent_tokens, size, width, layers, heads, patch_size)
        self.head = nn.Conv2d(self.in_channels, 3 * patch_size**2, 1)
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        init_weights(self)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the output projection, where the adaptive adversarial weight is measured."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        patches = self.head(self.patch_features(z))
        # channels are (row in patch, column in patch, colour)
        patches = patches.unflatten(1, (self.patch_size, self.patch_size, 3)).permute(0, 3, 4, 1, 5, 2)
        return 2 * self.conv_out(patches.reshape(len(z), 3, self.image_size, self.image_size)) - 1


class TiTokProxyDecoder(_TokenDecoder):
    """Latent (B, width, h, w) of N tokens -> logits of the proxy codes -> soft codes -> images; two stages.

    Stage 1 trains the logits on the codes that MaskGIT's VQGAN gives the image (`proxy_logits`). Stage 2 trains all of
    this decoder on pixels, through soft codes = softmax(logits) E.

    Args:
        resolution, num_latent_tokens, size, width, layers, heads, patch_size: as in `TiTokDecoder`; the patch grid is
            that of the proxy codes.
        proxy_codebook_size: codes of MaskGIT's VQGAN.
        pixel_decoder: from soft codes (B, C, g, g) to images; None: that of MaskGIT's VQGAN.

    Raises:
        ConfigError: impossible sizes, or a pixel decoder whose images have another resolution.

    Source: as `TiTokEncoder`, two-stage models.
    """

    def __init__(
        self,
        resolution: int,
        num_latent_tokens: int,
        size: str = "base",
        width: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        patch_size: int = 16,
        proxy_codebook_size: int = 1024,
        pixel_decoder: MaskGITDecoder | None = None,
    ):
        super().__init__(resolution, num_latent_tokens, size, width, layers, heads, patch_size)
        if proxy_codebook_size < 1:
            raise ConfigError(f"backbone.decoder.proxy_codebook_size={proxy_codebook_size} must be at least 1")
        self.head = nn.Sequential(
            nn.Conv2d(self.in_channels, 2 * self.in_channels, 1),
            nn.Tanh(),
            nn.Conv2d(2 * self.in_channels, proxy_codebook_size, 1),
        )
        init_weights(self)
        self.pixel_decoder = MaskGITDecoder() if pixel_decoder is None else pixel_decoder
        made = self.pixel_decoder.resolution((self.side, self.side))
        if made != resolution:
            raise ConfigError(
                f"backbone.decoder.pixel_decoder makes images of {made} pixels from {self.side} x {self.side} proxy "
                f"codes, not of {resolution}; set backbone.decoder.patch_size={self.pixel_decoder.upsample}"
            )
        bound = 1 / proxy_codebook_size
        codes = torch.empty(proxy_codebook_size, self.pixel_decoder.in_channels).uniform_(-bound, bound)
        self.pixel_embedding = nn.Parameter(codes)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the output projection, where the adaptive adversarial weight is measured."""
        return self.pixel_decoder.last_layer

    def proxy_logits(self, z: Tensor) -> Tensor:
        """Logits (B, K, g, g) of the proxy codes for latents (B, width, h, w)."""
        return self.head(self.patch_features(z))

    def soft_codes(self, logits: Tensor) -> Tensor:
        """Means (B, C, g, g) of the pixel codebook under softmax(logits (B, K, g, g))."""
        shares = logits.movedim(1, -1).softmax(-1)
        return (shares.to(self.pixel_embedding.dtype) @ self.pixel_embedding).movedim(-1, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.pixel_decoder(self.soft_codes(self.proxy_logits(z)))
