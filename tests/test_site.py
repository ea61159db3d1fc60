"""The site: generated pages are those of the code, sentences are short, and it builds without a warning."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from changeover.errors import SpecError
from changeover.jobs.ledger.records import SCHEMA
from changeover.spec import load
from changeover.stores.base.pgtypes import EXACT, TO_POSTGRES
from docs import generate, prose

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs/reference"


@pytest.mark.parametrize("name", generate.PAGES)
def test_a_generated_page_is_what_the_code_gives(name: str) -> None:
    written = (REFERENCE / name).read_text(encoding="utf-8")
    assert written == generate.PAGES[name](), "run `python docs/generate.py` and commit what it writes"


@pytest.mark.parametrize("path", prose.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_sentence_is_too_long(path: Path) -> None:
    assert not prose.too_long(path)


LONG = " ".join(["word"] * (prose.MOST_WORDS + 1))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (f"# A\n\nShort one. {LONG}.\n", [3]),
        (f"- item\n- {LONG}\n", [2]),
        (f"Short\none.\n{LONG}.", [3]),
        (f"```{{note}}\n{LONG}\n```\n", [2]),
        (f"> {LONG}\n", [1]),
        (f"```\n{LONG}\n```\n\n| a |\n| --- |\n| {LONG} |\n\n<!-- {LONG} -->\n", []),
        (f"See [there](there.md) and `{LONG}`.\n", []),
        (f"{LONG[:-10]}. {LONG[:-10]}.\n", []),
        (f"{LONG[:-10]}, e.g. this one.\n", [1]),
    ],
)
def test_a_long_sentence_is_named_by_its_line(text: str, lines: list[int]) -> None:
    assert [line for line, sentence in prose.sentences(text) if prose.words(sentence) > prose.MOST_WORDS] == lines


def test_a_command_that_answers_by_its_exit_code_says_what_1_means() -> None:
    """A command answers so where its function ends with a code that it computes."""
    answering = {
        words[-1]
        for words, _, command in generate.commands()
        if re.search(r"sys\.exit\((1 if|0 if|outcome)", inspect.getsource(inspect.unwrap(command.callback or print)))
    }
    assert answering == set(generate.NO)


def test_every_command_has_an_example() -> None:
    for words, _, command in generate.commands():
        assert str(getattr(command, "example", "")).startswith(f"changeover {' '.join(words)}")


def known_keys(tmp_path: Path, document: dict[str, Any]) -> set[str]:
    """Return the keys that the reader says it knows, where it meets one that it does not."""
    path = tmp_path / "spec.toml"
    path.write_text("".join(f"{json.dumps(key)} = {inline(value)}\n" for key, value in document.items()), encoding="utf-8")
    with pytest.raises(SpecError, match="known here: ") as caught:
        load(path)
    return set(caught.value.problem.rpartition("known here: ")[2].split(", "))


def inline(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {inline(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(inline, value))}]" if isinstance(value, list) else json.dumps(value)


SPEC: dict[str, Any] = {
    "name": "follows",
    "source": {"dsn": "env:OLD_DSN"},
    "target": {"store": {"kind": "postgres", "dsn": "env:NEW_DSN"}},
    "table": [{"source": "a", "target": "b", "key": ["id"]}],
    "flag": {"key": "k", "target": "store"},
    "application": {},
    "work": {"path": "work"},
}
LAKE = {"lake": {"kind": "delta", "path": "lake"}}
UNKNOWN = {"zzzzzzzz": "?"}


def test_the_schema_has_the_keys_that_the_reader_knows(tmp_path: Path) -> None:
    schema = json.loads(generate.SCHEMA.read_text(encoding="utf-8"))
    sections = schema["$defs"]
    (row,) = SPEC["table"]
    check = {"name": "n", "source": "s", "target": "t"}
    documents: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (schema, SPEC | UNKNOWN),
        (sections["SourceSection"], SPEC | {"source": SPEC["source"] | UNKNOWN}),
        (sections["PostgresSection"], SPEC | {"target": {"store": SPEC["target"]["store"] | UNKNOWN}}),
        (sections["DeltaSection"], SPEC | {"target": {"lake": LAKE["lake"] | UNKNOWN}}),
        (sections["TableSection"], SPEC | {"table": [row | UNKNOWN]}),
        (sections["TransformSection"], SPEC | {"table": [row | {"transform": UNKNOWN}]}),
        (sections["Check"], SPEC | {"table": [row | {"check": [check | UNKNOWN]}]}),
        (sections["Flag"], SPEC | {"flag": SPEC["flag"] | UNKNOWN}),
        (sections["ApplicationSection"], SPEC | {"application": UNKNOWN}),
        (sections["WorkSection"], SPEC | {"work": SPEC["work"] | UNKNOWN}),
        (sections["LedgerSection"], SPEC | {"target": LAKE, "ledger": {"dsn": "env:NEW_DSN"} | UNKNOWN}),
    ]
    assert len(documents) == len(sections) + 1
    for section, document in documents:
        assert known_keys(tmp_path, document) == set(section["properties"])


def cells(page: str, column: int) -> list[list[str]]:
    """Return the names in a column of a page's tables, a list a row."""
    lines = (line for line in page.splitlines() if line.startswith("| `"))
    return [re.findall(r"`([^`]+)`", line.split(" | ")[column]) for line in lines]


def test_the_ledgers_page_has_its_tables_and_columns() -> None:
    tables = {
        name: set(re.findall(r"(?:^|,)\s*([a-z_0-9]+) (?=[a-z])", re.sub(r"KEY \([^)]*\)", "", body)))
        for name, body in re.findall(r"CREATE TABLE IF NOT EXISTS changeover\.(\w+) \((.*?)\);", SCHEMA, re.S)
    }
    sections = re.split(r"^## (\w+)$", (REFERENCE / "ledger.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    shown = {name: {one for row in cells(text, 0) for one in row} for name, text in zip(sections[::2], sections[1::2], strict=True)}
    assert shown == tables


def test_the_page_of_types_has_all_of_them() -> None:
    page = (REFERENCE / "types.md").read_text(encoding="utf-8")
    carried, computed = page.partition("## Computed columns")[::2]
    assert {cell: f"`{spark}`" for cell, (spark, _) in EXACT.items()}.items() <= pairs(carried).items()
    assert {spark: f"`{kind}`" for spark, kind in TO_POSTGRES.items()}.items() <= pairs(computed).items()


def pairs(text: str) -> dict[str, str]:
    """Return the rows of tables with two columns."""
    return dict(re.findall(r"^\| `([^`]+)` \| (`[^`]+`) \|$", text, re.M))


@pytest.mark.heavy
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "reference/cli.html").read_text(encoding="utf-8")
    assert 'id="changeover-backfill"' in page
    assert "changeover backfill [OPTIONS] SPEC" in page
