"""Generators: class-conditional models of an image's tokens."""

from tessera.generators.base import Generator
from tessera.generators.llama import Llama
from tessera.generators.maskgit import MaskGITUViT, MaskGITViT
from tessera.generators.maskgit_sampling import MaskGITSampling
from tessera.generators.orders import RARSampling
from tessera.generators.rar import RAR
from tessera.generators.sampling import SamplingConfig
from tessera.generators.var import VAR

__all__ = [
    "RAR",
    "VAR",
    "Generator",
    "Llama",
    "MaskGITSampling",
    "MaskGITUViT",
    "MaskGITViT",
    "RARSampling",
    "SamplingConfig",
]
