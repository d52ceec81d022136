"""Tokenizer main-training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from tessera.errors import ConfigError
from tessera.losses import Alignment, dependency_loss
from tessera.perturbation import Perturbation
from tessera.stages.reconstruction import ReconstructionStage
from tessera.tokenizers import TokenizerOutput

DEPENDENCIES = ("squared", "signed")
SEMANTIC_ON = ("clean", "perturbed")


class TokenizerTraining(ReconstructionStage):
    """Trains encoder, codebook and decoder, optionally against a discriminator, guided, and with perturbed latents.

    loss = sum of weighted losses: reconstruction, perceptual and adversarial of what is decoded (perturbed in some
    images), the quantizer's own of the clean codes, alignment with frozen teachers, and dependency between branches.

    Args:
        perturbation: of the latents that are decoded; None: off.
        alignment: by name, guidance of branches by frozen teachers; the name is that of its loss, and of its weight in
            `loss_weights` (0.1 by default). Images whose latent lacks scales are left out. None: off.
        semantic_on: latent that is aligned: "clean", before a perturbation, as RobusTok's paper says; or "perturbed",
            as its code does.
        dependency: similarity of branches that the loss `dependency` measures, "squared" or "signed" cosine; its
            weight is 0 by default, which switches it off.
        discriminator_start: fraction of training from which the discriminator takes part; nothing of it runs before.
        discriminator_start_steps: the same as a number of steps; replaces the fraction.
        discriminator_first: update the discriminator before the generator is judged by it, as IBQ does.
        trained_parts: modules of the tokenizer that are trained: encoder, quant_conv, quantizer, post_quant_conv,
            decoder. The others are frozen and stay in eval mode. None: all are trained. [post_quant_conv, decoder]
            fine-tunes a decoder without touching the tokens (TiTok's stage 2).
        **shared: see `ReconstructionStage`.

    Raises:
        ConfigError: values out of range, or a perturbation or alignment that doesn't fit the tokenizer.

    Source: XQ-GAN (arXiv:2412.01762), RobusTok (arXiv:2509.12474); IBQ (arXiv:2412.02692) and TiTok (arXiv:2406.07550)
        by their options.
    """

    default_weights: ClassVar[dict[str, float]] = {
        **ReconstructionStage.default_weights,
        "codebook": 1.0,
        "commitment": 0.25,
        "joint": 1.0,
        "entropy_sample": 0.1,
        "entropy_batch": 0.1,
        "kl": 1e-6,
        "dependency": 0.0,
    }

    def __init__(
        self,
        *,
        perturbation: Perturbation | None = None,
        alignment: Mapping[str, Alignment] | None = None,
        semantic_on: str = "clean",
        dependency: str = "squared",
        discriminator_start: float = 0.0,
        discriminator_start_steps: int | None = None,
        discriminator_first: bool = False,
        trained_parts: Sequence[str] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        **shared: Any,
    ):
        alignment = dict(alignment or {})
        if taken := [name for name in alignment if name in self.default_weights]:
            raise ConfigError(f"alignment.{taken[0]}: a loss has that name already; choose another")
        # weights of this stage's alignments beside the class's own
        self.default_weights = {**self.default_weights, **dict.fromkeys(alignment, 0.1)}
        super().__init__(loss_weights=dict(loss_weights or {}), **shared)
        if not 0 <= discriminator_start <= 1:
            raise ConfigError(
                f"stage.discriminator_start={discriminator_start} is outside [0, 1]; it is a fraction of training"
            )
        if discriminator_start_steps is not None and discriminator_start_steps < 0:
            raise ConfigError(f"stage.discriminator_start_steps={discriminator_start_steps} must not be negative")
        if dependency not in DEPENDENCIES:
            raise ConfigError(f"stage.dependency={dependency!r} is unknown; choose one of {', '.join(DEPENDENCIES)}")
        if semantic_on not in SEMANTIC_ON:
            raise ConfigError(f"stage.semantic_on={semantic_on!r} is unknown; choose one of {', '.join(SEMANTIC_ON)}")
        quantizer = self.tokenizer.quantizer
        if self.weights["dependency"] and quantizer.num_branches < 2:
            raise ConfigError(
                f"stage.loss_weights.dependency={self.weights['dependency']} compares branches, of which there is but "
                "one; set it to 0, or raise quantizer.branches"
            )
        if perturbation is not None:
            perturbation.check(quantizer)
        for part in alignment.values():
            part.bind(self.tokenizer)
        self.alignment, self.semantic_on = nn.ModuleDict(alignment), semantic_on
        self.perturbation, self.squared_dependency = perturbation, dependency == "squared"
        self.discriminator_start, self.discriminator_start_steps = discriminator_start, discriminator_start_steps
        self.discriminator_first = discriminator_first
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

    def trained_parameters(self) -> list[nn.Parameter]:
        return [*super().trained_parameters(), *self.alignment.parameters()]

    @property
    def first_discriminator_step(self) -> int:
        if self.discriminator_start_steps is not None:
            return min(self.discriminator_start_steps, self.total_steps)
        return math.ceil(self.total_steps * self.discriminator_start - 1e-6)  # of rounding: 0.28 * 1000 > 280

    def guidance(self, images: Tensor, output: TokenizerOutput) -> dict[str, Tensor]:
        """Unweighted losses of alignment and dependency, by name."""
        quantizer = self.tokenizer.quantizer
        keep = None if output.depths is None else output.depths == len(quantizer.grids)
        latent = output.z_q_clean if self.semantic_on == "clean" else output.z_q
        losses = {
            name: part(images, latent, self.tokenizer, self.progress, keep) for name, part in self.alignment.items()
        }
        if self.weights["dependency"]:
            branches = output.z_q.float().mean((2, 3)).chunk(quantizer.num_branches, dim=1)
            losses["dependency"] = dependency_loss(branches, self.squared_dependency)
        return losses

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        images, rng = batch["image"], self.sample_rng(batch)
        perturb = None
        if self.perturbation is not None:

            def perturb(quantizer, z, output):
                return self.perturbation(quantizer, z, output, self.progress, rng)

        output = self.tokenizer(images, perturb, rng)
        adversarial = self.discriminator is not None and self.trainer.global_step >= self.first_discriminator_step
        step = self.open_window()
        if self.perturbation is not None:
            # rates stay on the device until the logger asks for them
            values = {**self.perturbation.strength(self.progress), **output.perturbation}
            self.log_dict({f"train/perturbation/{name}": value for name, value in values.items()})
        self.log_rates(["tokenizer", "discriminator"])
        others = {**output.losses, **self.guidance(images, output)}
        if adversarial and self.discriminator_first:
            self.discriminator_step(output.reconstruction, images, step, rng)
        self.generator_step(output.reconstruction, images, others, adversarial, step, rng)
        if adversarial and not self.discriminator_first:
            self.discriminator_step(output.reconstruction, images, step, rng)
