"""Data: image data sets, token caches, and the one data module that serves them."""

from tessera.data.datamodule import ImageDataModule
from tessera.data.images import DigitsImages, FashionMNISTImages, FolderImages, ImageDataset
from tessera.data.pixels import from_uint8, to_uint8
from tessera.data.token_cache import TokenCache, build_token_cache

__all__ = [
    "DigitsImages",
    "FashionMNISTImages",
    "FolderImages",
    "ImageDataModule",
    "ImageDataset",
    "TokenCache",
    "build_token_cache",
    "from_uint8",
    "to_uint8",
]
