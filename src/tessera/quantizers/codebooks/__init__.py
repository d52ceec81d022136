"""Codebooks: quantizers of single vectors."""

from tessera.quantizers.codebooks.base import Codebook
from tessera.quantizers.codebooks.ibq import IBQCodebook
from tessera.quantizers.codebooks.vq import VQCodebook

__all__ = ["Codebook", "IBQCodebook", "VQCodebook"]
