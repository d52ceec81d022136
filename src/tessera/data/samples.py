"""Generated images on disk: filled in chunks (resumable.py), then packed into one `.npz` in the layout of ADM's tools.

Layout of the folder: `manifest.json`; `samples.npz` with `arr_0` uint8 (N, H, W, 3); where asked for
`tokens.safetensors` with `tokens` int64 (N, P, L) and `labels` int64 (N,), and `png/000000.png` and so on. While it is
being filled, the images are in `images.npy`.
"""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from tessera.data.manifest import FolderManifest, StoredArray
from tessera.data.resumable import RowWriter, disk_error

NPZ, IMAGES, TOKENS, PNG = "samples.npz", "images.npy", "tokens.safetensors", "png"
PACKED = f"{NPZ}.tmp"
ZIP_BYTES = 4096  # more than the headers of a zip file with one member take


@dataclass(kw_only=True)
class SampleManifest(FolderManifest):
    """What a folder of samples holds.

    Attributes:
        samples: N.
        height, width: of the images.
        branches, length: P, L of the tokens.
        save_tokens, png: whether tokens and image files are kept as well.
        settings: whatever determines the samples, of plain JSON types.
    """

    FORMAT: ClassVar[int] = 1
    NOUN: ClassVar[str] = "samples"
    SPACE_KEY: ClassVar[str] = "paths.outputs"

    kind: str = "samples"
    format: int = FORMAT
    samples: int
    height: int
    width: int
    branches: int
    length: int
    save_tokens: bool
    png: bool
    settings: Mapping[str, Any]

    @property
    def units(self) -> int:
        """N."""
        return self.samples

    def arrays(self) -> dict[str, StoredArray]:
        shape = (self.samples, self.height, self.width, 3)
        arrays = {"images": StoredArray(IMAGES, np.dtype(np.uint8), shape, len(self._npy_header()))}
        if self.save_tokens:
            start = len(self._safetensors_header())
            tokens = StoredArray(TOKENS, np.dtype("<i8"), (self.samples, self.branches, self.length), start)
            arrays |= {"tokens": tokens, "labels": StoredArray(TOKENS, np.dtype("<i8"), (self.samples,), tokens.end)}
        return arrays

    def headers(self) -> dict[str, bytes]:
        return {IMAGES: self._npy_header()} | ({TOKENS: self._safetensors_header()} if self.save_tokens else {})

    def scratch(self) -> dict[str, int]:
        size = self.arrays()["images"].end
        return {IMAGES: size, PACKED: size + ZIP_BYTES}

    def _npy_header(self) -> bytes:
        header = io.BytesIO()
        shape = (self.samples, self.height, self.width, 3)
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        return header.getvalue()

    def _safetensors_header(self) -> bytes:
        shapes = {"tokens": [self.samples, self.branches, self.length], "labels": [self.samples]}
        header, start = {}, 0
        for name, shape in shapes.items():
            end = start + 8 * int(np.prod(shape))
            header[name] = {"dtype": "I64", "shape": shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def write_samples(
    writer: RowWriter, start: int, images: np.ndarray, tokens: np.ndarray | None, labels: np.ndarray | None
) -> None:
    """Write samples from number `start` on.

    Args:
        writer: of a folder with a `SampleManifest`.
        start: number of the first one.
        images: (n, H, W, 3) uint8.
        tokens, labels: (n, P, L) and (n,) integers; read only where the folder keeps them.
    """
    writer.write("images", start, images)
    if writer.manifest.save_tokens:
        writer.write("tokens", start, tokens)
        writer.write("labels", start, labels)
    if writer.manifest.png:
        folder = writer.folder / PNG
        folder.mkdir(exist_ok=True)
        paths = [folder / f"{number:06d}.png" for number in range(start, start + len(images))]
        try:
            with ThreadPoolExecutor(4) as pool:  # Pillow compresses outside of Python's lock
                list(pool.map(lambda image, path: Image.fromarray(image).save(path), images, paths))
        except OSError as error:
            raise disk_error(error, folder, "more image files", writer.manifest) from error


def pack(folder: Path) -> None:
    """Copy the images into the `.npz` file, block by block, which appears when it is complete.

    The zip file is stored uncompressed and has no time stamp: equal samples make equal files.
    """
    # its space is reserved: written over from the start, then cut
    with open(folder / PACKED, "r+b") as file:
        member = zipfile.ZipInfo("arr_0.npy")
        with (
            zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
            open(folder / IMAGES, "rb") as images,
            archive.open(member, "w", force_zip64=True) as target,
        ):
            shutil.copyfileobj(images, target, 1 << 24)
        file.truncate(file.tell())
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / PACKED, folder / NPZ)
