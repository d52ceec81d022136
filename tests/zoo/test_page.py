"""docs/checkpoints.md lists what the zoo knows."""

import importlib.util

from conf_commands import ROOT
from tessera import zoo

PROGRAM = ROOT / "docs" / "checkpoints.py"
spec = importlib.util.spec_from_file_location("checkpoints_page", PROGRAM)
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)


def test_the_page_is_up_to_date(monkeypatch, tmp_path, capsys):
    """`make docs` writes it."""
    assert page.main(["--check"]) == 0
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    assert page.main(["--check"]) == 1 and "run make docs" in capsys.readouterr().err
    assert page.main([]) == 0 and page.main(["--check"]) == 0


def test_every_checkpoint_has_a_line():
    text = page.PAGE.read_text()
    assert all(text.count(f"\n| `{name}` | ") == 1 for name in zoo.names() + zoo.names("file"))
