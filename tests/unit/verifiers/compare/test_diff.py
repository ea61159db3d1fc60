"""The comparison: no two values that differ are ever called equal, and no row escapes a class."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from chispa import assert_df_equality
from deltalake import DeltaTable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession

from changeover.errors import CouldNotCheck
from changeover.verifiers.compare.diff import compare
from changeover.verifiers.compare.verdict import Range, TableDiff

EVERYTHING = (Range(0, None, None),)
HALVES = (Range(0, None, ("5",)), Range(1, ("5",), None))
Rows = Sequence[tuple[Any, ...]]


@dataclass
class Pair:
    """Two frames of one schema, compared into a folder of their own."""

    spark: SparkSession
    folder: Path
    schema: str = "k int, v string"
    pg_types: Mapping[str, str] = field(default_factory=dict)

    def frame(self, rows: Rows, range_of: int = 0) -> DataFrame:
        """Every row in one range, unless it brings one more value than the schema has."""
        width = self.schema.count(",") + 1
        whole = [row if len(row) > width else (*row, range_of) for row in rows]
        return self.spark.createDataFrame(whole, f"{self.schema}, _changeover_range int")

    def compare(self, source: Rows, target: Rows, **options: Any) -> TableDiff:
        given: dict[str, Any] = {
            "table": "public.t", "store": "new", "key": ("k",), "pg_types": self.pg_types, "ranges": EVERYTHING,
            "differences": self.folder / "differences", "run": "r1",
        } | options  # fmt: skip
        return compare(self.frame(source), self.frame(target), **given)

    def stored(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = DeltaTable(str(self.folder / "differences")).to_pyarrow_table().to_pylist()
        maps = ("key", "source", "target")
        return [{n: dict(v) if n in maps and v is not None else v for n, v in row.items()} for row in rows]


@pytest.fixture
def pair(spark: SparkSession, tmp_path: Path) -> Pair:
    return Pair(spark, tmp_path)


TYPES = {
    "s": ("string", "text"),
    "s2": ("string", "text"),
    "n": ("string", "numeric"),
    "d": ("double", "double precision"),
    "f": ("float", "real"),
    "t": ("string", "time without time zone"),
    "c": ("string", "character(4)"),
    "j": ("string", "json"),
    "u": ("string", "uuid"),
    "at": ("array<string>", "text[]"),
    "ad": ("array<double>", "double precision[]"),
    "an": ("array<string>", "numeric[]"),
    "b": ("binary", "bytea"),
    "dt": ("date", "date"),
    "ts": ("timestamp", "timestamp with time zone"),
}
FORTY = "1234567890123456789012345678901234567890"
NAN, INF = math.nan, math.inf
WHEN = datetime(2026, 1, 1, 12, 0, 0, 1, tzinfo=UTC)

EQUAL_PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "NaN / NaN": ({"d": NAN, "f": NAN}, {"d": NAN, "f": NAN}),
    "infinity / infinity": ({"d": INF, "f": -INF, "n": "Infinity"}, {"d": INF, "f": -INF, "n": "Infinity"}),
    "NULL / NULL": ({}, {}),
    "NaN in an array": ({"ad": [NAN, None]}, {"ad": [NAN, None]}),
    "40 digits": ({"n": FORTY}, {"n": FORTY}),
}
MISMATCHED_PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "NULL / ''": ({"s": None}, {"s": ""}),
    "NULL / 'NULL'": ({"s": None}, {"s": "NULL"}),
    "ab,c / a,bc": ({"s": "ab", "s2": "c"}, {"s": "a", "s2": "bc"}),
    "the comma": ({"s": "a,b", "s2": "c"}, {"s": "a", "s2": "b,c"}),
    "NULL moves over": ({"s": "a", "s2": None}, {"s": None, "s2": "a"}),
    "NaN / NULL": ({"d": NAN}, {"d": None}),
    "0.0 / NULL": ({"d": 0.0}, {"d": None}),
    "NaN / infinity": ({"d": NAN}, {"d": INF}),
    "last bit of a double": ({"d": 0.1}, {"d": 0.1 + 2**-56}),
    "24:00 / 00:00": ({"t": "24:00:00"}, {"t": "00:00:00"}),
    "infinity / -infinity": ({"n": "Infinity"}, {"n": "-Infinity"}),
    "numeric NaN / NULL": ({"n": "NaN"}, {"n": None}),
    "BC / AD": ({"s": "0044-03-15 BC"}, {"s": "0044-03-15"}),
    "dates": ({"dt": date(1, 1, 1)}, {"dt": date(1, 1, 2)}),
    "a microsecond": ({"ts": WHEN}, {"ts": WHEN.replace(microsecond=2)}),
    "pad before the text": ({"c": "ab  "}, {"c": "  ab"}),
    "pad of a text": ({"s": "ab"}, {"s": "ab  "}),
    "json order of an array": ({"j": "[1,2]"}, {"j": "[2,1]"}),
    "json null / absent": ({"j": '{"a":null}'}, {"j": "{}"}),
    "[NULL] / []": ({"at": [None]}, {"at": []}),
    "[] / NULL": ({"at": []}, {"at": None}),
    "[NULL] / NULL": ({"at": [None]}, {"at": None}),
    "[NULL] / ['NULL']": ({"at": [None]}, {"at": ["NULL"]}),
    "['a','b'] / ['a,b']": ({"at": ["a", "b"]}, {"at": ["a,b"]}),
    "['a',NULL] / [NULL,'a']": ({"at": ["a", None]}, {"at": [None, "a"]}),
    "line ends": ({"s": "a\nb"}, {"s": "a\r\nb"}),
    "'' / line end": ({"s": ""}, {"s": "\n"}),
    "bytea": ({"b": b"\x01\xff"}, {"b": b"\x01\xfe"}),
    "bytea '' / NULL": ({"b": b""}, {"b": None}),
    "bytea length": ({"b": b"\x01"}, {"b": b"\x01\x00"}),
    "last of 40 digits": ({"n": FORTY}, {"n": FORTY[:-1] + "1"}),
    "NFC / NFD": ({"s": "caf\u00e9"}, {"s": "cafe\u0301"}),
    "case": ({"s": "\u0130"}, {"s": "i\u0307"}),
    "beyond the BMP": ({"s": "\U0001f600"}, {"s": "\U0001f601"}),
}
NOTATION_PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1.50 / 1.5": ({"n": "1.50"}, {"n": "1.5"}),
    "zeros of a double": ({"d": -0.0}, {"d": 0.0}),
    "zeros of a real": ({"f": 0.0}, {"f": -0.0}),
    "zeros in an array": ({"ad": [1.0, -0.0]}, {"ad": [1.0, 0.0]}),
    "scale in an array": ({"an": ["1.50", None]}, {"an": ["1.5", None]}),
    "key order of json": ({"j": '{"a":1,"b":2}'}, {"j": '{"b": 2, "a": 1}'}),
    "char(n) pad": ({"c": "ab"}, {"c": "ab  "}),
    "case of a uuid": ({"u": "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"}, {"u": "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"}),
    "two columns": ({"n": "1.50", "d": -0.0}, {"n": "1.5", "d": 0.0}),
}


def test_framing_of_values(pair: Pair) -> None:
    """Every pair of one kind or another, side by side in one comparison, each under a key of its own."""
    pair.schema = "k string, " + ", ".join(f"{name} {spark}" for name, (spark, _) in TYPES.items())
    pair.pg_types = {name: pg for name, (_, pg) in TYPES.items()}
    cases = EQUAL_PAIRS | MISMATCHED_PAIRS | NOTATION_PAIRS
    source = [(name, *(left.get(column) for column in TYPES)) for name, (left, _) in cases.items()]
    target = [(name, *(right.get(column) for column in TYPES)) for name, (_, right) in cases.items()]

    diff = pair.compare(source, target)

    classes = {row["key"]["k"]: row["class"] for row in pair.stored()}
    expected = {name: "mismatched" for name in MISMATCHED_PAIRS} | {name: "canonicalisation" for name in NOTATION_PAIRS}
    assert classes == expected
    assert diff.equal_rows == len(EQUAL_PAIRS)
    assert diff.counts["mismatched"] == len(MISMATCHED_PAIRS)
    assert diff.counts["canonicalisation"] == len(NOTATION_PAIRS)
    columns = {row["key"]["k"]: row["columns"] for row in pair.stored()}
    for name, (left, right) in (MISMATCHED_PAIRS | NOTATION_PAIRS).items():
        assert sorted(columns[name]) == sorted({*left, *right})
    values = {row["key"]["k"]: (row["source"], row["target"]) for row in pair.stored()}
    assert values["NULL / 'NULL'"][0]["s"] is None
    assert values["NULL / 'NULL'"][1]["s"] == "NULL"
    assert values["[NULL] / ['NULL']"][0]["at"] == "[null]"
    assert values["bytea"][0]["b"] == "\\x01ff"
    assert values["zeros of a double"][0]["d"] == "-0.0"


def test_a_real_difference_is_not_mixed_with_notation(pair: Pair) -> None:
    pair.schema, pair.pg_types = "k int, n string, v string", {"n": "numeric"}
    diff = pair.compare([(1, "1.50", "a"), (2, "1.50", "a")], [(1, "1.5", "b"), (2, "1.5", "a")])
    assert diff.counts == {"missing": 0, "extra": 0, "mismatched": 1, "duplicate": 0, "canonicalisation": 1}
    assert diff.columns == {"v": 1}
    assert not diff.equal


def test_notation_alone_is_equal_and_said(pair: Pair) -> None:
    pair.schema, pair.pg_types = "k int, n string", {"n": "numeric"}
    diff = pair.compare([(1, "1.50")], [(1, "1.5")])
    assert diff.equal
    assert diff.counts["canonicalisation"] == 1
    assert diff.source_ranges[0].different == 0


def test_missing_and_extra(pair: Pair) -> None:
    diff = pair.compare([(1, "a"), (2, "b")], [(2, "b"), (3, "c")])
    assert (diff.counts["missing"], diff.counts["extra"], diff.equal_rows) == (1, 1, 1)
    differences = pair.spark.createDataFrame(
        [
            ("r1", "public.t", "new", "extra", {"k": "3"}, None, {"k": "3", "v": "c"}),
            ("r1", "public.t", "new", "missing", {"k": "1"}, {"k": "1", "v": "a"}, None),
        ],
        "run string, `table` string, store string, class string,"
        " key map<string, string>, source map<string, string>, target map<string, string>",
    )
    stored = pair.spark.read.format("delta").load(str(pair.folder / "differences")).orderBy("class")
    assert_df_equality(stored.select(differences.columns), differences, ignore_nullable=True)


def test_a_duplicate_is_no_pair(pair: Pair) -> None:
    """A row appended twice, two source keys that meet in one target key, both sides twice, and twice in one alone."""
    source = [(0, "z"), (1, "a"), (2, "a"), (2, "b"), (3, "a"), (3, "a")]
    target = [(0, "z"), (1, "a"), (1, "a"), (2, "b"), (3, "a"), (3, "a"), (4, "a"), (4, "a")]
    diff = pair.compare(source, target)
    assert diff.counts == {"missing": 0, "extra": 0, "mismatched": 0, "duplicate": 4, "canonicalisation": 0}
    assert diff.duplicates == {"source": 1, "target": 2, "both": 1}
    assert (diff.source_rows, diff.target_rows, diff.equal_rows) == (6, 8, 1)
    sides = {(row["key"]["k"], row["side"]) for row in pair.stored()}
    assert sides == {("1", "target"), ("2", "source"), ("3", "both"), ("4", "target")}
    assert len(pair.stored()) == diff.difference_rows == len(source) + len(target) - 2


def test_a_key_of_several_columns_is_framed(pair: Pair) -> None:
    pair.schema = "a string, b string, v int"
    diff = pair.compare([("ab", "c", 1), ("", "x", 1)], [("a", "bc", 1), (None, "x", 1)], key=("a", "b"))
    assert (diff.counts["missing"], diff.counts["extra"], diff.equal_rows) == (2, 2, 0)


def test_a_null_in_a_key_is_a_value(pair: Pair) -> None:
    diff = pair.compare([(None, "a"), (1, "a")], [(None, "b"), (1, "a")])
    assert (diff.counts["mismatched"], diff.equal_rows) == (1, 1)
    assert diff.sample[0].key == {"k": None}


def test_names_that_need_quotes_or_are_ours(pair: Pair) -> None:
    pair.schema = "k int, `a.b` string, `side` string, `c0` string, `x ``y` string"
    diff = pair.compare([(1, "a", "b", "c", "d")], [(1, "a", "b", "c", "e")])
    assert diff.columns == {"x `y": 1}


def test_the_limit_keeps_the_counts(pair: Pair) -> None:
    diff = pair.compare([(i, "a") for i in range(50)], [(i, "b") for i in range(50)], limit=7)
    assert (diff.counts["mismatched"], diff.difference_rows, diff.kept) == (50, 50, 7)
    assert len(pair.stored()) == 7
    assert len(diff.sample) == 20


def test_the_sample_shows_every_class_and_is_cut(pair: Pair) -> None:
    long = "x" * 5000
    source = [(i, long) for i in range(40)]
    diff = pair.compare([*source, (100, None)], [*((i, long + "y") for i, _ in source), (101, "a")])
    assert {difference.kind for difference in diff.sample} == {"missing", "extra", "mismatched"}
    assert len(diff.sample) <= 20
    shown = next(difference for difference in diff.sample if difference.kind == "mismatched")
    assert shown.source is not None
    assert shown.source["v"] == "x" * 200 + "…"
    assert {len(row["source"]["v"]) for row in pair.stored() if row["class"] == "mismatched"} == {5000}


def test_runs_share_one_table_and_an_equal_run_leaves_it_readable(pair: Pair) -> None:
    assert pair.compare([(1, "a")], [(1, "a")]).equal
    assert pair.stored() == []
    pair.compare([(1, "a")], [(1, "b")], run="r2")
    pair.compare([(1, "a")], [(1, "b")], run="r3", store="lake")
    assert sorted((row["run"], row["store"]) for row in pair.stored()) == [("r2", "new"), ("r3", "lake")]


def test_every_range_is_accounted_for(pair: Pair) -> None:
    source = [(1, "a", 0), (2, "b", 0), (7, "c", 1)]
    diff = pair.compare(source, [(1, "a", 0), (2, "x", 0)], ranges=HALVES)
    assert [(c.rows, c.different) for c in diff.source_ranges] == [(2, 1), (1, 1)]
    assert [(c.rows, c.different) for c in diff.target_ranges] == [(2, 1), (0, 0)]


def test_a_target_without_ranges_of_its_own(pair: Pair) -> None:
    source = [(1, "a", 0), (7, "c", 1)]
    diff = pair.compare(source, [(1, "a"), (7, "c")], ranges=HALVES, target_ranges=EVERYTHING)
    assert diff.equal
    assert [c.rows for c in diff.target_ranges] == [2]


@pytest.mark.parametrize("number", [2, None])
def test_a_row_of_no_range_is_no_verdict(pair: Pair, number: int | None) -> None:
    with pytest.raises(CouldNotCheck, match="1 rows of the source belong to no range"):
        pair.compare([(1, "a", 0), (2, "b", number)], [(1, "a", 0), (2, "b", 0)], ranges=HALVES)


def test_two_empty_sides_are_equal_and_every_range_has_its_count(pair: Pair) -> None:
    diff = pair.compare([], [], ranges=HALVES)
    assert (diff.equal, diff.source_rows, diff.target_rows, diff.equal_rows) == (True, 0, 0, 0)
    assert [c.rows for c in (*diff.source_ranges, *diff.target_ranges)] == [0, 0, 0, 0]


def test_one_empty_side_is_a_verdict(pair: Pair) -> None:
    diff = pair.compare([(1, "a")], [])
    assert (diff.counts["missing"], diff.target_rows) == (1, 0)


def test_ranges_with_a_gap_are_refused_before_anything_is_read(pair: Pair) -> None:
    gap = (Range(0, None, ("5",)), Range(1, ("6",), None))
    with pytest.raises(CouldNotCheck, match="gap or an overlap"):
        pair.compare([(1, "a")], [(1, "a")], ranges=gap)


def test_sides_of_other_columns_are_no_verdict(pair: Pair) -> None:
    options: dict[str, Any] = {
        "table": "public.t", "store": "new", "pg_types": {}, "ranges": EVERYTHING,
        "differences": pair.folder / "differences", "run": "r1",
    }  # fmt: skip
    left = pair.frame([(1, "a")])
    with pytest.raises(CouldNotCheck, match="column v is string in the source and absent in the target"):
        compare(left, left.drop("v"), key=("k",), **options)
    with pytest.raises(CouldNotCheck, match="column k is int in the source and bigint in the target"):
        compare(left, left.withColumn("k", left["k"].cast("bigint")), key=("k",), **options)
    with pytest.raises(CouldNotCheck, match="there is no column other"):
        compare(left, left, key=("other",), **options)


def test_each_side_is_read_once(pair: Pair) -> None:
    """A read is counted where it happens, in the task, by an accumulator that no optimiser can remove."""
    rows_read = pair.spark.sparkContext.accumulator(0)

    def read(rows: Any) -> Any:
        for row in rows:
            rows_read.add(1)
            yield row

    frames = [
        pair.spark.createDataFrame(pair.frame(rows).rdd.mapPartitions(read), "k int, v string, _changeover_range int")
        for rows in ([(1, "a"), (2, "b"), (3, "c")], [(1, "a"), (2, "x")])
    ]
    diff = compare(
        *frames, table="public.t", store="new", key=("k",), pg_types={"v": "numeric"}, ranges=EVERYTHING,
        differences=pair.folder / "differences", run="r1",
    )  # fmt: skip
    assert diff.differing_keys == 2
    assert rows_read.value == 5


VALUES = st.sampled_from([None, "", "NULL", "a", "A", "a ", "1.50", "1.5", "a,b", "\u00e9", "e\u0301"])
NUMBERS = st.sampled_from([None, 0.0, 1.5, math.nan, math.inf, -1e300])
ROWS = st.lists(st.tuples(st.integers(0, 12), VALUES, VALUES, NUMBERS), max_size=18)


def oracle(source: Rows, target: Rows) -> Counter[tuple[int, str]]:
    """The same classes by plain dicts; NaN is put as a word, because Python's differs from itself."""

    def by_key(rows: Rows) -> dict[int, list[tuple[Any, ...]]]:
        found: dict[int, list[tuple[Any, ...]]] = {}
        for key, *values in rows:
            found.setdefault(key, []).append(tuple("nan" if value != value else value for value in values))
        return found

    left, right = by_key(source), by_key(target)
    classes: Counter[tuple[int, str]] = Counter()
    for key in left.keys() | right.keys():
        ours, theirs = left.get(key, []), right.get(key, [])
        if max(len(ours), len(theirs)) > 1:
            classes[key, "duplicate"] += len(ours) + len(theirs)
        elif not theirs or not ours:
            classes[key, "extra" if theirs else "missing"] += 1
        elif ours != theirs:
            classes[key, "mismatched"] += 1
    return classes


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(source=ROWS.filter(bool), target=ROWS, change=st.booleans())
def test_it_agrees_with_plain_dicts(pair: Pair, source: list[tuple[Any, ...]], target: list[tuple[Any, ...]], change: bool) -> None:
    pair.schema = "k int, v string, w string, d double"
    target = target if change else source
    run = str(len(pair.stored())) if (pair.folder / "differences").exists() else "0"
    diff = pair.compare(source, target, run=run)
    found = Counter((int(row["key"]["k"]), row["class"]) for row in pair.stored() if row["run"] == run)
    expected = oracle(source, target)
    assert found == expected
    assert diff.equal == (not expected)
    assert sum(diff.counts.values()) == len(expected)
