"""The documents say what is there: commands, options, specs, code, links, error sentences, and the versions of archives."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import pytest

from changeover import errors
from changeover.flags.shadow.experiment import Experiment
from changeover.jobs.ledger.records import LEDGER_TABLES
from changeover.spark import jars
from changeover.spec import load
from changeover.stores.postgres.gate import OURS
from changeover.stores.postgres.refusal import TENANT_SETTING
from docs import generate

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", re.M | re.S)
SHELLS = ("sh", "bash", "console")


@dataclass(frozen=True)
class Page:
    """A document: its path below the repository, and its text."""

    path: str
    text: str

    def __str__(self) -> str:
        return self.path

    @cached_property
    def fenced(self) -> list[tuple[str, str]]:
        """Its blocks of code: language, text."""
        return [(language.strip(), textwrap.dedent(text)) for _, _, language, text in FENCE.findall(self.text)]

    @cached_property
    def prose(self) -> str:
        """Its text without blocks of code; a note is no code."""
        return FENCE.sub(lambda block: block[4] if block[3].startswith("{") else "", self.text)

    @cached_property
    def inline(self) -> list[str]:
        """Its pieces of code in a line of text."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    def blocks(self, *languages: str) -> list[str]:
        """Return its blocks of some languages."""
        return [text for language, text in self.fenced if language in languages]

    @cached_property
    def shell(self) -> list[str]:
        """The lines of its shell blocks, without prompts; a line that goes on is one."""
        whole = "".join(self.blocks(*SHELLS)).replace("\\\n", " ")
        return [line.removeprefix("$ ").strip() for line in whole.splitlines()]


def pages() -> Iterator[Page]:
    """Return every document for users and contributors, those of the site without what is built."""
    patterns = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/**/*.md", "docs/**/*.md")
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern) if "_build" not in path.parts)
    for path in paths:
        yield Page(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))


PAGES = list(pages())
WRITTEN = [page for page in PAGES if page.path not in {f"docs/reference/{name}" for name in generate.PAGES}]
"""The pages that are written by hand: what must be said somewhere is said there."""

COMMANDS = {words: command for words, _, command in generate.commands()}


def called(page: Page) -> list[list[str]]:
    """Return every `changeover …` that a page writes, in its text and in its shell blocks, as words."""
    lines = [re.sub(r"^\S*bin/changeover\b", "changeover", line) for line in page.shell] + page.inline
    found = [shlex.split(re.split(r" [|>&;]", line)[0], comments=True) for line in lines if line.startswith("changeover ")]
    found += [["changeover", "demo", *shlex.split(more)] for more in re.findall(r'make demo ARGS="([^"]*)"', page.text)]
    names = [words[1:] for words in found]
    return [words for words in names if words != ["flags"] and words[-1:] not in (["-h"], ["--help"], ["--version"])]


def resolved(words: list[str]) -> tuple[tuple[str, ...], click.Command]:
    """Return the command that words call."""
    known = [tuple(words[:count]) for count in (2, 1) if tuple(words[:count]) in COMMANDS]
    assert known, f"`changeover {' '.join(words)}` is no command"
    return known[0], COMMANDS[known[0]]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_stands_in_a_page(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    assert command.help, "no help text"
    assert command.help.rstrip().endswith(".")
    assert any(tuple(call[: len(words)]) == words for page in WRITTEN for call in called(page))
    for option in command.params:
        assert not isinstance(option, click.Option) or option.help, f"{option.name} has no help text"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_in_a_page_is_there_with_its_options(page: Page) -> None:
    for call in called(page):
        words, command = resolved(call)
        known = {name for option in command.params for name in option.opts}
        assert {word.partition("=")[0] for word in call[len(words) :] if word.startswith("--")} <= known, call
        arguments = [one for one in command.params if isinstance(one, click.Argument) and one.required]
        given = [word for word in call[len(words) :] if not word.startswith("--")]
        assert len(call) == len(words) or len(given) >= len(arguments), f"a call, not the name alone, lacks arguments: {call}"


def other_options() -> set[str]:
    """Return the options of spark-submit that pages name, and those of the tests and benchmarks."""
    scripts = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    added = re.compile(r'\b(?:addoption|add_argument)\(\s*"(--[\w-]+)"')
    ours = {option for path in scripts for option in added.findall(path.read_text(encoding="utf-8"))}
    return ours | {"--py-files", "--packages", "--jars"}


def test_every_option_named_on_its_own_is_one() -> None:
    known = {name for command in COMMANDS.values() for option in command.params for name in option.opts} | other_options()
    named = {(page.path, text.split()[0].partition("=")[0]) for page in PAGES for text in page.inline if text.startswith("--")}
    assert [one for one in sorted(named) if one[1] not in known] == []


# -- specs and code

SPECS = [(page, text) for page in PAGES for text in page.blocks("toml")]
EXAMPLES = sorted((ROOT / "examples").rglob("*.toml"))


def over(whole: Any, part: Any) -> Any:
    """Return a document with a part of it laid over, of a list over its first item."""
    if isinstance(whole, dict) and isinstance(part, dict):
        return {**whole, **{key: over(whole.get(key), value) for key, value in part.items()}}
    if isinstance(whole, list) and isinstance(part, list) and part and isinstance(part[0], dict):
        return [over(whole[0], part[0]), *part[1:]]
    return part


def as_toml(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(as_toml, value))}]" if isinstance(value, list) else json.dumps(value)


