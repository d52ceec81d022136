"""What the two stages share that train a decoder: pixel, perceptual and adversarial losses, in two optimizer steps."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tessera.discriminators import DiffAug
from tessera.errors import ConfigError
from tessera.frozen import Unregistered
from tessera.losses import AdversarialLoss, LeCam, balanced_gradient, pixel_loss
from tessera.optim import decayed_names
from tessera.rng import IndexedRng
from tessera.stages.base import OptimizerFactory, SchedulerFactory, Stage, merged_weights
from tessera.tokenizers import Tokenizer


def gradient_at(loss: Tensor, images: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """d loss / d images, float32.

    `scale` keeps it from vanishing in half precision on the way: gradients of means over many pixels are tiny.
    """
    return torch.autograd.grad(loss * scale, images)[0].float() / scale


class ReconstructionStage(Stage):
    """A stage that trains a decoder against real images.

    Args:
        tokenizer: whose decoder is trained.
        optimizer, scheduler: factories, called with the parameters, and with (optimizer, steps).
        discriminator: (images, rng) -> logits; None trains without an adversarial loss.
        discriminator_optimizer, discriminator_scheduler: its own; None: as the tokenizer's.
        perceptual: (x, y) -> (B,) distances, frozen; kept out of checkpoints. None: off.
        discriminator_augment: of all that the discriminator sees; None: off.
        adversarial: the pair of GAN losses; None: hinge.
        lecam: the discriminator's regulariser; None: with its default settings.
        reconstruction_loss: mse or l1.
        loss_weights: replaces some of the stage's default weights, by name. `adversarial` is the generator's term,
            `discriminator` all of the discriminator's loss, in which `lecam` multiplies the regulariser.
        use_adaptive_weight: multiply the adversarial weight by the ratio of gradient norms at the last layer.
        decay_rule: which parameters the optimizers' `weight_decay` applies to: all, public or explicit; see
            `decayed_names`.
        gradient_clip, accumulate_grad_batches, seed, loss_limit: see `Stage`.
    """

    default_weights: ClassVar[dict[str, float]] = {
        "reconstruction": 1.0,
        "perceptual": 1.0,
        "adversarial": 0.5,
        "discriminator": 0.5,
        "lecam": 0.001,
    }

    def __init__(
        self,
        tokenizer: Tokenizer,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        discriminator: nn.Module | None = None,
        discriminator_optimizer: OptimizerFactory | None = None,
        discriminator_scheduler: SchedulerFactory | None = None,
        perceptual: nn.Module | None = None,
        discriminator_augment: DiffAug | None = None,
        adversarial: AdversarialLoss | None = None,
        lecam: LeCam | None = None,
        reconstruction_loss: str = "mse",
        loss_weights: dict[str, float] | None = None,
        use_adaptive_weight: bool = True,
        decay_rule: str = "all",
        gradient_clip: float | None = None,
        accumulate_grad_batches: int = 1,
        seed: int = 0,
        loss_limit: float = 1e8,
    ):
        super().__init__(gradient_clip, accumulate_grad_batches, seed, loss_limit)
        self.tokenizer, self.discriminator = tokenizer, discriminator
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.discriminator_optimizer_factory = discriminator_optimizer or optimizer
        self.discriminator_scheduler_factory = discriminator_scheduler or scheduler
        self._perceptual = Unregistered(perceptual)
        self.adversarial = adversarial or AdversarialLoss()
        self.pixel_loss = pixel_loss(reconstruction_loss)
        self.weights = merged_weights(self.default_weights, loss_weights)
        self.use_adaptive_weight, self.decay_rule = use_adaptive_weight, decay_rule
        decayed_names(tokenizer, decay_rule)  # refuses an unknown rule
        self.augment = discriminator_augment
        self.lecam = (lecam or LeCam()) if discriminator is not None else None
        if getattr(discriminator, "resolution", tokenizer.resolution) != tokenizer.resolution:
            raise ConfigError(
                f"discriminator.resolution={discriminator.resolution} is not that of the tokenizer's images; set it to "
                f"data.dataset.resolution={tokenizer.resolution}"
            )
        if discriminator is not None and tokenizer.resolution < getattr(discriminator, "min_size", 0):
            raise ConfigError(
                f"data.dataset.resolution={tokenizer.resolution} is too small for the discriminator, which needs "
                f"{discriminator.min_size}; lower discriminator.num_layers or choose discriminator=none"
            )

    @property
    def first_discriminator_step(self) -> int:
        """Global step from which the discriminator takes part."""
        return 0

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the first optimizer updates."""
        return [p for p in self.tokenizer.parameters() if p.requires_grad]

    def discriminator_steps(self) -> int:
        """Optimizer steps of the discriminator over the whole training."""
        return self.total_steps - self.first_discriminator_step

    def _optimizer(self, factory: OptimizerFactory, parameters: list[nn.Parameter]) -> Optimizer:
        """An optimizer of these parameters, with weight decay for those that `decay_rule` says."""
        optimizer = factory(parameters)
        decay = optimizer.defaults.get("weight_decay", 0.0)
        if self.decay_rule == "all" or not decay:
            return optimizer
        names = decayed_names(self, self.decay_rule)
        decayed = {id(parameter) for name, parameter in self.named_parameters() if name in names}
        groups = [
            {"params": [p for p in parameters if id(p) in decayed], "weight_decay": decay},
            {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
        ]
        return factory([group for group in groups if group["params"]])

    def configure_optimizers(self) -> Any:
        optimizers = [self._optimizer(self.optimizer_factory, self.trained_parameters())]
        schedulers = [self.scheduler_factory(optimizers[0], self.total_steps)]
        if self.discriminator is not None:
            parameters = list(self.discriminator.parameters())
            optimizers.append(self._optimizer(self.discriminator_optimizer_factory, parameters))
            schedulers.append(
                self.discriminator_scheduler_factory(optimizers[1], self.discriminator_steps() or self.total_steps)
            )
        return optimizers, schedulers

    def image_losses(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Unweighted reconstruction and perceptual losses, float32."""
        losses = {"reconstruction": self.pixel_loss(images, targets)}
        perceptual = self._perceptual.get(self.device)
        if perceptual is not None:
            losses["perceptual"] = perceptual(images, targets).mean()
        return losses

    def judge(self, images: Tensor, rng: IndexedRng) -> Tensor:
        """The discriminator's logits of augmented images (B, 3, H, W)."""
        if self.augment is not None:
            # the draws' step: the trainer's moves on between the two optimizers of one training step
            since = rng.step - self.first_discriminator_step
            images = self.augment(images, self.augment.strength(since, self.total_steps), rng)
        return self.discriminator(images, rng)

    def generator_step(
        self,
        reconstruction: Tensor,
        targets: Tensor,
        others: dict[str, Tensor],
        adversarial: bool,
        step: bool,
        rng: IndexedRng,
    ) -> None:
        """Update the tokenizer.

        Args:
            reconstruction: (B, 3, H, W) decoder output with its graph.
            targets: (B, 3, H, W) real images.
            others: further unweighted losses, weighted by name.
            adversarial: whether the discriminator takes part.
            step: whether the optimizer steps after this batch.
            rng: draws of augmentation and discriminator.

        Raises:
            ConfigError: a loss in `others` that has no weight.
        """
        if unknown := [name for name in others if name not in self.weights]:
            raise ConfigError(f"the tokenizer has a loss {unknown[0]!r}, for which stage.loss_weights has no weight")
        reconstruction = reconstruction.float()
        images = reconstruction.detach().requires_grad_()
        losses = self.image_losses(images, targets)
        likelihood = sum(self.weights[name] * value for name, value in losses.items())
        scale = self.loss_scale()
        gradient = gradient_at(likelihood, images, scale)
        if adversarial:
            self.discriminator.requires_grad_(False)
            losses["adversarial"] = self.adversarial.generator(self.judge(images, rng.named("generator")))
            adversarial_gradient = gradient_at(losses["adversarial"], images, scale)
            self.discriminator.requires_grad_(True)
            gradient, factor = balanced_gradient(
                reconstruction,
                gradient,
                adversarial_gradient,
                self.tokenizer.last_layer,
                self.weights["adversarial"],
                self.use_adaptive_weight,
                scale,
            )
            self.log("train/adaptive_weight", factor)
        self.log_losses({**losses, **others})
        total = (reconstruction * gradient).sum()
        for name, value in others.items():
            total = total + self.weights[name] * value
        self.backward_and_step(total, 0, step)

    def discriminator_step(self, fake: Tensor, real: Tensor, step: bool, rng: IndexedRng) -> None:
        """Update the discriminator on detached reconstructions and real images (B, 3, H, W); `rng` as above."""
        fake_logits = self.judge(fake.detach().float(), rng.named("discriminator/fake"))
        real_logits = self.judge(real, rng.named("discriminator/real"))
        losses = {
            "discriminator": self.adversarial.discriminator(real_logits, fake_logits),
            "lecam": self.lecam(real_logits, fake_logits),
        }
        self.log_losses(losses)
        self.log_dict(
            {
                "train/logits_real": real_logits.detach().float().mean(),
                "train/logits_fake": fake_logits.detach().float().mean(),
            }
        )
        total = losses["discriminator"] + self.weights["lecam"] * losses["lecam"]
        self.backward_and_step(self.weights["discriminator"] * total, 1, step)

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Tensor]:
        """Clean reconstruction; what the figure callbacks read."""
        images = batch["image"]
        output = self.tokenizer(images)
        losses = {**self.image_losses(output.reconstruction.float(), images), **output.losses}
        for name, value in losses.items():
            self.log(f"val/loss/{name}", value, batch_size=len(images), sync_dist=True, on_epoch=True)
        return {"reconstruction": output.reconstruction.clamp(-1, 1), "tokens": output.tokens, "z": output.z}
