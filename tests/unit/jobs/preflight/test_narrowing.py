"""A column that is carried into a narrower one is refused before anything is made, and a stated loss is the user's word."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltalake import DeltaTable
from deltalake.schema import Schema

from changeover.jobs.preflight.rules import preflight
from changeover.session import connect
from changeover.spec import Spec, load

SPEC = """
name = "narrow"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[target.lake]
kind = "delta"
path = "{folder}/lake"
[[table]]
source = "wide"
target = "narrow"
key = ["id"]
{rest}
[work]
path = "{folder}/work"
"""

WIDE = """
CREATE TABLE wide (id integer PRIMARY KEY, a numeric(12,4), b float8, d timestamp, "an odd one" text, moved text, e char(4), f uuid)
"""
NARROW = """
CREATE TABLE narrow (id bigint PRIMARY KEY, a numeric(10,2), b real, d date, "an odd one" varchar(3), other varchar(9), e text,
    f uuid)
"""


def spec_of(folder: Path, rest: str) -> Spec:
    path = folder / "spec.toml"
    path.write_text(SPEC.format(folder=folder, rest=rest))
    return load(path)


@pytest.fixture
def folder(old_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make both tables, and a lake's whose `a` is narrower too."""
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    for dsn, statement in ((old_dsn, WIDE), (new_dsn, NARROW)):
        with connect(dsn, "test") as connection:
            connection.execute(statement.encode())
    version = '{"type": "struct", "fields": []}'
    fields = [
        ("id", '"integer"'), ("a", '"decimal(10,2)"'), ("b", '"double"'), ("d", '"timestamp_ntz"'), ("an odd one", '"string"'),
        ("other", '"string"'), ("e", '"string"'), ("f", '"string"'), ("_version", version.replace("[]", LSN)),
        ("_deleted", '"boolean"'),
    ]  # fmt: skip
    listed = ", ".join(f'{{"name": "{name}", "type": {kind}, "nullable": true, "metadata": {{}}}}' for name, kind in fields)
    DeltaTable.create(str(tmp_path / "lake/narrow"), Schema.from_json(f'{{"type": "struct", "fields": [{listed}]}}'))
    return tmp_path


LSN = '[{"name": "lsn", "type": "long", "nullable": true, "metadata": {}}]'
OTHER = '[table.columns]\nother = "moved"\n'


def test_every_column_that_loses_is_named_with_the_way_out(folder: Path) -> None:
    told = [reason for reason in preflight(spec_of(folder, OTHER)).reasons if "does not hold" in reason]
    assert told[0] == (
        "target store: narrow.other has the type character varying(9), which does not hold every value of wide.moved (text): widen"
        ' it, or state the loss in [table.columns] by an expression of its own, such as other = "substring(moved, 1, 9)"'
    )
    assert [reason.split(" has the type ")[0] for reason in told] == [
        *(f"target store: narrow.{name}" for name in ("other", "a", "b", "d", "an odd one", "e")), "target lake: narrow.a",
    ]  # fmt: skip
    assert told[1].endswith('a = "cast(a as decimal(10,2))"')
    assert told[4].endswith('"an odd one" = "substring(`an odd one`, 1, 3)"')
    assert told[5].endswith('e = "rtrim(e)"')


def test_a_stated_loss_is_the_users_word(folder: Path) -> None:
    stated = OTHER.replace('"moved"', '"substring(moved, 1, 9)"') + (
        'a = "cast(a as decimal(10,2))"\nb = "cast(b as float)"\nd = "cast(d as date)"\ne = "rtrim(e)"\n'
        '"an odd one" = "substring(`an odd one`, 1, 3)"\n'
    )
    assert [reason for reason in preflight(spec_of(folder, stated)).reasons if "does not hold" in reason] == []
