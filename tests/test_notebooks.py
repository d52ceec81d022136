"""The notebooks and the README's Python run without an error; the notebooks hold the pictures of such a run."""

import importlib.util
import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 300_000  # bytes of a file; pictures are small

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def execute(path, folder):
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks/execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute(path, folder)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """What a cell shows: its text without numbers and spaces, and the number of its pictures."""
    text = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
    return re.sub(r"[\d.\s-]", "", text), pictures


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 4


@pytest.mark.slow
@every_notebook
def test_notebook_runs_and_shows_what_is_committed(path, tmp_path):
    stored = nbformat.read(path, as_version=4)
    fresh = execute(path, tmp_path)
    assert [shown(cell) for cell in code_cells(fresh)] == [shown(cell) for cell in code_cells(stored)]
    assert not list(tmp_path.iterdir())


@every_notebook
def test_notebook_is_committed_with_its_outputs(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(shown(cell)[1] for cell in cells) >= 4
    # nothing else than text and pictures: an error, a warning or a bare object would be noise
    kinds = {(output.output_type, output.get("name")) for cell in cells for output in cell.outputs}
    assert kinds <= {("stream", "stdout"), ("display_data", None)}
    assert path.stat().st_size < LARGEST


@every_notebook
def test_links_of_a_notebook_lead_somewhere(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!https?://)([^)#]+)", cell.source):
                assert (path.parent / target).exists(), target


PYTHON = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", PYTHON, ids=[block.strip().splitlines()[-1] for block in PYTHON])
def test_python_of_the_readme_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(code, {})
