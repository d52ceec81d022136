"""The benchmark of sampling: both sides agree for every family, its counts are the notes', a difference voids it."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import sampling


def run(monkeypatch, *arguments):
    small = ["--depth", "1", "--steps", "4", "--batch", "2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["sampling.py", *small, *map(str, arguments)])
    monkeypatch.setattr(sampling, "product_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(sampling, "memory_rate", lambda device: 1e10)
    sampling.main()


@pytest.mark.parametrize("family", [name for name in sampling.FAMILIES if name != "var"])
def test_sides_agree(family, monkeypatch, tmp_path, capsys):
    run(monkeypatch, "--families", family, "--json", tmp_path / "out.json")
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["agreement"] == 1 and row["case"].startswith(family)
    assert row["limit_seconds"] > 0 and row["plain_seconds"] > 0 and row["ours_peak_bytes"] > 0
    assert row["of_limit"] == pytest.approx(row["limit_seconds"] / row["ours_seconds"])
    assert f"{row['ratio']:.2f}x" in capsys.readouterr().out


@pytest.mark.slow
def test_sides_agree_on_scales(monkeypatch, tmp_path):
    run(monkeypatch, "--families", "var", "--batch", 1, "--json", tmp_path / "out.json")
    assert [row["agreement"] for row in json.loads((tmp_path / "out.json").read_text())] == [1]


def test_a_difference_voids_the_comparison(monkeypatch):
    plain = sampling.rar.PlainRAR.__call__
    monkeypatch.setattr(sampling.rar.PlainRAR, "__call__", lambda *arguments: plain(*arguments).roll(1, -1))
    with pytest.raises(SystemExit, match="batch 2: tokens differ"):
        run(monkeypatch, "--families", "rar")


@pytest.mark.parametrize(("family", "message"), [("rnn", "family 'rnn' is unknown"), ("rar:s", "rar has no size 's'")])
def test_unknown_names(family, message, monkeypatch):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "--families", family)


def meta(name):
    options = Namespace(full=True, compile=False, device=torch.device("meta"), dtype="float32", depth=0, steps=256)
    with torch.device("meta"):
        family, model, _ = sampling.built(name, options)
    return model, lambda batch: sampling.flops_and_bytes(model, family.work(model, batch, family.sampling))


def test_counts_are_those_of_the_notes():
    """RAR-B: 180.3 GFLOP an image where the batch is of one class, 44.3 more for each further class, and 4.89 GB of
    keys and values in bfloat16."""
    _, counts = meta("rar")
    (one, read), (two, more) = counts(1), counts(2)
    one_class = one - 2 * 2 * 257 * 86.11e6  # without the modulation of the class and of none
    per_image = two - one
    assert per_image / 1e9 == pytest.approx(224.6 - 256 * 2 * 0.786e-3, abs=0.3)  # the head once, not per half
    assert one_class / 1e9 == pytest.approx(180.3 - 256 * 2 * 0.786e-3, abs=0.3)
    assert (more - read) / 1e9 == pytest.approx(2 * 4.89, abs=0.02)  # float32
    weights = 256 * 341e6 * 2 + 172e6 * 2  # bfloat16 in the notes
    assert (read - (more - read)) / 1e9 == pytest.approx(weights / 1e9, rel=2e-3)


@pytest.mark.parametrize(("name", "gflop"), [("var", 591), ("var:d17_pq2", 290)])
def test_counts_of_scales(name, gflop):
    _, counts = meta(name)
    assert counts(1)[0] / 1e9 == pytest.approx(gflop, rel=2e-3)
