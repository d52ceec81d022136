"""GAN losses on discriminator logits."""

import torch.nn.functional as F
from torch import Tensor

from tessera.errors import ConfigError

DISCRIMINATOR = ("hinge", "vanilla", "non_saturating")
GENERATOR = ("hinge", "non_saturating")


def generator_hinge(fake: Tensor) -> Tensor:
    """-mean(fake)."""
    return -fake.float().mean()


def generator_non_saturating(fake: Tensor) -> Tensor:
    """mean softplus(-fake) = -mean log sigmoid(fake)."""
    return F.softplus(-fake.float()).mean()


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """(mean relu(1 - real) + mean relu(1 + fake)) / 2."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def discriminator_vanilla(real: Tensor, fake: Tensor) -> Tensor:
    """(mean softplus(-real) + mean softplus(fake)) / 2: binary cross-entropy with logits."""
    return 0.5 * (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean())


class AdversarialLoss:
    """The pair of losses of a GAN.

    Args:
        discriminator: hinge, vanilla, or non_saturating (the same formula as vanilla).
        generator: hinge or non_saturating.
        per_image: average the logits of a generated image before the generator's loss, as IBQ does; makes no
            difference for hinge.

    Raises:
        ConfigError: an unknown name.

    Source: XQ-GAN's `vq_loss.py`, whose non-saturating forms have input and target swapped; these are the intended
        ones.
    """

    def __init__(self, discriminator: str = "hinge", generator: str = "hinge", per_image: bool = False):
        for key, value, known in (("discriminator", discriminator, DISCRIMINATOR), ("generator", generator, GENERATOR)):
            if value not in known:
                raise ConfigError(f"stage.adversarial.{key}={value!r} is unknown; choose one of {', '.join(known)}")
        self.discriminator = discriminator_hinge if discriminator == "hinge" else discriminator_vanilla
        self._generator = generator_hinge if generator == "hinge" else generator_non_saturating
        self.per_image = per_image

    def generator(self, fake: Tensor) -> Tensor:
        """Loss of the generator: scalar of logits (B, ...)."""
        return self._generator(fake.float().flatten(1).mean(1) if self.per_image else fake)
