"""Types: every carried type comes back exactly, through the snapshot and through the change stream, into both targets.

The judge is PostgreSQL's own text of the columns on both sides. A value that a target can't hold is an error with the table's
name, whichever way it comes, and never another value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from chispa import assert_df_equality
from psycopg import sql
from pyspark.sql import DataFrame, SparkSession

from changeover.errors import RowRefused
from changeover.session import connect
from changeover.spark.failures import from_spark
from changeover.stores.base.pgtypes import EXACT, Column, decode, postgres_type, source_type
from changeover.stores.base.reader import EVERYTHING, ExportedSnapshot, ReadTable, read_table
from tests.support.fix_migration import MakeMigration

TEXTS = [
    "",
    "NULL",
    "\\N",
    "\\.",
    "a\tb",
    "a\nb\r\nc",
    "back\\slash \\t",
    "\"q\" 'q'",
    "{a,b}",
    "Zoë ☂ 你好 🛞",
    " padded ",
    "null",
]
TIMES = [
    "0001-01-01 00:00:00",
    "1582-10-10 12:00:00",
    "1969-12-31 23:59:59.999999",
    "2024-02-29 12:34:56.123456",
    "9999-12-31 23:59:59.1",
]
ARRAYS = ["{}", "{NULL}", '{"",NULL,"NULL"," x ","a,b","q\\"x\\\\y","{}"}', "{one}"]

VALUES: dict[str, list[str]] = {
    "boolean": ["t", "f"],
    "smallint": ["-32768", "0", "32767"],
    "integer": ["-2147483648", "0", "2147483647"],
    "bigint": ["-9223372036854775808", "0", "9223372036854775807"],
    "real": ["NaN", "Infinity", "-Infinity", "-0", "0", "1e-45", "3.4028235e+38", "0.1"],
    "double precision": ["NaN", "Infinity", "-Infinity", "-0", "0", "5e-324", "1.7976931348623157e+308", "0.1", "1e21"],
    "text": TEXTS,
    "character varying(40)": TEXTS,
    "character varying": TEXTS,
    "character(9)": ["", "a", "ab  ", "é ☂", "\\N", "123456789"],
    "bytea": ["\\x", "\\x00", "\\x5c4e", "\\xdeadbeef0a0d09"],
    "date": [text[:10] for text in TIMES],
    "timestamp with time zone": [f"{text}+00" for text in TIMES],
    "timestamp without time zone": TIMES,
    "timestamp(3) with time zone": [f"{text}+00" for text in TIMES[:4]],
    "uuid": ["00000000-0000-0000-0000-000000000000", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"],
    "json": ['{"b": 1,  "a":[null,"x\\ny"], "a": 1.50}', '""', "null", " 1e2"],
    "jsonb": ['{"b": 1, "a": [null, "x\\ny", 1.50]}', '""', "null", '"\\\\N"'],
    "time without time zone": ["00:00:00", "23:59:59.999999", "24:00:00"],
    "time with time zone": ["00:00:00+00", "23:59:59.999999-15:59", "12:00:00+05:45"],
    "interval": ["00:00:00", "1 year 2 mons -3 days +04:05:06.000007", "-178000000 years", "00:00:00.000001"],
    "inet": ["10.0.0.1", "10.0.0.1/24", "::1", "fe80::1/64"],
    "cidr": ["10.0.0.0/8", "10.0.0.1/32", "2001:db8::/32"],
    "macaddr": ["08:00:2b:01:02:03"],
    "numeric": [
        "1234567890123456789012345678901234567890.50",
        "NaN",
        "Infinity",
        "-Infinity",
        "0.000",
        "-0.00000000000000000001",
        "1e300",
    ],
    "numeric(12,4)": ["0.0000", "-99999999.9999", "1.5"],
    "numeric(38,10)": ["1234567890123456789012345678.0123456789", "-0.0000000001"],
    "numeric(60,20)": ["1234567890123456789012345678901234567890.12345678901234567890", "NaN"],
    "numeric(5,0)": ["99999"],
    "boolean[]": ["{t,f,NULL}", "{}"],
    "integer[]": ["{1,NULL,-3}", "{}", "{NULL}"],
    "bigint[]": ["{9223372036854775807,NULL}"],
    "real[]": ["{NaN,-0,1e-45,NULL}"],
    "double precision[]": ["{NaN,Infinity,-0,0.1,5e-324,NULL}"],
    "text[]": ARRAYS,
    "character varying(9)[]": ARRAYS,
    "character(3)[]": ["{a,NULL,abc}", '{"",ab}'],
    "date[]": ["{2024-02-29,NULL,0001-01-01}"],
    "timestamp with time zone[]": ['{"2024-02-29 12:34:56.123456+00",NULL}'],
    "timestamp without time zone[]": ['{"1582-10-10 12:00:00.1",NULL}'],
    "numeric[]": ["{1.50,NaN,NULL,1234567890123456789012345678901234567890.5}"],
    "numeric(12,4)[]": ["{1.5,NULL,-0.0001}"],
    "uuid[]": ["{a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11,NULL}"],
    "jsonb[]": ['{"{\\"a\\": \\"x\\\\\\\\y\\"}",NULL,null}', "{}"],
    "interval[]": ['{"1 day -00:00:01",NULL}'],
    "inet[]": ["{10.0.0.1,10.0.0.1/24,NULL}"],
    "time without time zone[]": ["{24:00:00,NULL}"],
}
"""Type -> values in PostgreSQL's text form; NULL is tried with each of them."""

