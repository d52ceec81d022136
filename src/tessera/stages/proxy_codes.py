"""Stage 1 of a two-stage TiTok: the decoder learns to predict another tokenizer's codes instead of pixels."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessera.backbones import TiTokProxyDecoder
from tessera.errors import ConfigError
from tessera.frozen import Unregistered
from tessera.stages.base import OptimizerFactory, SchedulerFactory
from tessera.stages.reconstruction import ReconstructionStage
from tessera.stages.tokenizer import TokenizerTraining
from tessera.tokenizers import Tokenizer


class ProxyCodeTraining(ReconstructionStage):
    """Trains a tokenizer with a `TiTokProxyDecoder` on the codes that a frozen teacher gives the same images.

    loss = cross-entropy of the proxy logits with the teacher's codes (mean over codes), plus weighted quantizer losses.

    The proxy codes are a target only: nothing but the tokenizer's own tokens is needed to decode. The decoder's pixel
    codebook and pixel decoder are set to the teacher's at the start and stay frozen, so that validation can show
    pictures (of soft codes; the public code shows the most likely codes) and stage 2 starts from the checkpoint as it
    is, with `stage=decoder`.

    Args:
        tokenizer: with a `TiTokProxyDecoder`.
        teacher: single-grid tokenizer whose decoder has the pixel decoder's architecture: MaskGIT's VQGAN.
        optimizer, scheduler: factories, see `ReconstructionStage`.
        loss_weights: replaces some default weights, by name.
        decay_rule: see `ReconstructionStage`.
        gradient_clip, accumulate_grad_batches, seed, loss_limit: see `Stage`.

    Raises:
        ConfigError: another decoder, or a teacher that doesn't fit it.

    Source: Yu et al. 2024 (arXiv:2406.07550), warm-up stage.
    """

    default_weights: ClassVar[dict[str, float]] = {
        "proxy_codes": 1.0,
        **{
            name: weight
            for name, weight in TokenizerTraining.default_weights.items()
            if name not in (*ReconstructionStage.default_weights, "dependency")
        },
    }

    def __init__(
        self,
        tokenizer: Tokenizer,
        teacher: Tokenizer,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        loss_weights: dict[str, float] | None = None,
        decay_rule: str = "all",
        gradient_clip: float | None = None,
        accumulate_grad_batches: int = 1,
        seed: int = 0,
        loss_limit: float = 1e8,
    ):
        super().__init__(
            tokenizer=tokenizer,
            optimizer=optimizer,
            scheduler=scheduler,
            loss_weights=loss_weights,
            decay_rule=decay_rule,
            gradient_clip=gradient_clip,
            accumulate_grad_batches=accumulate_grad_batches,
            seed=seed,
            loss_limit=loss_limit,
        )
        decoder = tokenizer.decoder
        if not isinstance(decoder, TiTokProxyDecoder):
            raise ConfigError(
                f"stage=proxy_codes needs a decoder that predicts proxy codes, not {type(decoder).__name__}; choose "
                "backbone=titok_two_stage"
            )
        _check_teacher(teacher, tokenizer, decoder)
        decoder.pixel_decoder.load_state_dict(teacher.decoder.state_dict())
        with torch.no_grad():
            decoder.pixel_embedding.copy_(_codes(teacher))
        decoder.pixel_decoder.requires_grad_(False)
        decoder.pixel_embedding.requires_grad_(False)
        self._teacher = Unregistered(teacher)

    def averaged_modules(self) -> dict[str, nn.Module]:
        return {"tokenizer": self.tokenizer}

    def proxy_codes(self, images: Tensor) -> Tensor:
        """The teacher's codes (B, g, g) of images (B, 3, H, W)."""
        teacher = self._teacher.get(self.device)
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return teacher.tokenize(images.float()).view(len(images), *teacher.grid)

    def proxy_losses(self, z_q: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy, share of codes predicted) for quantised latents (B, C, h, w) and codes (B, g, g)."""
        logits = self.tokenizer.decoder.proxy_logits(self.tokenizer.decoder_input(z_q)).float()
        return F.cross_entropy(logits, codes), (logits.argmax(1) == codes).float().mean()

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        images = batch["image"]
        step = self.open_window()
        self.log_rates(["tokenizer"])
        output = self.tokenizer.quantizer(self.tokenizer.encode(images), self.sample_rng(batch))
        cross_entropy, accuracy = self.proxy_losses(output.z_q, self.proxy_codes(images))
        losses = {"proxy_codes": cross_entropy, **output.losses}
        self.log_losses(losses)
        self.log("train/proxy_accuracy", accuracy)
        self.backward_and_step(sum(self.weights[name] * value for name, value in losses.items()), 0, step)

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Any]:
        """Clean reconstruction through soft codes, and how well the teacher's codes are predicted."""
        images, outputs = batch["image"], super().validation_step(batch, batch_index)
        z_q = self.tokenizer.quantizer.decode(outputs["tokens"])
        cross_entropy, accuracy = self.proxy_losses(z_q, self.proxy_codes(images))
        for name, value in (("loss/proxy_codes", cross_entropy), ("proxy_accuracy", accuracy)):
            self.log(f"val/{name}", value, batch_size=len(images), sync_dist=True, on_epoch=True)
        return outputs


def _codes(teacher: Tokenizer) -> Tensor:
    """All code vectors (K, C) of a teacher with one branch and one grid."""
    codebook = teacher.quantizer.branches[0].codebooks[0]
    indices = torch.arange(teacher.quantizer.codebook_size, device=teacher.last_layer.device)
    return codebook.lookup(indices)


def _check_teacher(teacher: Tokenizer, tokenizer: Tokenizer, decoder: TiTokProxyDecoder) -> None:
    quantizer, proxies = teacher.quantizer, len(decoder.pixel_embedding)
    if teacher.resolution != tokenizer.resolution or teacher.grid != (decoder.side, decoder.side):
        raise ConfigError(
            f"stage.teacher makes {teacher.grid} codes of images of {teacher.resolution} pixels, but the decoder "
            f"predicts {decoder.side} x {decoder.side} for {tokenizer.resolution}; choose another teacher, or set "
            "backbone.decoder.patch_size to its downsampling"
        )
    if quantizer.num_branches != 1 or quantizer.num_tokens != decoder.side**2:
        raise ConfigError(
            f"stage.teacher has {quantizer.num_branches} branches of {quantizer.num_tokens} tokens; only one branch "
            "with one code per cell can be predicted"
        )
    if quantizer.codebook_size != proxies:
        raise ConfigError(
            f"stage.teacher has {quantizer.codebook_size} codes, but backbone.decoder.proxy_codebook_size={proxies}; "
            "set it to the teacher's"
        )
    ours = {key: value.shape for key, value in decoder.pixel_decoder.state_dict().items()}
    theirs = {key: value.shape for key, value in teacher.decoder.state_dict().items()}
    if ours != theirs or isinstance(teacher.post_quant_conv, nn.Conv2d):
        raise ConfigError(
            "stage.teacher's decoder has another architecture than backbone.decoder.pixel_decoder, which continues "
            "with its weights; give both the same sizes"
        )
