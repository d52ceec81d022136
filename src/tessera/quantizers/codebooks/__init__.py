"""Codebooks: quantizers of single vectors."""

from tessera.quantizers.codebooks.base import Codebook
from tessera.quantizers.codebooks.binary import BSQCodebook, LFQCodebook
from tessera.quantizers.codebooks.fsq import FSQCodebook
from tessera.quantizers.codebooks.ibq import IBQCodebook
from tessera.quantizers.codebooks.revival import ClusteringRevival, RandomRevival
from tessera.quantizers.codebooks.vq import VQCodebook

__all__ = [
    "BSQCodebook",
    "ClusteringRevival",
    "Codebook",
    "FSQCodebook",
    "IBQCodebook",
    "LFQCodebook",
    "RandomRevival",
    "VQCodebook",
]
