"""A Delta target: its MERGE follows the gate's rule, an append is made once, and tombstones are hidden from readers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyspark.sql import DataFrame, SparkSession

from changeover.errors import RowRefused
from changeover.position import Version, image_version
from changeover.stores.base.interface import VERSION_COLUMNS, Counts, TargetTable
from changeover.stores.base.pgtypes import Column
from changeover.stores.delta.appends import DELETED, VERSION, AppendTask
from changeover.stores.delta.store import DeltaStore, live_rows
from tests.model.gate import Cell, merged

V0 = image_version(100)
TABLE = TargetTable(
    "public",
    "kept",
    (
        Column("id", "integer", "int", True),
        Column("note", "text", "string"),
        Column("at", "timestamp without time zone", "timestamp_ntz"),
    ),
    ("id",),
)
TYPES = ("int", "bigint", "bigint", "boolean", "int", "string")
CHANGES = ", ".join(f"{name} {kind}" for name, kind in zip((*VERSION_COLUMNS, "id", "note"), TYPES, strict=True))


@dataclass
class Marks:
    """A ledger's mark that only notes what it is told."""

    prepare: str = "1"
    told: list[tuple[int, Counts]] = field(default_factory=list)

    def in_transaction(self, cursor: Any, chunk: int, counts: Counts, seconds: float) -> bool:
        raise AssertionError("a Delta chunk has no transaction with the ledger")

    def afterwards(self, chunk: int, counts: Counts, seconds: float) -> bool:
        self.told.append((chunk, counts))
        return True

    def identity(self, chunk: int) -> str:
        return f"changeover/test/{self.prepare}/{chunk}"


@pytest.fixture
def store(tmp_path: Path) -> DeltaStore:
    made = DeltaStore("lake", tmp_path, "test")
    made.create(TABLE)
    made.install(TABLE, V0)
    return made


def append(store: DeltaStore, chunk: int, ids: Sequence[int | None], marks: Marks, note: str = "image") -> Counts:
    """Append a chunk as a task does."""
    task = AppendTask(str(store.path("kept")), ("id",), ("id",), (chunk,), V0, marks)
    none = pa.nulls(len(ids), pa.timestamp("us"))
    batch = pa.record_batch([pa.array(ids, pa.int32()), pa.array([note] * len(ids)), none], names=["id", "note", "at"])
    return task.append(chunk, iter([batch]))


def rows_of(frame: DataFrame) -> dict[int, str]:
    found = frame.select("id", "note").collect()
    assert len({row.id for row in found}) == len(found), "one row a key"
    return {row.id: row.note for row in found}


def changes(spark: SparkSession, offered: dict[int, Cell]) -> DataFrame:
    rows = [(*cell.version, cell.image is None, key, cell.image) for key, cell in offered.items()]
    return spark.createDataFrame(rows, CHANGES).selectExpr("*", "cast(NULL AS timestamp_ntz) AS at").coalesce(1)


def cells(spark: SparkSession, store: DeltaStore) -> dict[int, Cell]:
    found = spark.read.format("delta").load(str(store.path("kept"))).collect()
    return {row.id: Cell(Version(*row[VERSION]), None if row[DELETED] else row.note) for row in found}


def test_merges_leave_the_cells_of_the_rule(spark: SparkSession, store: DeltaStore) -> None:
    draw = random.Random(7)
    append(store, 0, range(3), Marks())
    expected = {key: Cell(V0, "image") for key in range(3)}
    offered: dict[int, Cell] = {}
    for number in range(4):
        if number != 2:  # the third batch is the second one again
            versions = {
                key: Version(draw.randint(0, 1), draw.choice([99, 100, 101, 2**40]), draw.randint(-1, 2)) for key in range(6)
            }
            offered = {
                k: Cell(v, None if (v.ordinal + k) % 3 == 0 else f"change {v}") for k, v in versions.items() if draw.random() < 0.8
            }
        store.merge(TABLE, changes(spark, offered))
        for key, offer in offered.items():
            cell = merged(expected.get(key), [offer], V0)
            if cell is not None:
                expected[key] = cell
    found = cells(spark, store)
    assert found == expected
    live = {key: cell.image for key, cell in expected.items() if cell.image is not None}
    assert rows_of(live_rows(spark, store.path("kept"))) == live
    assert len(live) < len(expected), "the draw has tombstones, which readers do not see"
    assert VERSION not in live_rows(spark, store.path("kept")).columns


def test_a_repeated_append_is_left_out(store: DeltaStore) -> None:
    marks = Marks()
    assert append(store, 0, [1, 2], marks) == Counts(2, 2)
    assert append(store, 0, [1, 2], marks, note="the same chunk again") == Counts(2, 2)
    assert append(store, 1, [3], marks) == Counts(1, 1)
    assert append(store, 0, [1, 2], marks) == Counts(2, 2), "also after another chunk's commit"
    found = store._existing("kept").to_pyarrow_table(columns=["id", "note"]).to_pylist()
    assert sorted((row["id"], row["note"]) for row in found) == [(1, "image"), (2, "image"), (3, "image")]
    assert [chunk for chunk, _ in marks.told] == [0, 0, 1, 0]


def test_another_prepare_may_append_again(store: DeltaStore) -> None:
    """A table that outlives an abort, and is emptied by hand, remembers the chunks of the first time."""
    append(store, 0, [1, 2], Marks("1"))
    store._existing("kept").delete()
    append(store, 0, [1, 2], Marks("2"))
    assert store._existing("kept").to_pyarrow_table().num_rows == 2


def test_a_key_of_null_is_refused(store: DeltaStore) -> None:
    with pytest.raises(RowRefused, match="column id must not be NULL"):
        append(store, 0, [1, None], Marks())
    assert not store.has_rows("public", "kept")


def test_columns_come_back_as_they_were_made(store: DeltaStore) -> None:
    assert store.columns("public", "kept") == TABLE.columns
    assert store.columns("public", "nothing") is None
    assert store.objections("public", "kept", ("id",)) == []


def test_finalize_removes_tombstones_and_abort_the_table(spark: SparkSession, store: DeltaStore) -> None:
    append(store, 0, [1, 2], Marks())
    store.merge(TABLE, changes(spark, {1: Cell(Version(0, 200, 0), None)}))
    store.finalize(TABLE)
    assert cells(spark, store) == {2: Cell(V0, "image")}
    store.abort(TABLE, created=False)
    assert store.path("kept").exists()
    store.abort(TABLE, created=True)
    assert not store.path("kept").exists()


def test_a_table_that_is_begun_anew_skips_appends_of_before(spark: SparkSession, store: DeltaStore) -> None:
    """One chunk was appended, one is still on its way in a task that nobody waits for any more."""
    before, anew = Marks("1"), Marks("2")
    append(store, 0, range(3), before)
    later = Version(1, 50, -1)
    names = [before.identity(chunk) for chunk in range(2)]
    store.begin_anew(TABLE, later, names)
    store.begin_anew(TABLE, later, names)
    append(store, 0, range(3), before)
    append(store, 1, range(3, 6), before)
    assert cells(spark, store) == {}
    append(store, 0, range(2), anew, "anew")
    assert rows_of(live_rows(spark, store.path("kept"))) == {0: "anew", 1: "anew"}
    store.merge(TABLE, changes(spark, {5: Cell(Version(0, 2**40, 0), "of an earlier epoch"), 6: Cell(Version(1, 51, 0), "event")}))
    assert rows_of(live_rows(spark, store.path("kept"))) == {0: "anew", 1: "anew", 6: "event"}
