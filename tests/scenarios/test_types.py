"""Types: all that is called safe is carried exactly, and a type that is not the planned one never reads as equal.

One migration has a column for each pair of types that `holds` answers for; the judge is binary COPY of both sides, the target's
columns taken back into the source's types.
"""

from __future__ import annotations

import io

import pytest
from psycopg import sql
from rich.console import Console

from changeover.session import Connection
from changeover.stores.base.fits import holds
from changeover.stores.base.pgtypes import source_type
from changeover.verifiers.compare.verdict import MISMATCHED, Verdict
from changeover.verifiers.report import print_terminal, to_html
from changeover.verifiers.verification import verify
from tests.support.fix_migration import STORE, MakeMigration, Migration
from tests.unit.stores.base.test_fits import TYPES
from tests.unit.stores.base.test_pgtypes import VALUES

ALIKE = {
    "character", "character varying", "character varying(40)", "numeric(12,2)", "numeric(14,4)", "interval(3)",
    "time(3) without time zone", "timestamp(6) with time zone", "character varying(40)[]",
}  # fmt: skip
"""Types that go the way of another one here; each column costs Spark's planner time. `test_fits` has them all."""

CARRIED = [name for name in TYPES if name not in ALIKE and source_type(name)]
PAIRS = [(one, other) for one in CARRIED for other in CARRIED if one != other and holds(one, other)]

OWN = {
    "numeric": ["1.5", "-0.01", "1234.25"],
    "character varying": ["", "ab", " c "],
    "character": ["", "ab", "abc"],
    "timestamp with time zone": ["2024-02-29 12:34:56.123456+00", "9999-12-31 23:59:59+00"],
    "timestamp without time zone": ["2024-02-29 12:34:56.123456", "1582-10-10 12:00:00"],
}
"""Values that every type of a kind takes, whatever its modifiers."""

TABLES = """
[[table]]
source = "pairs"
target = "pairs_too"
key = ["id"]
[[table]]
source = "odd"
target = "odd_too"
key = ["id"]
[table.columns]
"re named" = "`of net`"
"""

ODD = """
CREATE TABLE odd (id integer PRIMARY KEY, "a b" uuid, "Upper" character(4), "quo""te" inet, "größer" interval, "of net" cidr,
    word character varying(9))
"""
ODD_ROW = ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "ab", "10.0.0.1/24", "1 day -00:00:01", "10.0.0.0/8", "word"]

COLUMN_TYPES = """
SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
"""


def values_of(type_name: str) -> list[str]:
    """Return values of a type that are carried."""
    element = type_name.removesuffix("[]")
    base = element.split("(")[0] + (element.split(")")[1] if ")" in element else "")
    values = OWN.get(base) or VALUES[base]
    return values if element == type_name else [f'{{NULL,"{value}"}}' for value in values if '"' not in value and "\\" not in value]


def fill(old: Connection, first: int) -> None:
    """Insert every value of every column once, a row of NULLs with them, and the odd table's row."""
    columns = {f"c{place}": values_of(source) for place, (source, _) in enumerate(PAIRS)}
    for number in range(max(map(len, columns.values())) + 1):
        chosen = {name: values[number] for name, values in columns.items() if number < len(values)}
        names = sql.SQL(", ").join(map(sql.Identifier, ["id", *chosen]))
        marks = sql.SQL(", ").join([sql.Placeholder()] * (len(chosen) + 1))
        old.execute(sql.SQL("INSERT INTO pairs ({}) VALUES ({})").format(names, marks), [first + number, *chosen.values()])
    old.execute("INSERT INTO odd VALUES (%s, %s, %s, %s, %s, %s, %s)", [first, *ODD_ROW])


def binary(connection: Connection, columns: list[sql.Composable], table: str) -> bytes:
    """Return what binary COPY gives of some columns, in the key's order."""
    query = sql.SQL("COPY (SELECT {} FROM {} ORDER BY id) TO STDOUT (FORMAT binary)")
    with connection.cursor().copy(query.format(sql.SQL(", ").join(columns), sql.Identifier(table))) as out:
        return b"".join(out)


