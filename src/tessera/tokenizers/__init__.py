"""Tokenizers: encoder, quantizer and decoder as one object."""

from tessera.tokenizers.output import TokenizerOutput
from tessera.tokenizers.tokenizer import Tokenizer

__all__ = ["Tokenizer", "TokenizerOutput"]
