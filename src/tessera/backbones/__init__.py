"""Backbones: encoders and decoders between images and latents."""

from tessera.backbones.cnn import CNNDecoder, CNNEncoder

__all__ = ["CNNDecoder", "CNNEncoder"]
