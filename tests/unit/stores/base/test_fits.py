"""Fits: what is called safe survives, judged by PostgreSQL itself over every cast that it has among the types that are carried."""

from __future__ import annotations

import re

import pytest
from psycopg import sql

from changeover.session import connect
from changeover.stores.base.fits import holds, lake_holds, loss, refuses
from changeover.stores.base.pgtypes import EXACT, source_type

TEXTS = ["", " ", "padded   ", "é☂", "x" * 41, "1", "null", "{}", "t", "00:00:00"]
MOMENTS = ["-infinity", "infinity", "4713-01-01 00:00:00 BC", "1582-10-10 12:00:00", "1999-12-31 23:59:59.999999",
           "9999-12-31 23:59:59.5"]  # fmt: skip
CLOCKS = ["00:00:00", "12:34:56.789012", "23:59:59.999999", "24:00:00"]

EXTREMES: dict[str, list[str]] = {
    "boolean": ["t", "f"],
    "smallint": ["-32768", "0", "32767"],
    "integer": ["-2147483648", "2147483647", "16777217"],
    "bigint": ["-9223372036854775808", "9223372036854775807", "9007199254740993"],
    "real": ["NaN", "-Infinity", "-0", "1e-45", "3.4028235e+38", "0.1", "16777216"],
    "double precision": ["NaN", "Infinity", "-0", "5e-324", "1.7976931348623157e+308", "0.1", "0.123456789012345"],
    "numeric": ["NaN", "-Infinity", "0.000", "1.0055", "-0.00000000000000000001", "9" * 60, "12345678.123456789", "1e300"],
    "text": TEXTS,
    "character varying": TEXTS,
    "character": ["", "a", "ab "],
    "bytea": ["\\x", "\\x00ff", "\\x5c"],
    "date": ["-infinity", "4713-01-01 BC", "1582-10-10", "2024-02-29", "5874897-12-31"],
    "timestamp without time zone": [*MOMENTS, "294276-12-31 23:59:59.999999"],
    "timestamp with time zone": [f"{text}+00" if "inf" not in text and "BC" not in text else text for text in MOMENTS],
    "time without time zone": CLOCKS,
    "time with time zone": [f"{text}-15:59" for text in CLOCKS],
    "interval": ["00:00:00", "1 year 2 mons -3 days +04:05:06.000007", "-178000000 years", "25:00:00.5"],
    "uuid": ["00000000-0000-0000-0000-000000000000", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"],
    "json": ['{"b": 1,  "a":[null], "a": 1.50}', '""', " 1e2", "null"],
    "jsonb": ['{"b": 1, "a": [null, 1.50]}', '""', "1e2"],
    "inet": ["10.0.0.1", "10.0.0.1/24", "::1", "fe80::1/64"],
    "cidr": ["10.0.0.0/8", "10.0.0.1/32", "2001:db8::/32"],
    "macaddr": ["08:00:2b:01:02:03"],
}  # fmt: skip
"""Type without modifiers -> values at its edges, in PostgreSQL's text form."""

MODIFIED = [
    "numeric(4,0)", "numeric(10,2)", "numeric(12,2)", "numeric(12,4)", "numeric(14,4)", "numeric(19,0)", "numeric(60,20)",
    "character varying(5)", "character varying(20)", "character varying(40)", "character(3)", "character(9)",
    "timestamp(0) without time zone", "timestamp(3) without time zone", "timestamp(6) with time zone",
    "timestamp(0) with time zone", "time(0) without time zone", "time(3) without time zone", "time(0) with time zone",
    "interval(0)", "interval(3)", "interval day", "bit(3)", "bit varying", "bit varying(4)", "money", "name", "macaddr8",
]  # fmt: skip
TYPES = [*EXTREMES, *MODIFIED]
ELEMENTS = ["smallint", "integer", "bigint", "text", "character varying(20)", "character varying(40)", "numeric(12,4)", "numeric",
            "character(3)", "timestamp(0) with time zone", "timestamp with time zone", "real", "double precision"]  # fmt: skip
TYPES += [f"{element}[]" for element in ELEMENTS]

SURVIVES = """
CREATE FUNCTION survives(value text, source text, target text) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE answer boolean;
BEGIN
    EXECUTE format('SELECT v::%2$s::%1$s::text = v::text FROM (SELECT %3$L::%1$s AS v) one', source, target, value) INTO answer;
    RETURN answer;
EXCEPTION WHEN others THEN RETURN false;
END $$
"""

CASTS = """
SELECT DISTINCT format_type(castsource, NULL), format_type(casttarget, NULL) FROM pg_cast
WHERE castcontext IN ('a', 'i') AND castsource <> casttarget AND format_type(castsource, NULL) = ANY (%(types)s)
"""


def values_of(type_name: str) -> list[str]:
    """Return a type's extreme values; of a type with modifiers those that it takes."""
    element = type_name.removesuffix("[]")
    values = EXTREMES.get(re.sub(r"\([^)]*\)", "", element), [])
    return values if element == type_name else [f'{{NULL,"{value}"}}' for value in values if '"' not in value and "\\" not in value]


def test_what_is_called_safe_survives_the_way_there_and_back(old_dsn: str) -> None:
    with connect(old_dsn, "test") as connection:
        connection.execute(sql.SQL(SURVIVES))
        cast = connection.execute(CASTS, {"types": list(EXTREMES)}).fetchall()
        pairs = {(source, target) for source in TYPES for target in TYPES} | {(source, target) for source, target in cast}
        asked = [(source, target, value) for source, target in sorted(pairs) for value in values_of(source)]
        answers = connection.execute(
            "SELECT source, target, count(*), count(*) FILTER (WHERE survives(value, source, target))"
            " FROM unnest(%s::text[], %s::text[], %s::text[]) AS t(source, target, value)"
            " WHERE survives(value, source, source) GROUP BY 1, 2",
            [list(column) for column in zip(*asked, strict=True)],
        ).fetchall()
    lost = {(source, target) for source, target, tried, kept in answers if kept < tried}
    assert set(EXACT) == set(EXTREMES)
    assert [pair for pair in sorted(lost) if holds(*pair)] == []
    assert all(source_type(target) is not None for source, target in pairs if source_type(source) and holds(source, target))
    silent = {(s, t) for s, t in lost if not holds(s, t)}
    assert {("numeric(12,4)", "numeric(10,2)"), ("double precision", "real"), ("timestamp without time zone", "date")} <= silent
    assert len([pair for pair in lost if pair in set(cast)]) > 15, "most of PostgreSQL's own casts lose something"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("integer", "bigint"), ("smallint", "real"), ("integer", "double precision"), ("bigint", "numeric"),
        ("integer", "numeric(12,2)"),
        ("real", "double precision"), ("numeric(10,2)", "numeric(12,4)"), ("numeric(12,4)", "numeric"),
        ("numeric(10,2)", "numeric(60,20)"),
        ("character varying(10)", "character varying(20)"), ("character varying(10)", "text"), ("text", "character varying"),
        ("character(3)", "character(9)"), ("timestamp(3) with time zone", "timestamp with time zone"), ("uuid", "text"),
        ("timestamp with time zone", "timestamp(6) with time zone"), ("time(0) without time zone", "time without time zone"),
        ("jsonb", "text"), ("integer[]", "bigint[]"), ("character varying(9)[]", "text[]"),
        ("bigint", "character varying(20)"),
    ],
)  # fmt: skip
def test_what_is_wider_is_taken(source: str, target: str) -> None:
    assert holds(source, target)
    assert refuses(source, target)
    assert not holds(target, source) or {source, target} <= {"text", "character varying"} or "(6)" in target


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("numeric(12,4)", "numeric(10,2)"), ("numeric(12,4)", "numeric(12,2)"), ("numeric(12,4)", "numeric(12,6)"),
        ("numeric", "real"),
        ("numeric(10,2)", "double precision"), ("bigint", "integer"), ("bigint", "double precision"), ("integer", "real"),
        ("integer", "numeric(9,0)"), ("text", "character varying(90)"), ("character varying(9)", "character(9)"),
        ("character(9)", "text"), ("character(9)", "character varying(9)"), ("character(9)", "character(3)"),
        ("json", "jsonb"),
        ("timestamp with time zone", "timestamp(0) with time zone"),
        ("timestamp without time zone", "timestamp with time zone"),
        ("timestamp without time zone", "date"), ("date", "timestamp without time zone"), ("interval", "interval day"),
        ("time without time zone", "time(0) without time zone"), ("inet", "cidr"), ("cidr", "inet"), ("text", "uuid"),
        ("integer[]", "text[]"), ("integer", "integer[]"), ("numeric(12,4)[]", "numeric(10,2)[]"),
        ("timestamp with time zone", "text"),
        ("double precision", "text"), ("uuid", "character varying(35)"), ("bytea", "text"), ("integer", "money"),
        ("text", "name"),
    ],
)  # fmt: skip
def test_what_may_lose_something_is_not(source: str, target: str) -> None:
    assert not holds(source, target)


