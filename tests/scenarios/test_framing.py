"""Values that comparisons take for each other, end to end: every pair is migrated, damaged in the target, and named by verify.

One small table holds them all. Its rows are changed to the other half of their pair behind both targets' backs, by SQL in
PostgreSQL and by delta-rs in the lake, and one run of verify has to give class, key and columns of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Context, Decimal
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from psycopg import sql

from changeover.errors import RowRefused
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration

TYPES = {
    "s": "text", "s2": "text", "n": "numeric", "m": "numeric(38,4)", "d": "double precision", "f": "real",
    "t": "time without time zone", "c": "character(4)", "j": "json", "b": "jsonb", "u": "uuid", "texts": "text[]",
    "doubles": "double precision[]", "numbers": "numeric[]", "raw": "bytea", "day": "date", "at": "timestamp with time zone",
    "local": "timestamp without time zone", "yes": "boolean",
}  # fmt: skip

FORTY = "1234567890123456789012345678901234567890"
LONG, WIDE = Decimal("1234567890123456789012345678901234.5678"), Context(prec=38)
NOON = datetime(2024, 3, 1, 12, 0, 0, 1, tzinfo=UTC)
MISMATCHED, NOTATION, NOTHING = "mismatched", "canonicalisation", "nothing"
JSON = '{"a":1,"b":[1.50,null]}'


@dataclass(frozen=True)
class Pair:
    """Two halves of a pair, what tells them apart in the lake, and in PostgreSQL if its type leaves less than a text does."""

    source: Mapping[str, Any]
    target: Mapping[str, Any]
    lake: str = MISMATCHED
    store: str = field(default="")

    def expected(self, target: str) -> str:
        return self.lake if target == LAKE else self.store or self.lake


PAIRS = {
    "NULL / ''": Pair({"s": None}, {"s": ""}),
    "NULL / 'NULL'": Pair({"s": None}, {"s": "NULL"}),
    "'' / 'NULL'": Pair({"s": ""}, {"s": "NULL"}),
    "ab,c / a,bc": Pair({"s": "ab", "s2": "c"}, {"s": "a", "s2": "bc"}),
    "the comma": Pair({"s": "a,b", "s2": "c"}, {"s": "a", "s2": "b,c"}),
    "NULL moves over": Pair({"s": "a", "s2": None}, {"s": None, "s2": "a"}),
    "1.50 / 1.5": Pair({"n": "1.50"}, {"n": "1.5"}, NOTATION),
    "1.50 / 1.51": Pair({"n": "1.50"}, {"n": "1.51"}),
    "last of 40 digits": Pair({"n": FORTY}, {"n": FORTY[:-1] + "1"}),
    "last of 38 digits": Pair({"m": LONG}, {"m": LONG.next_plus(WIDE)}),
    "-0.0 / 0.0": Pair({"d": -0.0}, {"d": 0.0}, NOTATION),
    "-0.0 / 0.0 of a real": Pair({"f": -0.0}, {"f": 0.0}, NOTATION),
    "0.0 / NULL": Pair({"d": 0.0}, {"d": None}),
    "NaN / NULL": Pair({"d": math.nan}, {"d": None}),
    "NaN / infinity": Pair({"d": math.nan}, {"d": math.inf}),
    "infinity / -infinity": Pair({"f": math.inf}, {"f": -math.inf}),
    "last bit of a double": Pair({"d": 0.1}, {"d": 0.1 + 2**-56}),
    "NaN of a numeric": Pair({"n": "NaN"}, {"n": "Infinity"}),
    "24:00:00": Pair({"t": "24:00:00"}, {"t": "00:00:00"}),
    "BC / AD in a text": Pair({"s": "0044-03-15 BC"}, {"s": "0044-03-15"}),
    "year 1": Pair({"day": date(1, 1, 1)}, {"day": date(1, 1, 2)}),
    "a microsecond": Pair({"at": NOON}, {"at": NOON.replace(microsecond=2)}),
    "a microsecond of local time": Pair({"local": NOON.replace(tzinfo=None)}, {"local": NOON.replace(tzinfo=None, microsecond=2)}),
    "an hour": Pair({"at": NOON}, {"at": NOON.replace(hour=13)}),
    "char(n) pad": Pair({"c": "ab"}, {"c": "ab"}, NOTATION, NOTHING),
    "pad of a text": Pair({"s": "ab"}, {"s": "ab  "}),
    "key order of json": Pair({"j": JSON}, {"j": '{"b": [1.5, null], "a": 1}'}, NOTATION),
    "key order of jsonb": Pair({"b": JSON}, {"b": '{"b":[1.50,null],"a":1}'}, NOTATION, NOTHING),
    "order of a json list": Pair({"j": "[1,2]"}, {"j": "[2,1]"}),
    "json null / no key": Pair({"b": '{"a": null}'}, {"b": "{}"}),
    "case of a uuid": Pair({"u": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"}, {"u": "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"},
                           NOTATION, NOTHING),
    "[NULL] / []": Pair({"texts": [None]}, {"texts": []}),
    "[NULL] / ['NULL']": Pair({"texts": [None]}, {"texts": ["NULL"]}),
    "[] / NULL": Pair({"texts": []}, {"texts": None}),
    "['a','b'] / ['a,b']": Pair({"texts": ["a", "b"]}, {"texts": ["a,b"]}),
    "['a',NULL] / [NULL,'a']": Pair({"texts": ["a", None]}, {"texts": [None, "a"]}),
    "NaN in an array": Pair({"doubles": [math.nan, None]}, {"doubles": [None, math.nan]}),
    "zeros in an array": Pair({"doubles": [-0.0, 1.0]}, {"doubles": [0.0, 1.0]}, NOTATION),
    "scale in an array": Pair({"numbers": ["1.50", None]}, {"numbers": ["1.5", None]}, NOTATION),
    "'' / a line end": Pair({"s": ""}, {"s": "\n"}),
    "line ends": Pair({"s": "one\ntwo"}, {"s": "one\r\ntwo"}),
    "bytea": Pair({"raw": b"\x00\xff"}, {"raw": b"\x00\xfe"}),
    "bytea '' / NULL": Pair({"raw": b""}, {"raw": None}),
    "NFC / NFD": Pair({"s": "caf\u00e9"}, {"s": "cafe\u0301"}),
    "beyond the BMP": Pair({"s": "\U0001f600"}, {"s": "\U0001f601"}),
    "false / NULL": Pair({"yes": False}, {"yes": None}),
    "a real one beside notation": Pair({"n": "1.50", "s": "a"}, {"n": "1.5", "s": "b"}),
}  # fmt: skip

FRAMED_KEY = ("ab", "c"), ("a", "bc")
"""A key and what a comparison without framing takes for it."""

REAL_COLUMNS = {"a real one beside notation": ["s"]}
PADDED_IN_LAKE = {"char(n) pad": {"c": "ab"}}
"""What the lake is damaged with where a half is a text that PostgreSQL would not keep: there it is padded to `ab  `."""

TABLE = '[[table]]\nsource = "framed"\ntarget = "framed_too"\nkey = ["k", "part"]\n'


def of(name: str, half: str) -> dict[str, Any]:
    """Return a whole row but for its key."""
    return {column: getattr(PAIRS[name], half).get(column) for column in TYPES}


@pytest.fixture
def framed(make_migration: MakeMigration) -> Migration:
    """Migrate every pair's first half, half of the rows by the snapshot and half by the stream."""
    columns = ", ".join(f"{name} {kind}" for name, kind in TYPES.items())
    made = make_migration(TABLE, f"CREATE TABLE framed (k text, part text, {columns}, PRIMARY KEY (k, part))")
    rows = {(name, ""): of(name, "source") for name in PAIRS} | {FRAMED_KEY[0]: dict.fromkeys(TYPES)}
    casts = sql.SQL(", ").join(sql.SQL("%s::{}").format(sql.SQL(kind)) for kind in TYPES.values())
    insert = sql.SQL("INSERT INTO framed VALUES (%s, %s, {})").format(casts)
    for place, (key, row) in enumerate(rows.items()):
        if place == len(rows) // 2:
            made.prepare()
        made.old.execute(insert, [*key, *row.values()])
    made.backfill()
    made.catch_up()
    return made