COLUMNS = {type_name: f"c{number}" for number, type_name in enumerate(VALUES)}
EXACT_ONLY = ("float", "double", "decimal", "date", "timestamp")
"""Spark's types whose values Python may take for equal though they differ, or can't hold."""

SECOND = 1000
"""What the ids of the rows that come by the stream are ahead of their twins from the snapshot."""


def insert(first: int) -> Iterator[tuple[sql.Composed, list[object]]]:
    """Yield statements that insert every value once, the n-th values of all types in one row, and a row of NULLs."""
    for number in range(max(map(len, VALUES.values())) + 1):
        chosen = {COLUMNS[t]: values[number] for t, values in VALUES.items() if number < len(values)}
        names = sql.SQL(", ").join(map(sql.Identifier, ["id", *chosen]))
        marks = sql.SQL(", ").join([sql.Placeholder()] * (len(chosen) + 1))
        yield sql.SQL("INSERT INTO odd ({}) VALUES ({})").format(names, marks), [first + number, *chosen.values()]


def test_every_type_comes_back_exactly_both_ways(make_migration: MakeMigration) -> None:
    columns = ", ".join(f"{name} {type_name}" for type_name, name in COLUMNS.items())
    made = make_migration(
        '[[table]]\nsource = "odd"\ntarget = "odd_too"\nkey = ["id"]\n', f"CREATE TABLE odd (id integer PRIMARY KEY, {columns})"
    )
    for statement in insert(0):
        made.old.execute(*statement)
    made.prepare()
    for statement in insert(SECOND):
        made.old.execute(*statement)
    made.backfill()
    made.catch_up()

    texts = [sql.SQL("{}::text").format(sql.Identifier(name)) for name in COLUMNS.values()]
    image = sql.SQL("SELECT id, {} FROM {} ORDER BY id")
    source = made.old.execute(image.format(sql.SQL(", ").join(texts), sql.Identifier("odd"))).fetchall()
    target = made.new.execute(image.format(sql.SQL(", ").join(texts), sql.Identifier("odd_too"))).fetchall()
    for left, right in zip(source, target, strict=True):
        for type_name, before, after in zip(["id", *COLUMNS], left, right, strict=True):
            assert before == after, f"{type_name}, id {left[0]}"
    types = (
        "SELECT array_agg(format_type(atttypid, atttypmod) ORDER BY attnum) FROM pg_attribute"
        " WHERE attnum > 0 AND attrelid = %s::regclass"
    )
    assert made.new.execute(types, ["odd_too"]).fetchone() == made.old.execute(types, ["odd"]).fetchone()

    lake = made.lake("odd_too")
    kinds = {column.name: column.dataType.simpleString() for column in lake.schema}
    exact = {name: one for one, name in COLUMNS.items() if any(word in kinds[name] for word in EXACT_ONLY)}
    plain = ["id", *(name for name in COLUMNS.values() if name not in exact)]
    snapshot = lake.where(lake["id"] < SECOND).orderBy("id")
    stream = lake.where(lake["id"] >= SECOND).withColumn("id", lake["id"] - SECOND).orderBy("id")
    assert_df_equality(snapshot.select(plain), stream.select(plain), ignore_nullable=True)

    read = lake.select("id", *exact).toArrow().to_pylist()  # Arrow has days that Python's local times have not
    rows = {row["id"]: row for row in read}
    for number in (number for number in rows if number < SECOND):
        for name, type_name in exact.items():
            values = repr(rows[number][name]), repr(rows[number + SECOND][name])
            assert values[0] == values[1], f"{type_name}, id {number}: one value however it came"


