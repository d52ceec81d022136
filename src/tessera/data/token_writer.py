"""Writes the files of a token cache (token_cache.py): space first, then rows by position, the manifest last."""

import errno
import os
from pathlib import Path

import numpy as np
from torch import Tensor

from tessera.data.images import VIEWS
from tessera.data.token_cache import ARRAYS, MANIFEST, Manifest, checksum
from tessera.errors import DataError

DONE = "done.bin"


def allocate(folder: Path, manifest: Manifest, chunks: int) -> None:
    """Make the files of a cache of which nothing is done yet, with their disk space reserved.

    Raises:
        DataError: no room.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    for name, (dtype, shape) in manifest.arrays().items():
        _reserve(folder / name, dtype.itemsize * int(np.prod(shape)))
    (folder / DONE).write_bytes(bytes(chunks))
    manifest.write(folder)  # last: a folder without manifest is started over


def _reserve(path: Path, size: int) -> None:
    """Take the disk space now, so that a full disk is found before anything is computed."""
    with open(path, "wb") as file:
        try:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            file.truncate(0)  # don't keep what little there was
            raise _disk_error(error, path, f"{size / 2**20:.1f} MiB") from error


def _disk_error(error: OSError, path: Path, what: str) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return DataError(
        f"no room for {what} in {path.parent} ({error.strerror}); free space or set paths.tokens to another disk, and "
        "repeat the command: finished chunks are kept"
    )


class TokenWriter:
    """Writes rows and markers by position; several processes may write different rows at once.

    Plain writes rather than a memory map: on a full disk or a broken share they raise instead of killing the process.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest, self.arrays = folder, manifest, manifest.arrays()
        self.files: dict[str, int] = {}

    def __enter__(self) -> "TokenWriter":
        self.files = {name: os.open(self.folder / name, os.O_WRONLY) for name in (*ARRAYS, DONE)}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            os.close(file)

    def write(self, images: range, tokens: np.ndarray, labels: np.ndarray, index: np.ndarray) -> None:
        """Write all views of the images at these positions: tokens (len V, P, L), labels and index (len,)."""
        views = VIEWS[self.manifest.views]
        for name, start, values in (
            ("tokens.bin", images.start * views, tokens),
            ("labels.bin", images.start, labels),
            ("index.bin", images.start, index),
        ):
            dtype, shape = self.arrays[name]
            self._put(name, start * int(np.prod(shape[1:])) * dtype.itemsize, values.astype(dtype).tobytes())

    def mark(self, chunk: int) -> None:
        """Record a chunk as done, after its rows have reached the disk."""
        for name in ARRAYS:
            os.fsync(self.files[name])
        self._put(DONE, chunk, b"\1")

    def _put(self, name: str, offset: int, content: bytes) -> None:
        try:
            while content:
                written = os.pwrite(self.files[name], content, offset)
                offset, content = offset + written, content[written:]
        except OSError as error:
            raise _disk_error(error, self.folder / name, "more tokens") from error


def check_tokens(
    tokens: Tensor | np.ndarray, shape: tuple[int, ...], codebook_size: int, origin: str = "the encoder"
) -> None:
    """Refuse tokens of another shape, of a type that holds no integers, or outside [0, K).

    Raises:
        DataError: says where they come from.
    """
    tokens = np.asarray(tokens)
    if tokens.shape != shape or tokens.dtype.kind not in "iu":
        raise DataError(f"{origin} gave {tokens.dtype} tokens of shape {tokens.shape}, not integers {shape}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < codebook_size:
        culprit = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DataError(f"{origin} gave token {culprit}, outside [0, {codebook_size}) of codebook_size={codebook_size}")


def finish(folder: Path, manifest: Manifest) -> None:
    """Declare the cache complete; the last thing that happens."""
    if not np.all(np.fromfile(folder / DONE, np.uint8)):
        raise DataError(f"{folder}: some chunks are missing; repeat the command to complete it")
    manifest.checksum, manifest.complete = checksum(folder), True
    manifest.write(folder)
    (folder / DONE).unlink()
