"""Encoder, quantizer and decoder as one object, which knows nothing of losses, training or Lightning."""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tessera.backbones.tuning import LoRA, tune
from tessera.errors import ConfigError, DataError
from tessera.quantizers.output import QuantizerOutput
from tessera.quantizers.product import ProductQuantizer
from tessera.rng import SampleRng
from tessera.tokenizers.output import TokenizerOutput

Perturb = Callable[[ProductQuantizer, Tensor, QuantizerOutput], tuple[QuantizerOutput, dict[str, Tensor | float]]]


def _projection(in_channels: int, out_channels: int, kernel: int | None, side: str) -> nn.Module:
    """Convolution between a backbone and the quantizer, which keeps the grid."""
    if kernel is None:
        if in_channels != out_channels:
            raise ConfigError(
                f"tokenizer.projection_kernel=null needs equal channels, but {in_channels} meet {out_channels} between "
                f"backbone.{side} and quantizer; set backbone.{side}.z_channels to the quantizer's, or a kernel of 1"
            )
        return nn.Identity()
    if kernel < 1 or kernel % 2 == 0:
        raise ConfigError(f"tokenizer.projection_kernel={kernel} must be odd, so that the grid stays, or null")
    return nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)


class Tokenizer(nn.Module):
    """images -> encoder -> quant_conv -> quantizer -> post_quant_conv -> decoder -> images.

    Args:
        encoder: module with `out_channels`, `groups` and `latent_grid(resolution)`; (B, 3, H, W) -> (B, groups *
            out_channels, h, w). An encoder of one group gives one map, projected to the channels of all branches. An
            encoder of P groups gives a map of its own to each branch, and all pass the same projection.
        quantizer: of C channels; told the latent grid here.
        decoder: module with `in_channels`, `last_layer` and `resolution(grid)`; (B, in_channels, h, w) ->
            (B, 3, H, W).
        resolution: side of the square images, in pixels.
        projection_kernel: side of the two convolutions between backbones and quantizer, odd; None: without them, which
            needs backbones of the quantizer's channels.
        encoder_tuning, decoder_tuning: what of them trains: full, lora or frozen, or a `LoRA`; see `tune`.

    Attributes:
        grid: (h, w) of the latent.

    Raises:
        ConfigError: a resolution that the encoder can't take, or parts that do not fit each other.
    """

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: ProductQuantizer,
        decoder: nn.Module,
        resolution: int,
        projection_kernel: int | None = 1,
        encoder_tuning: str | LoRA = "full",
        decoder_tuning: str | LoRA = "full",
    ):
        super().__init__()
        self.resolution, self.grid = resolution, encoder.latent_grid(resolution)
        made = decoder.resolution(self.grid)
        if made != resolution:
            raise ConfigError(
                f"the decoder makes images of {made} pixels from the latent grid {self.grid} of the encoder, but "
                f"data.dataset.resolution={resolution}; set backbone.decoder.channel_multipliers (one doubling per "
                "entry after the first) or backbone.decoder.grid to the encoder's"
            )
        if encoder.groups not in (1, quantizer.num_branches):
            raise ConfigError(
                f"the encoder makes latents for {encoder.groups} branches, but quantizer.branches="
                f"{quantizer.num_branches}; set backbone.encoder.groups to it, or to 1"
            )
        tune(encoder, encoder_tuning, "tokenizer.encoder_tuning")
        tune(decoder, decoder_tuning, "tokenizer.decoder_tuning")
        quantizer.bind_grid(self.grid)
        self.encoder = encoder
        self.quant_conv = _projection(
            encoder.out_channels, quantizer.in_channels // encoder.groups, projection_kernel, "encoder"
        )
        self.quantizer = quantizer
        self.post_quant_conv = _projection(quantizer.dim, decoder.in_channels, projection_kernel, "decoder")
        self.decoder = decoder

    def encode(self, images: Tensor) -> Tensor:
        """Latent before quantisation.

        Args:
            images: (B, 3, resolution, resolution) float in [-1, 1].

        Returns:
            (B, C, h, w) float.

        Raises:
            DataError: images of another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.resolution, self.resolution):
            raise DataError(
                f"images of shape {tuple(images.shape)} do not fit this tokenizer, which needs (batch, 3, "
                f"{self.resolution}, {self.resolution}); set data.dataset.resolution={self.resolution}"
            )
        features = self.encoder(images)
        if self.encoder.groups == 1:
            return self.quant_conv(features)
        # (B, P D, h, w) -> (B P, D, h, w): the same projection for every branch
        projected = self.quant_conv(features.view(-1, self.encoder.out_channels, *features.shape[2:]))
        return projected.view(len(images), self.quantizer.in_channels, *self.grid)

    def tokenize(self, images: Tensor) -> Tensor:
        """Tokens (B, P, L) int64 of images (B, 3, H, W) in [-1, 1]."""
        return self.quantizer.encode(self.encode(images))

    def decoder_input(self, z_q: Tensor) -> Tensor:
        """What the decoder gets, (B, decoder.in_channels, h, w), for a quantised latent (B, C, h, w)."""
        # the quantizer's float32 island ends here: weights may be of lower precision (without autocast)
        return self.post_quant_conv(z_q.to(self.last_layer.dtype))

    def decode(self, z_q: Tensor) -> Tensor:
        """Images (B, 3, H, W) float, not clamped, of a quantised latent (B, C, h, w)."""
        return self.decoder(self.decoder_input(z_q))

    def detokenize(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W) float in [-1, 1] of tokens (B, P, L), whose shape and range are checked."""
        return self.decode(self.quantizer.decode(tokens)).clamp(-1, 1)

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] after one round trip through tokens."""
        return self.decode(self.quantizer(self.encode(images)).z_q).clamp(-1, 1)

    def forward(
        self, images: Tensor, perturb: Perturb | None = None, rng: SampleRng | torch.Generator | None = None
    ) -> TokenizerOutput:
        """Reconstruct with gradients.

        Args:
            images: (B, 3, H, W) float in [-1, 1].
            perturb: optional; (quantizer, z, quantizer output) -> (quantizer output to decode, realised
                rates).
            rng: draws of the quantizer's dropout, by sample.

        Returns:
            The decoded image is the perturbed one where a perturbation hit; tokens and losses are the clean
            ones.
        """
        z = self.encode(images)
        clean = self.quantizer(z, rng)
        decoded, rates = (clean, {}) if perturb is None else perturb(self.quantizer, z, clean)
        return TokenizerOutput(
            reconstruction=self.decode(decoded.z_q),
            z=z,
            z_q=decoded.z_q,
            tokens=clean.tokens,
            losses=clean.losses,
            perturbation=rates,
            depths=clean.depths,
            z_q_clean=clean.z_q,
        )

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the decoder's output projection."""
        return self.decoder.last_layer

    def decoder_modules(self) -> dict[str, nn.Module]:
        """The modules after the tokens: what decoder post-training trains."""
        return {"post_quant_conv": self.post_quant_conv, "decoder": self.decoder}

    def fingerprint(self) -> str:
        """Identity of the token space: tokenizers of equal fingerprint give equal tokens.

        Returns:
            16 hex digits: sha256 over the weights and token-defining settings of encoder, quant_conv and
                quantizer.
            The decoder does not enter: it may be post-trained without invalidating tokens.
        """
        digest = hashlib.sha256(repr((self.resolution, self.quantizer.grids)).encode())
        for part in ("encoder", "quant_conv", "quantizer"):
            module = getattr(self, part)
            for name, child in module.named_modules():
                # settings that no weight shows, e.g. whether codes are normalised; torch's own layers are
                # left out, because their texts may change with its version
                if type(child).__module__.startswith("tessera."):
                    digest.update(f"{part}.{name}:{type(child).__name__}({child.extra_repr()})".encode())
            for key, value in module.state_dict().items():
                digest.update(f"{part}.{key}:{value.dtype}:{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]
