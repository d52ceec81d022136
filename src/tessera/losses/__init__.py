"""Losses: pixel, perceptual and adversarial, guidance by frozen models, and what balances them."""

from tessera.losses.adversarial import AdversarialLoss
from tessera.losses.alignment import Alignment, Teacher, contrastive_loss, dependency_loss
from tessera.losses.balance import LeCam, adaptive_weight, balanced_gradient
from tessera.losses.convnext import ConvNeXtLogits, PerceptualMean
from tessera.losses.perceptual import LPIPS
from tessera.losses.reconstruction import pixel_loss

__all__ = [
    "LPIPS",
    "AdversarialLoss",
    "Alignment",
    "ConvNeXtLogits",
    "LeCam",
    "PerceptualMean",
    "Teacher",
    "adaptive_weight",
    "balanced_gradient",
    "contrastive_loss",
    "dependency_loss",
    "pixel_loss",
]
