"""Generators: class-conditional models of an image's tokens."""

from tessera.generators.base import Generator
from tessera.generators.llama import Llama
from tessera.generators.rar import RAR
from tessera.generators.sampling import SamplingConfig

__all__ = ["RAR", "Generator", "Llama", "SamplingConfig"]
