"""No `assert` guards what the product does: `python -O` takes them out, and the guard with them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("jobs", "flags", "verifiers", "src/changeover")


def asserts(text: str) -> list[int]:
    """Return the lines of a module's assert statements."""
    return [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_assert_guards_the_product(folder: str) -> None:
    modules = sorted((ROOT / folder).rglob("*.py"))
    assert modules
    lines = {str(path.relative_to(ROOT)): asserts(path.read_text(encoding="utf-8")) for path in modules}
    assert {name: at for name, at in lines.items() if at} == {}


def test_the_scan_sees_an_assert() -> None:
    assert asserts("def f(x):\n    if x:\n        assert x\n") == [3]
