"""The Hugging Face hub: files by name, exports to and from it. Optional: `pip install tessera[hub]`."""

import re
from pathlib import Path
from typing import Any

from tessera.errors import CheckpointError, MissingFileError
from tessera.zoo.card import FILES

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def _hub(purpose: str, advice: str) -> Any:
    """The module `huggingface_hub`."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingFileError(
            f"{purpose} needs huggingface_hub; install it by `pip install tessera[hub]`, or {advice}"
        ) from error
    return huggingface_hub


def _fetch(purpose: str, advice: str, call: str, **arguments: Any) -> Path:
    """Result of a download function of the hub, with its many failures as one message."""
    hub = _hub(purpose, advice)
    try:
        return Path(getattr(hub, call)(**arguments))
    except Exception as error:  # the client's own, and those of the http library below it
        reason = next(iter(str(error).strip().splitlines()), "")
        raise MissingFileError(
            f"{purpose} failed ({type(error).__name__}: {reason}); check the network and the name, or {advice}"
        ) from error


def download(repository: str, filename: str, advice: str) -> Path:
    """A file of a repository, from the hub's cache where it is there.

    Args:
        repository: `owner/name`.
        filename: path inside.
        advice: what to do instead, for the message.

    Raises:
        MissingFileError: huggingface_hub is not installed, no network, no such file.
    """
    return _fetch(
        f"downloading {filename} of {repository} from the Hugging Face hub", advice,
        "hf_hub_download", repo_id=repository, filename=filename,
    )  # fmt: skip


def local_folder(source: str | Path) -> Path:
    """`source` itself where it is a folder, or the export downloaded from the repository of that id.

    Args:
        source: a folder, or `owner/name`.

    Raises:
        MissingFileError: neither.
    """
    if Path(source).is_dir() or isinstance(source, Path) or not _ID.fullmatch(source):
        return Path(source)
    return _fetch(
        f"{source} is no folder here; downloading it from the Hugging Face hub",
        "give a folder written by tessera.zoo.export",
        "snapshot_download", repo_id=source, allow_patterns=list(FILES),
    )  # fmt: skip


def push_to_hub(folder: str | Path, repository: str, private: bool = False, message: str | None = None) -> str:
    """Upload an export, which `from_pretrained(repository)` then reads.

    Args:
        folder: written by `export`.
        repository: `owner/name`; created where it doesn't exist.
        private: of a repository that is created.
        message: of the commit.

    Returns:
        Address of the commit.

    Raises:
        MissingFileError: huggingface_hub is not installed; a file of the export is missing.
        CheckpointError: the hub refuses, e.g. without a token.
    """
    if missing := [name for name in FILES if not (Path(folder) / name).is_file()]:
        raise MissingFileError(f"{folder} lacks {', '.join(missing)}; give a folder written by tessera.zoo.export")
    api = _hub("push_to_hub", "upload the folder by hand").HfApi()
    try:
        api.create_repo(repo_id=repository, private=private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=repository,
                folder_path=str(folder),
                allow_patterns=list(FILES),
                commit_message=message or "Upload a model of Tessera",
            )
        )
    except Exception as error:
        raise CheckpointError(
            f"the Hugging Face hub refused {repository} ({type(error).__name__}: {error}); log in by `hf auth login`, "
            "and check the repository's name"
        ) from error
