"""Quantizers: codebooks, structures of codebooks, and products of structures."""

from tessera.quantizers.codebooks import (
    BSQCodebook,
    ClusteringRevival,
    Codebook,
    FSQCodebook,
    IBQCodebook,
    LFQCodebook,
    RandomRevival,
    VQCodebook,
)
from tessera.quantizers.gaussian import GaussianBottleneck
from tessera.quantizers.multiscale import MultiScaleQuantizer, ResidualQuantizer
from tessera.quantizers.output import CodebookOutput, QuantizerOutput
from tessera.quantizers.product import ProductQuantizer
from tessera.quantizers.search import nearest_codes, nearest_k
from tessera.quantizers.structure import SingleGridQuantizer, Structure

__all__ = [
    "BSQCodebook",
    "ClusteringRevival",
    "Codebook",
    "CodebookOutput",
    "FSQCodebook",
    "GaussianBottleneck",
    "IBQCodebook",
    "LFQCodebook",
    "MultiScaleQuantizer",
    "ProductQuantizer",
    "QuantizerOutput",
    "RandomRevival",
    "ResidualQuantizer",
    "SingleGridQuantizer",
    "Structure",
    "VQCodebook",
    "nearest_codes",
    "nearest_k",
]