def test_only_an_error_is_no_silent_loss() -> None:
    assert refuses("bigint", "integer")
    assert refuses("numeric(12,4)", "numeric(10,4)")
    for source, target in (("numeric(12,4)", "numeric(10,2)"), ("text", "character varying(9)"), ("numeric", "numeric(38,10)")):
        assert not refuses(source, target), "an excess of spaces, or of digits, is cut without a word"


@pytest.mark.parametrize(
    ("source", "target", "answer"),
    [
        ("int", "bigint", True), ("bigint", "int", False), ("float", "double", True), ("double", "float", False),
        ("int", "double", True),
        ("bigint", "double", False), ("decimal(10,2)", "decimal(12,4)", True), ("decimal(12,4)", "decimal(10,2)", False),
        ("int", "decimal(12,2)", True), ("int", "decimal(11,2)", False), ("timestamp", "timestamp_ntz", False),
        ("string", "date", False),
        ("array<int>", "array<bigint>", True), ("array<bigint>", "array<int>", False), ("date", "timestamp_ntz", False),
        ("int", "string", False), ("decimal(10,0)", "bigint", False),
    ],
)  # fmt: skip
def test_a_lake_asks_the_same_of_its_own_types(source: str, target: str, answer: bool) -> None:
    assert lake_holds(source, target) is answer


def test_the_loss_can_be_stated() -> None:
    assert loss("x", "numeric(12,4)", "numeric(10,2)", "decimal(10,2)") == "cast(x as decimal(10,2))"
    assert loss("`a b`", "double precision", "real", "float") == "cast(`a b` as float)"
    assert loss("x", "text", "character varying(9)", "string") == "substring(x, 1, 9)"
    assert loss("x", "character(9)", "text", "string") == "rtrim(x)"
    assert loss("x", "timestamp with time zone", "timestamp(0) with time zone", "timestamp") == "date_trunc('second', x)"
    assert loss("x", "interval", "interval(0)", "string") is None
