"""Quantizers: codebooks, structures of codebooks, and products of structures."""

from tessera.quantizers.codebooks import Codebook, VQCodebook
from tessera.quantizers.gaussian import GaussianBottleneck
from tessera.quantizers.codebooks import Codebook, IBQCodebook, VQCodebook
from tessera.quantizers.output import CodebookOutput, QuantizerOutput
from tessera.quantizers.product import ProductQuantizer
from tessera.quantizers.search import nearest_codes, nearest_k
from tessera.quantizers.structure import SingleGridQuantizer, Structure

__all__ = [
    "Codebook",
    "CodebookOutput",
    "GaussianBottleneck",
    "IBQCodebook",
    "ProductQuantizer",
    "QuantizerOutput",
    "SingleGridQuantizer",
    "Structure",
    "VQCodebook",
    "nearest_codes",
    "nearest_k",
]