def verdicts_of(made: Migration) -> dict[str, Verdict]:
    with made.capturing():
        return {verdict.table: verdict for verdict in verify(made.spec, made.spark)}


@pytest.fixture
def carried(make_migration: MakeMigration) -> Migration:
    """Carry every pair, and odd names, by snapshot and by stream."""
    made = make_migration(TABLES, ODD, targets=[STORE])
    for connection, table, side in ((made.old, "pairs", 0), (made.new, "pairs_too", 1)):
        columns = ", ".join(f"c{place} {pair[side]}" for place, pair in enumerate(PAIRS))
        connection.execute(f"CREATE TABLE {table} (id integer PRIMARY KEY, {columns})".encode())
    fill(made.old, 0)
    made.prepare()
    fill(made.old, 1000)
    made.backfill()
    made.catch_up()
    return made


def test_what_is_safe_is_carried_and_a_type_that_changes_is_told(carried: Migration) -> None:
    assert len(PAIRS) > 50
    for place, (source, target) in enumerate(PAIRS):
        name = sql.Identifier(f"c{place}")
        before = binary(carried.old, [name], "pairs")
        assert binary(carried.new, [sql.SQL("{}::{}").format(name, sql.SQL(source))], "pairs_too") == before, (source, target)
    odd = [sql.Identifier(name) for name in ("id", "a b", "Upper", 'quo"te', "größer", "word")]
    assert binary(carried.new, [*odd, sql.Identifier("re named")], "odd_too") == binary(
        carried.old, [*odd, sql.Identifier("of net")], "odd"
    )
    types: dict[str, str] = dict(carried.new.execute(COLUMN_TYPES, ["odd_too"]).fetchall())
    assert types == {
        "id": "integer", "a b": "uuid", "Upper": "character(4)", 'quo"te': "inet", "größer": "interval", "re named": "cidr",
        "word": "character varying(9)",
    }  # fmt: skip
    equal = verdicts_of(carried)
    assert [(verdict.word, verdict.types) for verdict in equal.values()] == [("equal", ())] * 2

    narrowed = f"c{PAIRS.index(('numeric(10,2)', 'numeric(12,4)'))}"
    carried.new.execute(f"ALTER TABLE pairs_too ALTER {narrowed} TYPE numeric(12,1)".encode())
    carried.new.execute('ALTER TABLE odd_too ALTER "a b" TYPE text')
    carried.old.execute("ALTER TABLE odd ALTER word TYPE character varying(20)")
    different = verdicts_of(carried)
    pairs, odd_too = different["pairs"], different["odd"]
    assert [str(one) for one in pairs.types] == [
        f"column {narrowed} of the target has the type numeric(12,1), and numeric(12,4) was planned"
    ]
    assert (pairs.word, pairs.counts["type"], pairs.counts["mismatched"], dict(pairs.columns)) == ("different", 1, 4, {narrowed: 4})
    shown = {((one.source or {})[narrowed], (one.target or {})[narrowed]) for one in pairs.sample if one.kind == MISMATCHED}
    assert shown == {("-0.01", "0.0"), ("1234.25", "1234.3")}
    assert (odd_too.word, odd_too.differing_keys, odd_too.counts["type"]) == ("different", 0, 2)
    assert [(one.side, one.column, one.planned, one.present_type) for one in odd_too.types] == [
        ("source", "word", "character varying(9)", "character varying(20)"), ("target", "a b", "uuid", "text"),
    ]  # fmt: skip

    assert Verdict.from_json(odd_too.to_json()) == odd_too
    assert '"column": "a b"' in odd_too.to_json()
    terminal = io.StringIO()
    print_terminal([odd_too], console=Console(file=terminal, width=200))
    for page in (terminal.getvalue(), to_html([odd_too])):
        assert "uuid" in page
        assert "character varying(20)" in page
