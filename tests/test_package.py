"""The package as a whole: direction of imports, light imports, public names, pinned requirements."""

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tessera

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PUBLIC_NAMES = Path(__file__).with_name("public_names.txt")

# A module imports from lower layers and from its own package only; so there are no circles between packages.
LAYERS = (
    {"errors", "rng", "distributed"},
    {"frozen", "grids"},
    {"backbones", "data", "discriminators", "losses", "optim", "quantizers"},
    {"perturbation"},
    {"generators", "metrics", "tokenizers"},
    {"callbacks", "stages", "zoo"},
    {"run"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Slow to import or optional: imported by the functions that need them
LATE = {
    "huggingface_hub",
    "lpips",
    "matplotlib",
    "skimage",
    "sklearn",
    "submitit",
    "tensorboard",
    "timm",
    "torch_fidelity",
    "wandb",
}
# Those of them that `pip install tessera` does not bring
OPTIONAL = {"huggingface_hub", "lpips", "matplotlib", "skimage", "submitit", "wandb"}
# Their output is what they are run for
PRINTING = {"tessera.run.claims.study", "tessera.run.demo", "tessera.run.reproduce"}


def module_name(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}
every_module = pytest.mark.parametrize("name", sorted(FILES))


def imports(nodes):
    """Names of the modules that statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide the direction"
            whole = node.module == "tessera"
            yield from (f"tessera.{alias.name}" for alias in node.names) if whole else [node.module]


def top_level(tree):
    """Statements that run on import: functions' bodies left out."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from top_level(node)


def test_every_package_has_a_layer():
    packages = {name.split(".")[1] for name in FILES if "." in name}
    assert packages == set(LEVEL)


@every_module
def test_imports_point_downwards(name):
    package = name.split(".")[1] if "." in name else None
    for imported in imports(ast.walk(ast.parse(FILES[name].read_text()))):
        if not imported.startswith("tessera."):
            continue
        other = imported.split(".")[1]
        if other in LEVEL and other != package:
            assert package is not None, f"tessera/__init__.py imports {imported}: everyone pays for it"
            assert LEVEL[other] < LEVEL[package], f"{name} imports {imported}, which is not below it"


@every_module
def test_heavy_packages_are_imported_late(name):
    heavy = {imported.split(".")[0] for imported in imports(top_level(ast.parse(FILES[name].read_text())))}
    assert not heavy & LATE


@every_module
def test_no_print_and_no_path_edits(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            assert name in PRINTING, f"line {node.lineno}: print; use logging"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("sys", "path"), f"line {node.lineno}: sys.path"


ALONE = """
import importlib, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {late!r} else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        find = getattr(self.finder, "find_distributions", lambda context: [])
        return [] if context.name in {late!r} else find(context)

sys.meta_path[:] = map(Without, sys.meta_path)
for name in {names!r}:
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == "tessera"]:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except Exception as error:
        print(f"{{name}}: {{type(error).__name__}}: {{error}}")
"""


def test_each_module_is_importable_alone():
    """First of all, without any other module of the package, and without the optional packages."""
    code = ALONE.format(late=sorted(OPTIONAL), names=sorted(FILES))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, cwd="/"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_cli_imports_no_torch():
    code = "import sys, tessera.cli; print(sorted({'torch', 'numpy', 'lightning'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def public_names():
    """What each package offers by `__all__`, one dotted name a line."""
    packages = [name for name, path in FILES.items() if path.name == "__init__.py"]
    offered = [(package, getattr(importlib.import_module(package), "__all__", [])) for package in packages]
    return [f"{package}.{name}" for package, names in sorted(offered) for name in sorted(names)]


def test_public_names():
    """A name that users import disappears only on purpose: TESSERA_UPDATE=1 writes the list anew."""
    names = public_names()
    if os.environ.get("TESSERA_UPDATE") == "1":
        PUBLIC_NAMES.write_text("\n".join(names) + "\n")
    assert names == PUBLIC_NAMES.read_text().split()
    for name in names:
        package, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(package), attribute), name


def pins(name):
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return {entry.name: entry for entry in map(Requirement, filter(lambda text: text and text[0] != "-", lines))}


def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_requirements_are_exact(name):
    for requirement in pins(name).values():
        [specifier] = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, str(requirement)


def test_pins_satisfy_the_package():
    pinned = pins("requirements.txt")
    for text in pyproject()["dependencies"]:
        needed = Requirement(text)
        assert needed.name in pinned, f"{needed.name} is not in requirements.txt"
        [specifier] = pinned[needed.name].specifier
        assert needed.specifier.contains(specifier.version), f"{pinned[needed.name]} does not satisfy {text}"


def test_direct_imports_are_required():
    """Whatever the package imports is pinned, or belongs to an optional extra."""
    extras = {Requirement(text).name for texts in pyproject()["optional-dependencies"].values() for text in texts}
    allowed = {canonicalize_name(name) for name in pins("requirements.txt").keys() | extras}
    distributions = packages_distributions()
    for name, path in FILES.items():
        for imported in imports(ast.walk(ast.parse(path.read_text()))):
            root = imported.split(".")[0]
            if root != "tessera" and root not in sys.stdlib_module_names:
                owners = {canonicalize_name(owner) for owner in distributions.get(root, [root])}
                assert owners & allowed, f"{name} imports {root} ({', '.join(owners)}), which requirements.txt lacks"


def test_data_files_are_installed():
    """What isn't Python lies where the package data are looked for."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["tessera"]
    package = SOURCE / "tessera"
    installed = {path for pattern in patterns for path in package.glob(pattern) if path.is_file()}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert installed == others


def test_version_and_licence():
    assert tessera.__version__ == pyproject()["version"]
    assert "Apache License" in (ROOT / "LICENSE").read_text()
