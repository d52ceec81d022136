"""Folders of arrays that several processes fill in chunks: space first, then rows by position, markers after them.

Whatever kills the work, the next run of it does what is not marked yet. While it lasts the folder also holds
`done.bin` (one byte per unit) and `build.lock`.
"""

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from tessera import distributed
from tessera.data.manifest import MANIFEST, FolderManifest
from tessera.data.progress import Progress
from tessera.errors import CheckpointError, ConfigError, DataError

log = logging.getLogger(__name__)

DONE, LOCK = "done.bin", "build.lock"


class RowWriter:
    """Writes rows and markers by position; several processes may write different rows at once.

    Plain writes rather than a memory map: on a full disk or a broken share they raise instead of killing the process.

    Args:
        folder: whose files `allocate` has made.
        manifest: what it shall hold.
        progress: called after each chunk.
    """

    def __init__(self, folder: Path, manifest: FolderManifest, progress: Callable[[], None] = lambda: None):
        self.folder, self.manifest, self.progress = folder, manifest, progress
        self.arrays = manifest.arrays()
        self.files: dict[str, int] = {}

    def __enter__(self) -> "RowWriter":
        names = {array.file for array in self.arrays.values()} | {DONE}
        self.files = {name: os.open(self.folder / name, os.O_WRONLY) for name in sorted(names)}
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            os.close(file)

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Write the rows of an array from number `start` on; values are cast to the array's type."""
        array = self.arrays[name]
        if rows.shape[1:] != array.shape[1:]:
            raise DataError(f"rows of {name} have shape {rows.shape[1:]}, not {array.shape[1:]}")
        self._put(array.file, array.offset + start * array.row_bytes, rows.astype(array.dtype).tobytes())

    def mark(self, units: range) -> None:
        """Record units as done, after their rows have reached the disk."""
        for name, file in self.files.items():
            if name != DONE:
                os.fsync(file)
        self._put(DONE, units.start, b"\1" * len(units))
        self.progress()

    def _put(self, name: str, offset: int, content: bytes) -> None:
        try:
            while content:
                written = os.pwrite(self.files[name], content, offset)
                offset, content = offset + written, content[written:]
        except OSError as error:
            raise disk_error(error, self.folder, f"more {self.manifest.NOUN}", self.manifest) from error


def fill(
    folder: Path,
    manifest: FolderManifest,
    chunk: int,
    work: Callable[[RowWriter, list[range]], None],
    finish: Callable[[], None] = lambda: None,
    unit: str = "images",
) -> bool:
    """Fill a folder; all processes of the group share the work.

    A complete folder of the same content is left as it is, an interrupted one is completed, whatever the number of
    processes and the size of chunks then and now. Another job that fills the same folder is waited for.

    Args:
        folder: made where needed.
        manifest: what it shall hold; written when the space is reserved, and again when all is complete.
        chunk: units between two markers: the most work per process that a kill can cost. Chunks begin at multiples of
            it, so that what a chunk holds depends on neither the number of processes nor who fills it.
        work: called with a writer and the ranges of units to do here; writes their rows and marks each range.
        finish: called by the first process when all units are done, before the manifest says so.
        unit: name of the units, in the plural.

    Returns:
        Whether there was anything to do.

    Raises:
        CheckpointError: the folder holds something else.
        ConfigError: the folder is a file, or holds files of another origin.
        DataError: full disk; whatever `work` raises. Raised on every process.
    """
    with _locked(folder):
        first = distributed.rank() == 0
        pending = distributed.broadcast_object(together(lambda: _prepare(folder, manifest, chunk) if first else None))
        if pending is None:
            return False
        own = pending[distributed.rank() :: distributed.world_size()]
        log.info("%s in %s: %d %s to make here", manifest.NOUN, folder, sum(map(len, own)), unit)
        progress = Progress(lambda: count_done(folder), manifest.units, unit) if first else nullcontext(lambda: None)
        with progress as report, RowWriter(folder, manifest, report) as writer:
            together(lambda: work(writer, own))
        together(lambda: _complete(folder, manifest, finish) if first else None)
    return True


def count_done(folder: Path) -> int:
    """Units that are marked in a folder that isn't complete."""
    return int(np.fromfile(folder / DONE, np.uint8).sum())


