"""The published text layout of pretokenised data."""

import json

import numpy as np
import pytest
import torch

from data.pictures import Squares
from tessera.data import TokenCache, build_token_cache, export_jsonl, import_jsonl, token_jsonl
from tessera.errors import CheckpointError, DataError, MissingFileError

SETTINGS = {"tokenizer_fingerprint": "t0", "codebook_size": 300, "num_classes": 3}


def cache_of(folder, branches=1, views="none", count=11):
    def encode(batch):
        sites = torch.arange(branches * 4).view(1, branches, 4)
        return (batch["index"][:, None, None] * 7 + sites) % 300

    build_token_cache(
        folder,
        Squares("train", count),
        encode,
        tokenizer_fingerprint="t0",
        codebook_size=300,
        shape=(branches, 4),
        views=views,
    )
    return TokenCache.open(folder)


def test_published_layout(tmp_path):
    path = export_jsonl(cache_of(tmp_path / "c"), tmp_path / "below" / "tokens.jsonl")
    lines = path.read_text().splitlines()
    assert len(lines) == 11 and lines[2] == '{"class_id": 2, "tokens": [14, 15, 16, 17]}'
    assert [entry.name for entry in path.parent.iterdir()] == ["tokens.jsonl"]


@pytest.mark.parametrize(("branches", "views"), [(1, "none"), (2, "none"), (1, "flip"), (2, "ten_crop")])
@pytest.mark.parametrize("block", [4096, 20])
def test_round_trip(tmp_path, monkeypatch, branches, views, block):
    monkeypatch.setattr(token_jsonl, "BLOCK", block)
    cache = cache_of(tmp_path / "c", branches, views)
    path = export_jsonl(cache, tmp_path / "t.jsonl")
    back = TokenCache.open(import_jsonl(path, tmp_path / "d", views=views, **SETTINGS), tokenizer_fingerprint="t0")
    back.verify()
    assert np.array_equal(back.tokens, cache.tokens) and np.array_equal(back.labels, cache.labels)
    assert back.tokens.dtype == np.uint16 and back.manifest.data == ""
    assert back.rows([5])["index"].item() == 5
    assert export_jsonl(back, tmp_path / "e.jsonl").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"class_id": 1, "tokens": [1, 2, 3]}', r"line 3: ValueError: tokens of shape \(3,\) after \(4,\)"),
        ('{"class_id": 1}', "line 3: KeyError: 'tokens'"),
        ('{"class_id": 1, "tokens": [1, 2, 3, 4]', "line 3: JSONDecodeError"),
        ('{"class_id": 1, "tokens": [1, 2, 3, 0.5]}', "line 3: ValueError: tokens are no list of integers"),
        ('{"class_id": 1, "tokens": [1, 2, 3, 300]}', r"lines 1 to 3 gave token 300, outside \[0, 300\)"),
        ('{"class_id": 1, "tokens": [1, 2, 3, -1]}', "token -1"),
        ('{"class_id": 3, "tokens": [1, 2, 3, 4]}', r"lines 1 to 3 has label 3, outside \[0, 3\)"),
        ("", "line 3: JSONDecodeError"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    good = json.dumps({"class_id": 0, "tokens": [1, 2, 3, 4]})
    path.write_text(f"{good}\n{good}\n{line}\n")
    with pytest.raises(DataError, match=message):
        import_jsonl(path, tmp_path / "d", **SETTINGS)
    with pytest.raises((CheckpointError, MissingFileError)):
        TokenCache.open(tmp_path / "d")


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(MissingFileError, match=r"t\.jsonl does not exist"):
        import_jsonl(tmp_path / "t.jsonl", tmp_path / "d", **SETTINGS)
    path = tmp_path / "t.jsonl"
    path.write_text("")
    with pytest.raises(DataError, match="0 lines"):
        import_jsonl(path, tmp_path / "d", **SETTINGS)
    path.write_text('{"class_id": 0, "tokens": [1]}\n{"class_id": 1, "tokens": [1]}\n')
    with pytest.raises(DataError, match="views of one image have different classes"):
        import_jsonl(path, tmp_path / "d", views="flip", **SETTINGS)
    import_jsonl(path, tmp_path / "d", **SETTINGS)
    with pytest.raises(CheckpointError, match="already holds"):
        import_jsonl(path, tmp_path / "d", **SETTINGS)
