"""Generated columns of the source: nobody notices one that the spec leaves alone, and one that it asks for is named."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from changeover.embedded.server import EmbeddedServer
from changeover.errors import SpecError
from changeover.jobs.preflight.rules import preflight
from changeover.jobs.source.catalog import source_table
from changeover.position import Version, image_version
from changeover.session import connect
from changeover.spec import Spec, load
from changeover.stores.postgres import gate

TABLE = """
CREATE TABLE goods (id integer PRIMARY KEY, name text, price numeric(10,2),
    "Gross" numeric GENERATED ALWAYS AS (price * 1.19) STORED, label text GENERATED ALWAYS AS (upper(name) || ' é') STORED)
"""

VIRTUAL = "ALTER TABLE goods ADD twice integer GENERATED ALWAYS AS (id * 2) VIRTUAL"
WITH_VIRTUAL = 180000

SPEC = """
name = "goods"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "goods"
target = "wares"
{rest}
[work]
path = "work"
"""

MakeSpec = Callable[[str], Spec]


@pytest.fixture
def goods(any_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeSpec:
    monkeypatch.setenv("OLD_DSN", any_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    with connect(any_dsn, "test") as old:
        old.execute(TABLE)
        if old.info.server_version >= WITH_VIRTUAL:
            old.execute(VIRTUAL)

    def make(rest: str) -> Spec:
        path = tmp_path / "spec.toml"
        path.write_text(SPEC.format(rest=rest))
        return load(path)

    return make


LABEL = r"label is a generated column of goods, .* does not carry: write what it is made of in \[table.columns\], .* is label ="
ASKED = [
    ('key = ["id"]\n[table.columns]\ntitle = "label"', "table goods: columns.title", LABEL),
    ('key = ["id"]\n[table.columns]\ntitle = "concat(\'label\', LABEL)"', "table goods: columns.title", LABEL),
    ('key = ["id"]\nwhere = "`Gross` > 10"', "table goods: where", r'Gross is a .* Gross = "\(price \* 1.19\)"'),
    ('key = ["label"]', "table goods: key", LABEL + r".*upper\(name\)"),
    ('key = ["id"]\ndrop = ["label"]', "table goods: drop", "label is a generated column, which is left out by itself"),
]


@pytest.mark.parametrize(("rest", "where", "problem"), ASKED, ids=[where for _, where, _ in ASKED])
def test_a_spec_that_asks_for_one_is_told_what_to_write(goods: MakeSpec, rest: str, where: str, problem: str) -> None:
    with pytest.raises(SpecError, match=problem) as caught:
        preflight(goods(rest))
    assert caught.value.where == where
    assert "\n" not in str(caught.value)


LEFT_ALONE = [
    'key = ["id"]',
    'key = ["id"]\nwhere = "name <> \'label\'"',
    'key = ["id"]\n[table.columns]\nlabel = "concat(upper(name), \' é\')"\n"Gross" = "price * 1.19"',
    'key = ["id"]\n[table.columns]\nother = "label(name)"\nmore = "labels"\nlast = "name.label"\nquoted = \'"label"\'',
]


@pytest.mark.parametrize("rest", LEFT_ALONE[:3], ids=["unnamed", "in a text", "computed"])
def test_one_that_is_left_alone_is_no_reason(goods: MakeSpec, rest: str) -> None:
    assert preflight(goods(rest)).reasons == []


def test_names_that_only_look_like_one_are_not_meant(goods: MakeSpec) -> None:
    with pytest.raises(SpecError, match="there is no column labels in goods: its columns are id, name, price"):
        preflight(goods(LEFT_ALONE[3]))


def test_a_virtual_one_is_seen_where_there_are_such(goods: MakeSpec, any_server: EmbeddedServer) -> None:
    spec = goods('key = ["id"]\n[table.columns]\nmore = "twice + 1"')
    with connect(spec.source.dsn.resolve(), "test") as old:
        seen = source_table(old, spec.tables[0])
        assert seen is not None
        assert [column.name for column in seen.columns] == ["id", "name", "price"]
        virtual = old.info.server_version >= WITH_VIRTUAL
        assert set(seen.generated) == {"Gross", "label"} | ({"twice"} if virtual else set())
    if virtual:
        with pytest.raises(SpecError, match=r'twice is a generated column .* is twice = "\(id \* 2\)"'):
            preflight(spec)


def test_a_store_that_has_some_takes_mirrored_rows(goods: MakeSpec) -> None:
    spec = goods('key = ["id"]')
    with connect(spec.source.dsn.resolve(), "test") as old:
        gate.install_gate(old, "public", "goods", ["id"], image_version(0))
        nothing = ", NULL" if old.info.server_version >= WITH_VIRTUAL else ""
        for ordinal, name in enumerate(("tea", "coffee")):
            version = Version(1, 100, ordinal)
            taken = old.execute(
                f'SELECT changeover."gate_public.goods"(%s, %s, %s, false, ROW(1, %s, 2, NULL, NULL{nothing})::goods)'.encode(),
                [version.epoch, "0/64", version.ordinal, name],
            ).fetchone()
            assert taken == (True,)
        assert old.execute('SELECT name, label, "Gross" FROM goods').fetchone() == ("coffee", "COFFEE é", Decimal("2.3800"))
