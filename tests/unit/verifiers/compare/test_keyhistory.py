"""What the stream tells of keys: the last of each commit, in order, and nothing where something was passed over."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from changeover.jobs.spool.events import Event
from changeover.jobs.spool.table import Spool
from changeover.jobs.transform.derivation import derivations
from changeover.jobs.transform.transform import Transform
from changeover.spec import Table
from changeover.stores.base.interface import TargetTable
from changeover.stores.base.pgtypes import Column
from changeover.verifiers.compare import keyhistory
from changeover.verifiers.compare.keyhistory import History
from changeover.verifiers.compare.recheck import KeyChange

KEPT = Table("public.kept", "public.kept", ("id",))


def transform(key_type: str, spark_type: str) -> Transform:
    columns = (Column("id", key_type, spark_type, True), Column("day", "date", "date"))
    return Transform(KEPT, columns, TargetTable("public", "kept", columns, ("id",)), derivations(KEPT, columns), columns[:1])


NUMBERED, NAMED, DATED = (
    transform(*types) for types in (("integer", "int"), ("text", "string"), ("timestamp with time zone", "timestamp"))
)


def put(lsn: int, ordinal: int, key: str, day: str | None, old: str | None = None, *, missing: bool = False) -> Event:
    row = (("id",), (key,)) if missing else (("id", "day"), (key, day))
    return Event("public.kept", lsn, ordinal, "U", row, (("id",), (old,)) if old else None, ("day",) if missing else (), 7, 0)


def gone(lsn: int, ordinal: int, key: str) -> Event:
    return Event("public.kept", lsn, ordinal, "D", None, (("id",), (key,)), (), 7, 0)


def told(
    spark: SparkSession, tmp_path: Path, events: list[Event], given: Transform = NUMBERED, keys: tuple[str, ...] = ("1", "2")
) -> list[KeyChange]:
    spool = Spool(tmp_path / "spool")
    spool.create()
    for lsn in sorted({event.lsn for event in events}):
        spool.append([event for event in events if event.lsn == lsn], lsn + 1)
    return list(History(spark, given, spool, 100).changes([(key,) for key in keys]))


def row(key: str, day: str) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    return (key,), ((day, key),)


EVENTS = [
    put(90, 0, "1", "1990-01-01"), put(100, 0, "1", "2000-01-01"), gone(100, 2, "1"), put(100, 4, "1", "2000-01-02"),
    put(110, 0, "2", "2001-01-01"), put(110, 2, "3", "2001-01-01"), gone(120, 0, "1"), put(130, 0, "1", "2003-01-01", "2"),
]  # fmt: skip


@pytest.mark.parametrize("given", [NUMBERED, NAMED])
def test_the_last_of_each_commit_is_told_in_order(spark: SparkSession, tmp_path: Path, given: Transform) -> None:
    found = told(spark, tmp_path, EVENTS, given)
    assert found[:3] == [row("1", "2000-01-02"), row("2", "2001-01-01"), (("1",), ())]
    assert sorted(found[3:], key=repr) == sorted([row("1", "2003-01-01"), (("2",), ())], key=repr)


def test_a_key_that_the_stream_writes_otherwise_is_told(spark: SparkSession, tmp_path: Path) -> None:
    first, other = "2000-01-01 00:00:00+00", "2000-01-02 00:00:00+00"
    found = told(spark, tmp_path, [put(100, 0, first, "2000-01-01"), put(110, 0, other, None)], DATED, ("2000-01-01 00:00:00",))
    assert found == [row("2000-01-01 00:00:00", "2000-01-01")]


@pytest.mark.parametrize(
    "passed",
    [
        Event("public.kept", 140, 0, "T", None, None, (), 7, 0),
        put(140, 0, "1", "infinity"),
    ],
    ids=["a TRUNCATE", "a row that can't be carried over"],
)  # fmt: skip
def test_what_is_passed_over_leaves_it_open_what_a_key_was_last(spark: SparkSession, tmp_path: Path, passed: Event) -> None:
    assert told(spark, tmp_path, [*EVENTS, passed])[-1] is None


def test_a_bad_row_of_another_key_is_not_looked_at(spark: SparkSession, tmp_path: Path) -> None:
    assert None not in told(spark, tmp_path, [*EVENTS, put(140, 0, "3", "infinity")])


def test_a_transaction_that_is_too_large_is_passed_over(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyhistory, "PART_EVENTS", 1)
    assert told(spark, tmp_path, [put(100, 2 * n, "1", "2000-01-01") for n in range(100_000)]) == [None]


@pytest.mark.parametrize(("given", "key"), [(NUMBERED, "1"), (DATED, "2000-01-01 00:00:00")])
def test_of_a_value_that_was_not_sent_the_key_alone_is_told(
    spark: SparkSession, tmp_path: Path, given: Transform, key: str
) -> None:
    written = key if given is NUMBERED else f"{key}+00"
    found = told(spark, tmp_path, [put(100, 0, written, "2000-01-01"), put(140, 0, written, None, missing=True)], given, (key,))
    assert found == [row(key, "2000-01-01"), ((key,), None) if given is NUMBERED else None]


def test_of_a_target_key_that_may_be_of_several_only_that_it_was_written_is_told(spark: SparkSession, tmp_path: Path) -> None:
    owned = replace(NUMBERED, target=replace(NUMBERED.target, owned=True))
    found = told(spark, tmp_path, EVENTS, owned)
    assert set(found) == {(("1",), None), (("2",), None)}
    assert len(found) == 5