def allocate(folder: Path, manifest: FolderManifest) -> None:
    """Make the files of a folder of which nothing is done yet, with their disk space reserved.

    Raises:
        DataError: no room.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    sizes = dict(manifest.scratch())
    for array in manifest.arrays().values():
        sizes[array.file] = max(sizes.get(array.file, 0), array.end)
    for name, size in sizes.items():
        _reserve(folder / name, size, manifest)
    for name, header in manifest.headers().items():
        with open(folder / name, "r+b") as file:
            file.write(header)
    (folder / DONE).write_bytes(bytes(manifest.units))
    manifest.write(folder)  # last: a folder without manifest is started over


def _reserve(path: Path, size: int, manifest: FolderManifest) -> None:
    """Take the disk space now, so that a full disk is found before anything is computed."""
    with open(path, "wb") as file:
        try:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            file.truncate(0)  # don't keep what little there was
            raise disk_error(error, path.parent, f"{size / 2**20:.1f} MiB", manifest) from error


def disk_error(error: OSError, folder: Path, what: str, manifest: FolderManifest) -> Exception:
    """A full disk as a message to the user; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return DataError(
        f"no room for {what} in {folder} ({error.strerror}); free space or set {manifest.SPACE_KEY} to another disk, "
        "and repeat the command: finished chunks are kept"
    )


def _prepare(folder: Path, wanted: FolderManifest, chunk: int) -> list[range] | None:
    """Make the files, or accept those of an interrupted run; returns the ranges to do, None if all is complete."""
    if (folder / MANIFEST).exists():
        found = wanted.read(folder)
        if difference := found.difference(wanted.facts()):
            raise CheckpointError(
                f"{folder} holds other {wanted.NOUN}: {difference}; delete it or choose another folder"
            )
        if found.complete:
            _tidy(folder, wanted)
            return None
        done = np.fromfile(folder / DONE, np.uint8) if (folder / DONE).exists() else ()
        if len(done) == wanted.units:
            log.info("continuing %s: %d of %d are done", folder, int(done.sum()), len(done))
            return pending_ranges(done, chunk)
    own = {array.file for array in wanted.arrays().values()} | {*wanted.scratch(), DONE, LOCK, MANIFEST}
    own |= {f"{MANIFEST}.tmp"}
    if foreign := sorted(path.name for path in folder.iterdir() if path.name not in own):
        raise ConfigError(f"{folder} holds other files ({foreign[0]}); choose another folder for {wanted.NOUN}")
    allocate(folder, wanted)
    return pending_ranges(np.zeros(wanted.units, np.uint8), chunk)


def pending_ranges(done: np.ndarray, chunk: int) -> list[range]:
    """Ranges of the units that aren't marked, cut at multiples of `chunk`."""
    todo = np.flatnonzero(done == 0)
    cuts = np.flatnonzero((np.diff(todo) > 1) | (todo[1:] % chunk == 0)) + 1
    return [range(int(part[0]), int(part[-1]) + 1) for part in np.split(todo, cuts) if len(part)]


def _complete(folder: Path, manifest: FolderManifest, finish: Callable[[], None]) -> None:
    """Declare the folder complete; the last thing that happens."""
    if count_done(folder) != manifest.units:
        raise DataError(f"{folder}: some chunks are missing; repeat the command to complete it")
    finish()
    manifest.complete = True
    manifest.write(folder)
    _tidy(folder, manifest)


def _tidy(folder: Path, manifest: FolderManifest) -> None:
    for name in (*manifest.scratch(), DONE):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, on behalf of all processes of this job."""
    file = None

    def acquire() -> None:
        nonlocal file
        if distributed.rank() == 0:
            if folder.exists() and not folder.is_dir():
                raise ConfigError(f"{folder} is a file; choose another folder")
            folder.mkdir(parents=True, exist_ok=True)
            file = open(folder / LOCK, "w")  # noqa: SIM115 (held until the end; the kernel frees it on a kill)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another job is filling %s; waiting for it", folder)
                fcntl.flock(file, fcntl.LOCK_EX)

    together(acquire)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def together(work: Callable[[], Any]) -> Any:
    """Do the work of this process; if any process fails, raise on all of them instead of leaving them to wait."""
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    if distributed.is_distributed():
        problems: list = [None] * distributed.world_size()
        dist.all_gather_object(problems, None if error is None else f"{type(error).__name__}: {error}")
        failed = [rank for rank, problem in enumerate(problems) if problem is not None]
        if failed and error is None:
            raise DataError(f"process {failed[0]} failed: {problems[failed[0]]}")
    if error is not None:
        raise error
    return result