def test_the_table_of_types_is_tried_whole() -> None:
    tried = {name.split("(")[0].strip() if not name.startswith("timestamp(") else "timestamp with time zone" for name in VALUES}
    assert set(EXACT) <= tried
    assert all(source_type(name) is not None for name in VALUES)


REFUSED = [
    ("date", "infinity"),
    ("date", "-infinity"),
    ("date", "0044-03-15 BC"),
    ("timestamp with time zone", "infinity"),
    ("timestamp with time zone", "0044-03-15 00:00:00+00 BC"),
    ("timestamp without time zone", "-infinity"),
    ("timestamp without time zone", "0044-03-15 00:00:00 BC"),
    ("timestamp without time zone[]", '{"0044-03-15 00:00:00 BC"}'),
    ("date[]", '{"0044-03-15 BC"}'),
    ("numeric(12,4)", "NaN"),
    ("integer[]", "{{1,2},{3,4}}"),
    ("text[]", '{{"a","b"}}'),
    ("numeric(12,4)[]", "{NaN}"),
    ("date[]", "{infinity}"),
]


@pytest.fixture
def odd(old_dsn: str, spark: SparkSession) -> Iterator[object]:
    """Yield what reads a table of one value of a type in an exported snapshot."""
    with connect(old_dsn, "test") as connection:

        def read(type_name: str, value: str) -> DataFrame:
            kind = sql.SQL(type_name)
            connection.execute(sql.SQL("CREATE TABLE odd (value {})").format(kind))
            connection.execute("INSERT INTO odd VALUES (%s)", [value])
            connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
            row = connection.execute("SELECT pg_export_snapshot(), pg_current_snapshot()::text").fetchone()
            assert row is not None
            columns = (Column("value", type_name, ""),)
            return read_table(spark, old_dsn, "test", ReadTable("public", "odd", columns, ()), EVERYTHING, ExportedSnapshot(*row))

        yield read


@pytest.mark.parametrize(("type_name", "value"), REFUSED)
def test_what_spark_cannot_hold_is_an_error_with_the_tables_name(
    odd: object, spark: SparkSession, type_name: str, value: str
) -> None:
    said = r"table public\.odd, the place: a row can't be carried over"
    with pytest.raises(RowRefused, match=said), from_spark("public.odd", "the place"):
        odd(type_name, value).collect()  # type: ignore[operator]
    if type_name.endswith("[]"):
        value = json.dumps([["1", "2"]] if "{{" in value else [value.strip('{}"')])
    frame = spark.createDataFrame([(value,)], "value string")
    decoded = frame.select(decode(frame["value"], type_name, native=False))
    with pytest.raises(RowRefused, match=r"public\.odd"), from_spark("public.odd", "the stream"):
        decoded.collect()


def test_an_array_that_begins_elsewhere_is_refused(odd: object) -> None:
    with pytest.raises(RowRefused, match="bounds"), from_spark("public.odd", "the place"):
        odd("text[]", "[0:1]={a,b}").collect()  # type: ignore[operator]


NOT_CARRIED = [
    "point",
    "box",
    "money",
    "xml",
    "tsvector",
    "int4range",
    "oid",
    "bit(3)",
    "bit varying",
    "numeric(5,-2)",
    "mood",
    "bytea[]",
    "point[]",
    "pg_lsn",
    '"char"',
    "name",
    "hstore",
]


@pytest.mark.parametrize("type_name", NOT_CARRIED)
def test_a_type_that_is_not_proven_exact_is_not_carried(type_name: str) -> None:
    assert source_type(type_name) is None


def test_computed_columns_have_a_type_to_go_to() -> None:
    assert postgres_type("array<decimal(12,4)>") == "numeric(12,4)[]"
    assert postgres_type("timestamp_ntz") == "timestamp without time zone"
    assert postgres_type("map<string,string>") is None
    assert postgres_type("array<struct<a:int>>") is None
    for spark_type in {source_type(name).spark for name in VALUES}:  # type: ignore[union-attr]
        assert postgres_type(spark_type) is not None, spark_type
