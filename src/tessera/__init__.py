"""Tessera: discrete image tokenizers, autoregressive generators, and decoder post-training."""

__version__ = "0.1.0"
