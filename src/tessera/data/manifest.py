"""The file that says what a folder of arrays holds, and whether it is whole."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from tessera.errors import CheckpointError, MissingFileError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class StoredArray:
    """Where an array lies on disk, in C order.

    Attributes:
        file: name in the folder.
        dtype: of the elements, little-endian.
        shape: first dimension: rows.
        offset: byte of the file at which it begins.
    """

    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return self.dtype.itemsize * int(np.prod(self.shape[1:]))

    @property
    def end(self) -> int:
        """Byte of the file after the array."""
        return self.offset + self.shape[0] * self.row_bytes


@dataclass(kw_only=True)
class FolderManifest:
    """Base of the manifests. Fields of subclasses are facts, unless they are listed in `STATE`.

    Attributes:
        kind: what the folder holds, in a word.
        format: version of the folder's layout.
        complete: all rows are written.
        seal: sha256 over the other fields.
    """

    FORMAT: ClassVar[int]
    STATE: ClassVar[tuple[str, ...]] = ("complete", "seal")
    NOUN: ClassVar[str]  # what the folder holds, for messages
    SPACE_KEY: ClassVar[str]  # config key by which another disk is chosen

    kind: str
    format: int
    complete: bool = False
    seal: str = ""

    @property
    def units(self) -> int:
        """What is counted as done one by one while the folder is filled: rows of the arrays, or groups of rows."""
        raise NotImplementedError

    def arrays(self) -> dict[str, StoredArray]:
        """The arrays by name."""
        raise NotImplementedError

    def headers(self) -> dict[str, bytes]:
        """What files begin with."""
        return {}

    def scratch(self) -> dict[str, int]:
        """Files, with their sizes, that are needed only until the folder is complete."""
        return {}

    def facts(self) -> dict[str, Any]:
        """What has to agree for a folder to be used in the place of another, as JSON stores it."""
        facts = {key: value for key, value in asdict(self).items() if key not in self.STATE}
        return json.loads(json.dumps(facts))

    def difference(self, wanted: dict[str, Any]) -> str:
        """Readable list of the facts that are not as wanted; "" if none."""
        own = self.facts()
        wanted = json.loads(json.dumps(wanted))
        return "; ".join(text for key in wanted for text in _differences(key, own[key], wanted[key]))

    def _seal(self) -> str:
        content = {key: value for key, value in asdict(self).items() if key != "seal"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the manifest file atomically."""
        self.seal = self._seal()
        temporary = folder / f"{MANIFEST}.tmp"
        with open(temporary, "w") as file:
            json.dump(asdict(self), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the manifest file.

        Raises:
            MissingFileError: there is none.
            CheckpointError: damaged, of another format version, or of a folder of another kind.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise MissingFileError(f"{folder} holds no {cls.NOUN} (no {MANIFEST}); correct the path")
        again = f"delete {folder} to make it again"
        kind = cls.__dataclass_fields__["kind"].default
        try:
            content = json.loads(path.read_text())
            version, found = content.get("format"), content.get("kind", kind)
            manifest = cls(**content) if (version, found) == (cls.FORMAT, kind) else None
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); {again}") from error
        if manifest is None and found != kind:
            raise CheckpointError(f"{folder} holds {found}, not {kind}; choose another folder")
        if manifest is None:
            raise CheckpointError(f"{path} has format version {version}, not {cls.FORMAT}; {again}")
        if manifest.seal != manifest._seal():
            raise CheckpointError(f"{path} was changed after it was written; {again}")
        return manifest


def kind_of(folder: Path) -> str | None:
    """What a folder says it holds; None where there is no readable manifest."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return content.get("kind") if isinstance(content, dict) else None


def _differences(key: str, own: Any, wanted: Any) -> Iterator[str]:
    if isinstance(own, dict) and isinstance(wanted, dict):
        for name in sorted({*own, *wanted}):
            yield from _differences(f"{key}.{name}", own.get(name), wanted.get(name))
    elif own != wanted:
        yield f"{key} is {own!r}, not {wanted!r}"
