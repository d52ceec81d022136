"""Losses: pixel, perceptual and adversarial, and what balances them."""

from tessera.losses.adversarial import AdversarialLoss
from tessera.losses.balance import LeCam, adaptive_weight, balanced_gradient
from tessera.losses.perceptual import LPIPS
from tessera.losses.reconstruction import pixel_loss

__all__ = ["LPIPS", "AdversarialLoss", "LeCam", "adaptive_weight", "balanced_gradient", "pixel_loss"]
