"""Backbones: encoders and decoders between images and latents."""

from tessera.backbones.cnn import CNNDecoder, CNNEncoder
from tessera.backbones.maskgit_vqgan import MaskGITDecoder, MaskGITEncoder
from tessera.backbones.titok import TiTokDecoder, TiTokEncoder, TiTokProxyDecoder

__all__ = [
    "CNNDecoder",
    "CNNEncoder",
    "MaskGITDecoder",
    "MaskGITEncoder",
    "TiTokDecoder",
    "TiTokEncoder",
    "TiTokProxyDecoder",
]
