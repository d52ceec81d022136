"""Every command in the README, the Makefile and CI exists and would run what it says."""

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
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = dict(re.findall(r"^([a-z][a-z-]*):.*?## (.+)$", MAKEFILE, re.MULTILINE))


def code_blocks():
    """What the README's fenced blocks contain, without the console's prompt; nothing while there is no README."""
    if not README.exists():
        return []
    blocks = re.findall(r"^```(?:bash|sh|shell|console)?\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    return [re.sub(r"^\$ ", "", block, flags=re.MULTILINE) for block in blocks]


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
    if README.exists():
        assert {"make test", "make demo"} <= set(re.findall(r"make [a-z]+", README.read_text()))
    commands = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line.startswith("make ")]
    assert [command.split()[:2] for command in commands] == [["make", "test"]]


def test_files_named_in_the_readme_exist():
    if README.exists():
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", README.read_text()):
            assert (ROOT / target).exists(), target


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
