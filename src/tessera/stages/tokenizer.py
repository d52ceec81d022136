"""Tokenizer main-training."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.perturbation import NearestCodePerturbation
from tessera.stages.reconstruction import ReconstructionStage


class TokenizerTraining(ReconstructionStage):
    """Trains encoder, codebook and decoder, optionally against a discriminator and with perturbed latents.

    loss = sum of weighted losses: reconstruction, perceptual and adversarial of what is decoded (perturbed in some
    images), codebook and commitment of the clean codes.

    Args:
        perturbation: RobusTok's latent perturbation; None: off.
        discriminator_start: fraction of training from which the discriminator takes part; nothing of it runs before.
        trained_parts: modules of the tokenizer that are trained: encoder, quant_conv, quantizer, post_quant_conv,
            decoder. The others are frozen and stay in eval mode. None: all are trained. [post_quant_conv, decoder]
            fine-tunes a decoder without touching the tokens (TiTok's stage 2).
        **shared: see `ReconstructionStage`.

    Raises:
        ConfigError: values out of range, or a perturbation that doesn't fit the quantizer.

    Source: XQ-GAN (arXiv:2412.01762), RobusTok (arXiv:2509.12474).
    """

    default_weights: ClassVar[dict[str, float]] = {
        **ReconstructionStage.default_weights,
        "codebook": 1.0,
        "commitment": 0.25,
        "kl": 1e-6,  # TiTok's VAE
    }

    def __init__(
        self,
        *,
        perturbation: NearestCodePerturbation | None = None,
        discriminator_start: float = 0.0,
        trained_parts: Sequence[str] | None = None,
        **shared: Any,
    ):
        super().__init__(**shared)
        if not 0 <= discriminator_start <= 1:
            raise ConfigError(
                f"stage.discriminator_start={discriminator_start} is outside [0, 1]; it is a fraction of training"
            )
        if perturbation is not None:
            perturbation.check(self.tokenizer.quantizer)
        self.perturbation, self.discriminator_start = perturbation, discriminator_start
        parts = dict(self.tokenizer.named_children())
        chosen = list(parts) if trained_parts is None else list(trained_parts)
        if not chosen or set(chosen) - set(parts):
            raise ConfigError(f"stage.trained_parts={chosen} must name some of {', '.join(parts)}, or be null for all")
        self.frozen_parts = [part for name, part in parts.items() if name not in chosen]
        for part in self.frozen_parts:
            part.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TokenizerTraining":
        """The frozen parts stay in eval mode."""
        super().train(mode)
        for part in self.frozen_parts:
            part.eval()
        return self

    def averaged_modules(self) -> dict[str, nn.Module]:
        return {"tokenizer": self.tokenizer}

    def discriminator_steps(self) -> int:
        return round(self.total_steps * (1 - self.discriminator_start))

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        images = batch["image"]
        perturb = None
        if self.perturbation is not None:

            def perturb(quantizer, z, output):
                return self.perturbation(quantizer, z, output, self.progress, self.sample_rng(batch))

        output = self.tokenizer(images, perturb, self.sample_rng(batch))
        adversarial = self.discriminator is not None and self.progress >= self.discriminator_start
        step = self.open_window()
        self.log("train/perturbed_share", output.perturbed_share)
        self.log_rates(["tokenizer", "discriminator"])
        self.generator_step(output.reconstruction, images, output.losses, adversarial, step)
        if adversarial:
            self.discriminator_step(output.reconstruction, images, step)
