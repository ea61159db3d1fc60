"""The README says what is there: commands, options, specs, code, links, error sentences, and the versions of archives."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import click
import pytest

from changeover import errors
from changeover.cli.demo import main as demo
from changeover.cli.main import main
from changeover.flags.router.shadow import Experiment
from changeover.spark import jars
from changeover.spec import load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)


def blocks(language: str) -> list[str]:
    """Return the README's fenced blocks of a language."""
    return [text for found, text in FENCED if found == language]


def commands(group: click.Group = main, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Return every command with its words, those of groups too."""
    for name, command in group.commands.items():
        words = (*above, name)
        if isinstance(command, click.Group):
            yield from commands(command, words)
        else:
            yield words, demo if words == ("demo",) else command


COMMANDS = dict(commands())


def written() -> list[list[str]]:
    """Return every `changeover …` that the README writes, in its text and in its shell blocks, as words."""
    lines = [line for text in blocks("sh") for line in text.splitlines()]
    lines = [re.sub(r"^\S*bin/changeover\b", "changeover", line) for line in lines] + INLINE
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("changeover ")]
    found += [["changeover", "demo", *shlex.split(more)] for more in re.findall(r'make demo ARGS="([^"]*)"', README)]
    return [words[1:] for words in found if words != ["changeover", "flags"]]  # the group, by its name alone


def resolved(words: list[str]) -> tuple[tuple[str, ...], click.Command]:
    """Return the command that words call."""
    known = [tuple(words[:count]) for count in (2, 1) if tuple(words[:count]) in COMMANDS]
    assert known, f"the README calls `changeover {' '.join(words)}`, which is no command"
    return known[0], COMMANDS[known[0]]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_stands_in_the_readme(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    assert command.help, "no help text"
    assert command.help.rstrip().endswith(".")
    assert words in {resolved(called)[0] for called in written()}
    for option in command.params:
        assert not isinstance(option, click.Option) or option.help, f"{option.name} has no help text"


@pytest.mark.parametrize("called", written(), ids=" ".join)
def test_every_command_in_the_readme_is_there_with_its_options(called: list[str]) -> None:
    words, command = resolved(called)
    known = {name for option in command.params for name in option.opts}
    assert {word.partition("=")[0] for word in called[len(words) :] if word.startswith("--")} <= known
    arguments = [one for one in command.params if isinstance(one, click.Argument) and one.required]
    given = [word for word in called[len(words) :] if not word.startswith("--")]
    assert len(called) == len(words) or len(given) >= len(arguments), "a call, not the name alone, lacks arguments"


def test_every_option_named_on_its_own_is_one() -> None:
    known = {name for command in COMMANDS.values() for option in command.params for name in option.opts}
    named = {text.split()[0] for text in INLINE if text.startswith("--")}
    assert named <= known | {"--py-files", "--packages", "--jars"}, "an option of neither ours nor spark-submit's"


def test_its_specs_load_and_the_first_is_the_example(tmp_path: Path) -> None:
    for number, text in enumerate(blocks("toml")):
        path = tmp_path / f"{number}.toml"
        path.write_text(text, encoding="utf-8")
        load(path)
    assert blocks("toml")[0] == (ROOT / "examples/follows.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_examples_load_and_stand_in_the_readme(path: Path) -> None:
    load(path)
    assert f"examples/{path.name}" in README


@pytest.mark.parametrize("text", blocks("python"))
def test_its_code_compiles_and_imports_what_is_there(text: str) -> None:
    compile(text, "README.md", "exec")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "changeover":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


NAMED = sorted({name for text in INLINE for name in re.findall(r"changeover(?:\.\w+)+", text)})


@pytest.mark.parametrize("name", [name for name in NAMED if not name.endswith((".zip", ".whl"))])
def test_a_function_named_in_the_readme_is_there(name: str) -> None:
    parts = name.split(".")
    found: Any = importlib.import_module(".".join(parts[:2]))
    for place, part in enumerate(parts[2:], 3):
        found = getattr(found, part, None) or importlib.import_module(".".join(parts[:place]))
    assert found.__doc__


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_a_link_leads_somewhere(link: str) -> None:
    assert link.startswith("https://") or (ROOT / link).exists()


@pytest.mark.parametrize("script", sorted(set(re.findall(r"\b(?:jobs|verifiers|tests|benchmarks)/[\w/]+\.py\b", README))))
def test_a_script_named_in_the_readme_is_there(script: str) -> None:
    assert (ROOT / script).is_file()


def test_a_test_named_in_the_readme_is_there() -> None:
    for line in README.splitlines():
        for path, name in re.findall(r"\((tests/[\w/]+\.py)\), `(test_\w+)`", line):
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


def test_make_targets_named_in_the_readme_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"\bmake (demo|test|setup|wheel|bench|check|\w+ ARGS)", README)) <= targets
    assert set(re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.M)) <= targets


def test_the_archives_are_those_that_are_fetched() -> None:
    for artifact in jars.NEEDED:
        assert f"`{artifact.coordinates}`" in README


SECTION = README.partition("## Stuck?")[2].partition("\n## ")[0]
SAID = re.findall(r"^\| `([^`]+)`", SECTION, re.M)


def is_leaf(value: Any) -> bool:
    """Return whether a name of the errors' module is an error with fields, so one that is raised as it is."""
    return isinstance(value, type) and issubclass(value, errors.ChangeoverError) and is_dataclass(value)


LEAVES = [
    *(value for _, value in sorted(vars(errors).items()) if is_leaf(value)),
    jars.JarsMissing,
]


def example(cls: type[Any]) -> str:
    """Return the sentence of an error, made of placeholders."""
    values = {"float": 1.0, "tuple[str, ...]": ("a reason",)}
    names = {"path": "SPEC", "where": "KEY"} if cls is errors.SpecError else {}
    return str(cls(*(names.get(field.name, values.get(str(field.type), f"<{field.name}>")) for field in fields(cls))))


def says(text: str, cls: type[Any]) -> bool:
    """Return whether a sentence of the README, with its gaps, is that of an error."""
    return re.match(".*".join(map(re.escape, text.split("…"))), example(cls)) is not None


@pytest.mark.parametrize("cls", LEAVES, ids=lambda cls: cls.__name__)
def test_every_error_sentence_has_its_remedy(cls: type[Any]) -> None:
    assert any(says(text, cls) for text in SAID)


@pytest.mark.parametrize("text", SAID)
def test_every_remedy_is_for_an_error(text: str) -> None:
    assert any(says(text, cls) for cls in LEAVES)


def test_every_exit_code_is_explained() -> None:
    codes = {cls.exit_code for cls in vars(errors).values() if isinstance(cls, type) and hasattr(cls, "exit_code")}
    explained = {int(code) for code in re.findall(r"^\| (\d+) \|", README.partition("## Exit codes")[2], re.M)}
    assert explained == codes | {0}


def test_a_shadow_read_tells_another_order() -> None:
    first, second = {"entity_a": 1}, {"entity_a": 2}
    assert Experiment().compare([first, second], [first, second])
    assert not Experiment().compare([first, second], [second, first])


def test_the_readme_is_the_projects_description() -> None:
    assert 'readme = "README.md"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for block in ("demo output", "benchmark"):
        assert f"<!-- {block} -->" in README
