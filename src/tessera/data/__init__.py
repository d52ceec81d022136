"""Data: image data sets, token caches, and the one data module that serves them."""

from tessera.data.datamodule import ImageDataModule
from tessera.data.folder import FolderImages
from tessera.data.images import DigitsImages, FashionMNISTImages, ImageDataset
from tessera.data.pair_store import PairStore, build_pair_store
from tessera.data.pictures import tile, write_png
from tessera.data.pixels import from_uint8, to_uint8, unit_to_uint8
from tessera.data.token_build import build_token_cache
from tessera.data.token_cache import TokenCache
from tessera.data.token_jsonl import export_jsonl, import_jsonl
from tessera.data.views import Views

__all__ = [
    "DigitsImages",
    "FashionMNISTImages",
    "FolderImages",
    "ImageDataModule",
    "ImageDataset",
    "PairStore",
    "TokenCache",
    "Views",
    "build_pair_store",
    "build_token_cache",
    "export_jsonl",
    "from_uint8",
    "import_jsonl",
    "tile",
    "to_uint8",
    "unit_to_uint8",
    "write_png",
]
