"""Writes docs/checkpoints.md: the published checkpoints that `tessera.zoo` loads.

`--check` only tells whether the file is up to date.
"""

import argparse
import sys
from pathlib import Path

from tessera import zoo
from tessera.zoo import Checkpoint

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Published checkpoints

`tessera.zoo.load(name)` fetches one from the Hugging Face hub and loads it strictly; `path=` takes the file. Written by
`make docs` from the tables in `src/tessera/zoo/published`.

Figures are the publishers'. None of them was measured here, and none of the files was opened here: keys, shapes and
parameters are those of the public code at the published hyper-parameters. Parameters are in millions, without frozen
teachers. The licences of the weights are those of their repositories; ask there before using them.
"""
TITLES = {"tokenizer": "Tokenizers", "generator": "Generators", "extractor": "Feature extractors", "file": "Files"}


def row(entry: Checkpoint) -> str:
    """A line of the table of an entry's kind."""
    place = f"{entry.repository}: {entry.filename}" if entry.repository else entry.filename or "in this package"
    figures = ", ".join(f"{name} {value:g}" for name, value in entry.reported.items())
    notes = "; ".join(text for text in (entry.protocol, entry.note) if text)
    decoder = f"`{entry.tokenizer}`" if entry.tokenizer else ""
    size = "" if entry.params_millions is None else f"{entry.params_millions:g}"
    return f"| `{entry.name}` | {place} | {size} | {entry.resolution or ''} | {decoder} | {figures} | {notes} |"


def render() -> str:
    """The page."""
    parts = [HEAD]
    for kind, title in TITLES.items():
        table = [
            "| name | file | parameters | pixels | decoded by | published figures | protocol, notes |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(row(zoo.info(name)) for name in zoo.names(kind)),
        ]
        parts.append(f"\n## {title}\n\n" + "\n".join(table) + "\n")
    return "".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 where --check finds an old page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is old")
    options = parser.parse_args(arguments)
    if options.check:
        if PAGE.exists() and PAGE.read_text() == render():
            return 0
        print("docs/checkpoints.md is not up to date; run make docs", file=sys.stderr)
        return 1
    PAGE.write_text(render())
    return 0


if __name__ == "__main__":
    sys.exit(main())
