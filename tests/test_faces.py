"""What one package takes from another says what goes in, what comes out, and which error of ours it raises.

A package is a folder. Its face is every public function that a module of another folder imports, by itself or with its
module, and every public method of a public class that is imported so.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.docstrings import sections

ROOT = Path(__file__).parents[1]
FOLDERS = ("jobs", "flags", "verifiers", "src/changeover")
NOTHING = {"None", "NoReturn", "Never", "Iterator[None]"}
PROPERTIES = {"property", "cached_property", "setter"}


def sources() -> dict[str, str]:
    """Return every module's text by its path below the repository; the links under `src` are not followed."""
    found = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    own = (path for path in found if not any(above.is_symlink() for above in path.parents))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sorted(own)}


def module_of(path: str) -> str:
    name = path.removeprefix("src/changeover/").removesuffix(".py").replace("/", ".")
    return f"changeover.{name}".removesuffix(".__init__")


def taken(trees: Mapping[str, ast.Module]) -> set[str]:
    """Return the dotted names that a module takes from another folder, those that an `__init__` passes on included."""
    takers: dict[str, set[str]] = {}  # of each dotted name the folders that take it
    passed: dict[str, str] = {}
    for path, tree in trees.items():
        imported: dict[str, set[str]] = {}  # a function's own import may give a name another meaning
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    imported.setdefault(alias.asname or alias.name, set()).add(whole)
                    passed[f"{module_of(path)}.{alias.asname or alias.name}"] = whole
        names = set().union(*imported.values())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names |= {f"{whole}.{node.attr}" for whole in imported.get(node.value.id, ())}
        for name in names:
            takers.setdefault(name, set()).add(path.rpartition("/")[0])
    for name in list(takers):
        end = name
        while end in passed:
            end = passed[end]
        takers.setdefault(end, set()).update(takers[name])
    homes = {module_of(path): path.rpartition("/")[0] for path in trees}
    return {name for name, folders in takers.items() if folders - {homes.get(name.rpartition(".")[0])}}


def functions(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | None, ast.FunctionDef]]:
    """Return a module's public functions, and the public methods of its public classes with their class."""
    for node in tree.body:
        holder = node if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else None
        for one in holder.body if holder else [node]:
            if isinstance(one, ast.FunctionDef) and not one.name.startswith("_"):
                yield holder, one


def parameters(function: ast.FunctionDef) -> list[str]:
    """Return the names of what a function is given, in the order of its signature."""
    given = function.args
    several, named = ([f"{'*' * stars}{one.arg}"] if one else [] for stars, one in ((1, given.vararg), (2, given.kwarg)))
    positional = [one.arg for one in (*given.posonlyargs, *given.args)]
    return [name for name in (*positional, *several, *(one.arg for one in given.kwonlyargs), *named) if name not in ("self", "cls")]


def lacks(function: ast.FunctionDef, errors: Collection[str]) -> list[str]:
    """Return the sections that a docstring lacks; Args lacks where its names are not the parameters, in their order."""
    said = sections(ast.get_docstring(function))
    raises = (node.exc for node in ast.walk(function) if isinstance(node, ast.Raise))
    raised = [error.func if isinstance(error, ast.Call) else error for error in raises]
    checks = {
        "Args": said.get("Args", []) == parameters(function),
        "Returns": (function.returns is None or ast.unparse(function.returns) in NOTHING) or bool({"Returns", "Yields"} & {*said}),
        "Raises": "Raises" in said or not any(isinstance(error, ast.Name) and error.id in errors for error in raised),
    }
    return [section for section, there in checks.items() if not there]


def lacking(texts: Mapping[str, str], errors: Collection[str]) -> list[str]:
    """Return what the faces lack, each as a line for a person."""
    trees = {path: ast.parse(text) for path, text in texts.items()}
    names = taken(trees)
    public = [(module_of(path), holder, one) for path, tree in trees.items() for holder, one in functions(tree)]
    documented = {
        (one.name, *parameters(one))
        for _, holder, one in public
        if holder and any(ast.unparse(base).startswith("Protocol") for base in holder.bases) and not lacks(one, errors)
    }
    lines = []
    for module, holder, one in public:
        exempt = holder and (
            {ast.unparse(mark).rpartition(".")[2] for mark in one.decorator_list} & PROPERTIES
            or (one.name, *parameters(one)) in documented
        )
        if f"{module}.{holder.name if holder else one.name}" in names and not exempt and (missing := lacks(one, errors)):
            lines.append(f"{module}:{f'{holder.name}.' if holder else ''}{one.name} lacks {', '.join(missing)}")
    return lines


def test_every_function_of_a_face_has_its_sections() -> None:
    """Args where it has parameters, Returns or Yields where it gives anything, Raises where it raises an error of ours itself.

    Properties and dunder methods are exempt. So is a method of which a Protocol documents one of the same name and parameters.
    """
    texts = sources()
    ours = {node.name for node in ast.parse(texts["src/changeover/errors.py"]).body if isinstance(node, ast.ClassDef)}
    assert "\n".join(lacking(texts, ours)) == ""


HEAD = '''
class Port(Protocol):
    def through(self, row: int) -> int:
        """Let a row through.

        Args:
            row: The row.

        Returns:
            The same.
        """

class Door:
    """A class."""

    @property
    def width(self) -> int: ...
    def __len__(self) -> int: ...
    def _inside(self, row: int) -> int: ...
    def through(self, row: int) -> int: ...
'''
OPENED = '''
def opened(key: int, *keys: int) -> int:
    """Open.

    Args:
        key: The key.
        *keys: More of them.

    Returns:
        A count.

    Raises:
        Refused: The key is none.
    """
    raise Refused("no")
'''


@pytest.mark.parametrize(
    ("whole", "part", "found"),
    [
        ("", "", None),
        ("\n    Args:\n        key: The key.\n        *keys: More of them.\n", "", "opened lacks Args"),
        ("        *keys: More of them.\n", "", "opened lacks Args"),
        ("\n    Returns:\n        A count.\n", "", "opened lacks Returns"),
        ("\n    Raises:\n        Refused: The key is none.\n", "", "opened lacks Raises"),
        ('"""Open.', '"""Open."""\n    """', "opened lacks Args, Returns, Raises"),
    ],
)
@pytest.mark.parametrize("taker", ["from changeover.jobs.a import Door, opened", "from changeover.jobs import a\na.opened\na.Door"])
def test_the_check_sees_what_is_lacking(whole: str, part: str, found: str | None, taker: str) -> None:
    texts = {"jobs/a.py": HEAD + OPENED.replace(whole, part, 1), "flags/b.py": taker}
    assert lacking(texts, {"Refused"}) == ([f"changeover.jobs.a:{found}"] if found else [])


def test_a_method_counts_where_its_class_is_taken_and_what_nobody_takes_does_not() -> None:
    door = "class Door:\n    def through(self, row: int) -> int: ...\n\ndef shut(door: int) -> None: ...\n"
    texts = {
        "jobs/a.py": door,
        "jobs/b.py": "from changeover.jobs.a import shut",
        "flags/c.py": "from changeover.jobs.a import Door",
    }
    assert lacking(texts, ()) == ["changeover.jobs.a:Door.through lacks Args, Returns"]
    passed_on = {"jobs/d/__init__.py": "from changeover.jobs.a import shut", "flags/e.py": "from changeover.jobs.d import shut"}
    assert lacking({**texts, **passed_on}, ())[1:] == ["changeover.jobs.a:shut lacks Args"]
