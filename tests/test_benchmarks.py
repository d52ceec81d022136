"""The benchmark of the quantizers runs, its sides agree, and what would not fit is left out."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import quantizers

SMALL = ["--device", "cpu", "--repeats", "1", "--tokens", "256", "--dims", "8", "--sizes", "64"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quantizers.py", *SMALL, *map(str, arguments)])
    quantizers.main()


@pytest.mark.parametrize("kind", quantizers.KINDS)
def test_sides_agree(kind, monkeypatch, tmp_path):
    run(monkeypatch, "--kinds", kind, "--json", tmp_path / "out.json")
    lines = json.loads((tmp_path / "out.json").read_text())
    assert {line["side"] for line in lines} >= {"ours", "naive"}
    assert {line["what"] for line in lines} == ({"forward"} if kind == "search" else {"forward", "forward+backward"})
    for line in lines:
        assert line["same_codes"] == 1.0 and line["seconds"] > 0 and line["peak_bytes"] > 0
        assert (line["tokens"], line["size"]) == (256, 64)


@pytest.mark.parametrize("limit", [None, 1e-4])
def test_what_does_not_fit_is_named_and_left_out(limit, monkeypatch, tmp_path, capsys):
    if limit is None:
        monkeypatch.setattr(quantizers, "available_bytes", lambda device: 20_000)
    options = [] if limit is None else ["--memory", limit]
    run(monkeypatch, "--kinds", "ibq", "--passes", "forward", "--json", tmp_path / "out.json", *options)
    assert [line["side"] for line in json.loads((tmp_path / "out.json").read_text())] == ["ours"]
    assert "naive skipped: needs about" in capsys.readouterr().out


def test_what_takes_too_long_is_named_and_stopped(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--kinds", "search", "ibq", "--patience", 1e-6, "--json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == []
    out = capsys.readouterr().out
    assert out.count("naive stopped: took more than") == 3 and out.count("ours stopped: took more than") == 3


def test_pictures_of_multi_scale_kinds_are_whole(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--kinds", "mslfq", "--tokens", 100)
    assert "multiples of 256" in capsys.readouterr().err


def test_default_sizes_are_part_of_the_grid():
    for tokens, dim, size in quantizers.QUICK:
        assert tokens in quantizers.TOKENS and dim in quantizers.DIMS and size in quantizers.SIZES
