"""The benchmark of FID runs, and its sides agree."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import fid


def run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["fid.py", "--repeats", "1", *arguments])
    fid.main()
    return capsys.readouterr().out


def test_features_agree(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "--parts", "extraction", "--images", "1", "--size", "20")
    differences = [float(text) for text in re.findall(r"of the features to [\w-]+: ([\d.e+-]+)", out)]
    assert len(differences) == 2 and max(differences) < 1e-5
    assert out.count("images/s") == 3 and out.count("times as fast") == 2


def test_figures_agree(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "--parts", "figures", "--d", "24", "--n", "80")
    differences = [float(text) for text in re.findall(r"differ by ([\d.e+-]+) of it", out)]
    assert len(differences) == 2 and max(differences) < 1e-6
