"""Folders filled in chunks: what is left to do, what is refused, and how progress is shown."""

import logging
import os

import numpy as np
import pytest

from data.pictures import Squares
from tessera.data import build_token_cache
from tessera.data.progress import Progress
from tessera.data.resumable import LOCK, pending_ranges
from tessera.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("done", "chunk", "expected"),
    [
        ("00000", 2, [(0, 2), (2, 4), (4, 5)]),
        ("11000", 2, [(2, 4), (4, 5)]),
        ("01011", 4, [(0, 1), (2, 3)]),
        ("1000000110", 4, [(1, 4), (4, 7), (9, 10)]),  # marked in chunks of another size
        ("111", 2, []),
        ("000", 9, [(0, 3)]),
    ],
)
def test_pending_ranges(done, chunk, expected):
    found = pending_ranges(np.array([int(digit) for digit in done], np.uint8), chunk)
    assert [(part.start, part.stop) for part in found] == expected


def build(folder):
    return build_token_cache(
        folder,
        Squares("train"),
        lambda batch: batch["index"].view(-1, 1, 1),
        tokenizer_fingerprint="t",
        codebook_size=99,
        shape=(1, 1),
    )


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"holds other files \(thesis\.tex\); choose another folder for tokens"):
        build(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [LOCK, "thesis.tex"]
    with pytest.raises(ConfigError, match=r"thesis\.tex is a file"):
        build(tmp_path / "thesis.tex")


def test_a_manifest_of_another_kind_is_refused(tmp_path):
    (build(tmp_path / "c") / "manifest.json").write_text('{"kind": "samples", "format": 2}')
    with pytest.raises(CheckpointError, match="holds samples, not tokens"):
        build(tmp_path / "c")


def test_progress_counts_what_all_processes_have_done(caplog):
    counts = iter([100, 150, 400])
    with (
        caplog.at_level(logging.INFO),
        Progress(lambda: next(counts), 400, "images", plain=True, every_seconds=0) as show,
    ):
        show()
        show()
    lines = [record.message for record in caplog.records]
    assert lines[0].startswith("150 of 400 images") and lines[1].startswith("400 of 400 images")
    quiet = Progress(lambda: 0, 4, "images", plain=True, every_seconds=1000)
    quiet.count = None  # not asked before it is time to
    quiet()


def test_progress_on_a_terminal_is_a_bar(capsys):
    with Progress(lambda: 3, 4, "samples", plain=False) as show:
        show()
    assert "3/4" in capsys.readouterr().err