@pytest.mark.parametrize(("page", "text"), SPECS, ids=lambda value: str(value).partition("\n")[0])
def test_a_spec_loads_and_a_part_of_one_does_within_an_example(page: Page, text: str, tmp_path: Path) -> None:
    path = tmp_path / "spec.toml"
    document = tomllib.loads(text)
    if "name" not in document:
        document = over(tomllib.loads(EXAMPLES[0].read_text(encoding="utf-8")), document)
        text = "\n".join(f"{json.dumps(key)} = {as_toml(value)}" for key, value in document.items())
    path.write_text(text, encoding="utf-8")
    load(path)


def test_an_example_stands_in_a_page_word_for_word() -> None:
    assert {path.read_text(encoding="utf-8") for path in EXAMPLES} & {text for _, text in SPECS}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_load_and_a_page_leads_to_each(path: Path) -> None:
    load(path)
    places = {path} if path.parent == ROOT / "examples" else {path, path.parent, path.parent / "README.md"}
    assert places & {target for page in WRITTEN for target, _ in linked(page)}


@pytest.mark.parametrize(
    ("page", "text"),
    [(page, text) for page in PAGES for text in page.blocks("python")],
    ids=lambda value: str(value).partition("\n")[0],
)
def test_its_code_compiles_and_imports_what_is_there(page: Page, text: str) -> None:
    compile(text, page.path, "exec")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "changeover":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


NAMED = {
    name
    for page in PAGES
    for text in page.inline
    for name in re.findall(r"\bchangeover(?:\.\w+)+", text)
    if not name.endswith((".zip", ".whl", ".toml")) and "NAME" not in name
}


IN_A_DATABASE = {OURS, TENANT_SETTING, *(f"changeover.{table}" for table in LEDGER_TABLES)}


@pytest.mark.parametrize("name", sorted(NAMED - IN_A_DATABASE))
def test_a_function_named_in_a_page_is_there(name: str) -> None:
    parts = name.split(".")
    found: Any = importlib.import_module(".".join(parts[:2]))
    for place, part in enumerate(parts[2:], 3):
        found = getattr(found, part, None) or importlib.import_module(".".join(parts[:place]))
    assert found.__doc__


# -- links, scripts, tests and targets


def linked(page: Page) -> Iterator[tuple[Path, str]]:
    """Return each link of a page into the repository: the file, and the place in it, empty where the whole is meant."""
    written = re.findall(r"\]\(([^)\s]+)\)", page.prose) + re.findall(r"^\[[^\]]+\]: (\S+)$", page.prose, re.M)
    for link in written:
        if not link.startswith("https://"):
            path, _, place = link.partition("#")
            yield (ROOT / page.path).parent.joinpath(path).resolve() if path else ROOT / page.path, place


def anchors(path: Path) -> set[str]:
    """Return the places of a page to which a link may lead: its headings, by GitHub's rule."""
    prose = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).lower() for text in re.findall(r"^#+ (.+)$", prose, re.M)]
    return {re.sub(r"[^\w\- ]", "", text).strip().replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_link_leads_somewhere(page: Page) -> None:
    for path, place in linked(page):
        assert path.exists(), path
        assert not place or place in anchors(path), f"{path.name}#{place}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_file_named_in_a_page_is_there(page: Page) -> None:
    scripts = set(re.findall(r"\b(?:jobs|flags|verifiers|tests|benchmarks|src|docs)/[\w/]+\.py\b", page.text))
    whole = {text for text in page.inline if re.fullmatch(r"(?:jobs|flags|verifiers|tests|src|benchmarks)/[\w./-]+", text)}
    assert [name for name in sorted(scripts | whole) if not any((ROOT / f"{name}{end}").exists() for end in ("", ".py"))] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_test_named_in_a_page_is_there(page: Page) -> None:
    for path, name in re.findall(r"\((?:\.\./)*(tests/[\w/]+\.py)\), `(test_\w+)`", page.text):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_make_targets_named_in_a_page_are_there(page: Page) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = [line.split()[1] for line in [*page.shell, *page.inline] if re.match(r"make [a-z]", line)]
    assert set(named) <= targets


def test_the_archives_are_those_that_are_fetched() -> None:
    for artifact in jars.NEEDED:
        assert any(f"`{artifact.coordinates}`" in page.text for page in WRITTEN)


# -- errors


@pytest.mark.parametrize("error", generate.leaves(), ids=lambda error: error.__name__)
def test_every_error_sentence_has_its_remedy(error: type[Any]) -> None:
    assert generate.remedy(error)


def test_every_remedy_is_for_an_error() -> None:
    said = [(page.path, sentence) for page in WRITTEN for sentence in generate.advice(page.text)]
    assert [one for one in said if not any(generate.says(one[1], error) for error in generate.leaves())] == []


def test_every_exit_code_is_explained_alike() -> None:
    codes = {cls.exit_code for cls in vars(errors).values() if isinstance(cls, type) and hasattr(cls, "exit_code")}
    sections = [re.split(r"^#+ Exit codes$", page.text, maxsplit=1, flags=re.M)[1:] for page in PAGES]
    tables = [set(re.findall(r"^\| (\d+) \|", re.split(r"^#", text, flags=re.M)[0], re.M)) for (text,) in filter(None, sections)]
    assert tables
    assert all(table == {str(code) for code in codes | {0}} for table in tables)


def test_a_shadow_read_tells_another_order() -> None:
    first, second = {"entity_a": 1}, {"entity_a": 2}
    assert Experiment().compare([first, second], [first, second])
    assert not Experiment().compare([first, second], [second, first])


def test_the_readme_is_the_projects_description_and_what_was_measured_is_shown() -> None:
    assert 'readme = "README.md"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for block in ("demo output", "benchmark"):
        assert any(f"<!-- {block} -->" in page.text for page in PAGES)
