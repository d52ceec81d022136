"""Discriminators: images to logits, and the augmentation of what they see."""

from tessera.discriminators.augment import DiffAug
from tessera.discriminators.blur_patchgan import BlurPatchGAN
from tessera.discriminators.dino import DINODiscriminator
from tessera.discriminators.patchgan import PatchGAN
from tessera.discriminators.stylegan import StyleGANDiscriminator

__all__ = ["BlurPatchGAN", "DINODiscriminator", "DiffAug", "PatchGAN", "StyleGANDiscriminator"]