def damage_store(made: Migration) -> None:
    for name in PAIRS:
        row = of(name, "target")
        sets = sql.SQL(", ").join(sql.SQL("{} = %s::{}").format(sql.Identifier(c), sql.SQL(TYPES[c])) for c in row)
        done = made.new.execute(sql.SQL("UPDATE framed_too SET {} WHERE k = %s").format(sets), [*row.values(), name])
        assert done.rowcount == 1
    made.new.execute("UPDATE framed_too SET (k, part) = (%s, %s) WHERE (k, part) = (%s, %s)", [*FRAMED_KEY[1], *FRAMED_KEY[0]])


def damage_lake(made: Migration) -> None:
    table = DeltaTable(str(made.spec.targets[LAKE].folder / "framed_too"))
    rows = table.to_pyarrow_table()
    damaged = []
    for row in rows.to_pylist():
        if row["k"] in PAIRS:
            row |= of(row["k"], "target") | PADDED_IN_LAKE.get(row["k"], {})
        elif (row["k"], row["part"]) == FRAMED_KEY[0]:
            row["k"], row["part"] = FRAMED_KEY[1]
        damaged.append(row)
    write_deltalake(table, pa.Table.from_pylist(damaged, schema=rows.schema), mode="overwrite")


def test_every_pair_is_told_apart_in_both_targets(framed: Migration) -> None:
    before = framed.verify()
    assert {target: verdict.word for target, verdict in before.items()} == {STORE: "equal", LAKE: "equal"}
    assert {v.equal_rows for v in before.values()} == {len(PAIRS) + 1}
    assert not any(count for verdict in before.values() for count in verdict.counts.values()), "not even notation differs"
    damage_store(framed)
    damage_lake(framed)
    for target, verdict in framed.verify().items():
        assert verdict.word == "different"
        found = {(row["key"]["k"], row["key"]["part"]): row for row in framed.differences(verdict)}
        expected = {name: pair.expected(target) for name, pair in PAIRS.items()}
        classes = {name: found.pop((name, ""), {"class": NOTHING})["class"] for name in PAIRS}
        assert classes == expected
        assert {key: row["class"] for key, row in found.items()} == {FRAMED_KEY[0]: "missing", FRAMED_KEY[1]: "extra"}
        columns = {row["key"]["k"]: sorted(row["columns"]) for row in framed.differences(verdict) if row["columns"]}
        assert columns == {
            name: sorted(REAL_COLUMNS.get(name) or {*pair.source, *pair.target})
            for name, pair in PAIRS.items()
            if pair.expected(target) != NOTHING
        }
    for unread in ("0044-03-15 BC", "infinity"):
        framed.new.execute("UPDATE framed_too SET day = %s WHERE k = 'year 1'", [unread])
        with pytest.raises(RowRefused, match=f"table framed, .*{unread}"):
            framed.verify(STORE)
