"""Discriminators: images to logits."""

from tessera.discriminators.patchgan import PatchGAN

__all__ = ["PatchGAN"]
