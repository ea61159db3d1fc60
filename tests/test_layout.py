"""The shape of the code base: docstrings, sorted exports, links that lead to the three folders."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("jobs", "verifiers", "flags")
FOLDERS = (*LINKED, "src/changeover", "tests")


def modules() -> list[Path]:
    """Return every module once: the links under src lead to folders that are listed themselves."""
    linked = {ROOT / "src/changeover" / name for name in LINKED}
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    return sorted(path for path in found if not linked.intersection(path.parents))


def by_kind(name: str) -> tuple[int, str]:
    """Sort constants before classes before the rest, as the linter's fix does."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2, name)


def named(path: Path) -> str:
    """Return a module's path as test id."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", modules(), ids=named)
def test_a_module_says_what_it_is_and_what_it_guarantees(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, "no docstring"
    first, _, rest = docstring.partition("\n\n")
    assert "\n" not in first, "the first line of the docstring stands alone"
    assert path.is_relative_to(ROOT / "tests") or rest.strip(), "no paragraph on what the module guarantees"


@pytest.mark.parametrize("path", modules(), ids=named)
def test_exports_are_sorted(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = ast.literal_eval(node.value)
            assert list(exported) == sorted(exported, key=by_kind)


@pytest.mark.parametrize("name", LINKED)
def test_the_package_is_a_relative_link_to_its_folder(name: str) -> None:
    link = ROOT / "src/changeover" / name
    assert link.is_symlink()
    assert link.readlink() == Path("../..", name)
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "tests/unit").rglob("test_*.py")), ids=named)
def test_a_unit_test_stands_where_its_package_stands(path: Path) -> None:
    package = ROOT / "src/changeover" / path.parent.relative_to(ROOT / "tests/unit")
    assert (package / "__init__.py").is_file()
