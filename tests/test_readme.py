"""Every command in the README, the pages of docs/, the Makefile and CI exists and would run what it says."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from conf_commands import ROOT, composed, expanded, script_commands
from tessera.run.chain import WHOLE
from tessera.run.reproduce import find
from tessera.run.rows import rows

README = ROOT / "README.md"
# the commands of claims.md are those of its plan, which has tests of its own
PAGES = [README, *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "claims.md")]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = dict(re.findall(r"^([a-z][a-z-]*):.*?## (.+)$", MAKEFILE, re.MULTILINE))


def code_blocks():
    """What the pages' fenced blocks contain, without the console's prompt."""
    text = "\n".join(page.read_text() for page in PAGES)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    shown = [block for language, block in blocks if language in ("", "bash", "sh", "shell", "console")]
    return [re.sub(r"^\$ ", "", block, flags=re.MULTILINE) for block in shown]


SHELL = "\n".join(code_blocks())
COMMANDS = list(script_commands(SHELL))


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z][a-z-]*)", SHELL))))
def test_make_target_exists(target):
    row = target.removeprefix("reproduce-")
    assert target in TARGETS or (row != target and find(row, [*rows(), *WHOLE]))


@pytest.mark.parametrize(("script", "arguments"), COMMANDS, ids=[" ".join([s, *a]) for s, a in COMMANDS])
def test_script_command_composes(script, arguments):
    assert (ROOT / f"{script}.py").exists()
    for overrides in expanded(arguments):
        composed(script, overrides)


def modules_run():
    return sorted(set(re.findall(r"python3? -m (tessera[.\w]*)", SHELL + MAKEFILE)))


@pytest.mark.parametrize("name", modules_run())
def test_module_exists(name):
    spec = importlib.util.find_spec(name)
    assert spec is not None and '__name__ == "__main__"' in Path(spec.origin).read_text()


def test_readme_names_the_commands():
    """The README tells how to test and to see the demo; CI runs its test command."""
    assert {"make test", "make demo"} <= set(re.findall(r"make [a-z]+", README.read_text()))
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make ")]
    assert [command.split()[:2] for command in commands] == [["make", "test"]]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "docs/claims.md"], ids=lambda page: page.name)
def test_files_named_in_pages_exist(page):
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments):
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30
    )


@needs_make
def test_make_lists_its_targets():
    shown = make().stdout
    assert shown == make("help").stdout
    for target, description in TARGETS.items():
        assert re.search(rf"^  make {target} +{re.escape(description)}$", shown, re.MULTILINE)


@needs_make
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_make_target_has_a_recipe(target):
    result = make("--dry-run", "--always-make", target)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr
    if target in ("test", "demo", "fashion-mnist", "bench", "lint"):
        assert "-m venv" in result.stdout  # each works as the only command


@needs_make
def test_make_clean_keeps_results():
    commands = make("--dry-run", "clean").stdout
    assert "outputs" not in commands and "multirun" not in commands and "rm -rf .venv" not in commands


def test_ci_script_is_executable():
    path = ROOT / ".ci/run"
    assert path.stat().st_mode & 0o111 and subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
