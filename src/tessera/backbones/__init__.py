"""Backbones: encoders and decoders between images and latents."""

from tessera.backbones.cnn import CNNDecoder, CNNEncoder
from tessera.backbones.maskgit_vqgan import MaskGITDecoder, MaskGITEncoder
from tessera.backbones.titok import TiTokDecoder, TiTokEncoder, TiTokProxyDecoder
from tessera.backbones.to_pixel import ConvPixels, LinearPixels, SirenPixels
from tessera.backbones.tuning import LoRA, merge, tune
from tessera.backbones.vit import ViTDecoder, ViTEncoder

__all__ = [
    "CNNDecoder",
    "CNNEncoder",
    "ConvPixels",
    "LinearPixels",
    "LoRA",
    "MaskGITDecoder",
    "MaskGITEncoder",
    "SirenPixels",
    "TiTokDecoder",
    "TiTokEncoder",
    "TiTokProxyDecoder",
    "ViTDecoder",
    "ViTEncoder",
    "merge",
    "tune",
]
