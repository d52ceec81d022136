"""Executes notebooks in place, so that they hold their pictures: `python notebooks/execute.py [file ...]`."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
TIMEOUT = 300  # seconds for a cell


def execute(path: Path, folder: Path) -> NotebookNode:
    """The notebook with new outputs.

    Args:
        path: of the .ipynb file, which stays as it is.
        folder: where the kernel runs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message holds it.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        record_timing=False,  # it would change the file each time
        resources={"metadata": {"path": folder}},
    )
    return client.execute()


def main(names: list[str]) -> None:
    for path in map(Path, names) if names else sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(path, FOLDER), path)


if __name__ == "__main__":
    main(sys.argv[1:])
