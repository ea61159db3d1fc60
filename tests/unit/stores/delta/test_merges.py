"""Merges into a lake without Spark: what stands afterwards is the rule's, whatever keys, files and other writers there are."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from deltalake import DeltaTable, Schema, TableFeatures, write_deltalake

from changeover.errors import CouldNotFinish
from changeover.position import Version
from changeover.stores.delta import merges
from changeover.stores.delta.files import STATISTICS, bounded, files_of, write
from changeover.stores.delta.store import DeltaStore

VERSION = pa.struct([("epoch", pa.int32()), ("lsn", pa.int64()), ("ordinal", pa.int64())])
NOON = dt.datetime(2026, 11, 30, 12, tzinfo=dt.UTC)

KEYS: dict[str, tuple[dict[str, pa.DataType], Callable[[int], tuple[Any, ...]]]] = {
    "a number": ({"id": pa.int32()}, lambda number: (number - 5,)),
    "a text": ({'od"d.na me': pa.string()}, lambda number: (["", " ", "a", "A", "ä", "a" * 40][number % 6] + str(number // 6),)),
    "five columns": (
        {"a": pa.int64(), "b": pa.string(), "c": pa.bool_(), "d": pa.date32(), "e": pa.binary()},
        lambda number: (2**62 + number % 2, f"{number % 3}", number % 5 == 0, NOON.date(), bytes([number])),
    ),
    "a number and a long text": ({"id": pa.int64(), "b": pa.string()}, lambda number: (number, "b" * 40 * (number % 2))),
    "an exact number": ({"n": pa.decimal128(38, 10)}, lambda number: (Decimal(number) / 4,)),
    "a moment": ({"at": pa.timestamp("us", "UTC")}, lambda number: (NOON + dt.timedelta(microseconds=number),)),
    "a double": ({"f": pa.float64()}, lambda number: (number / 3 if number else float("nan"),)),
    "an array": ({"list": pa.list_(pa.string())}, lambda number: ([None, str(number)],)),
}


def table_of(kinds: dict[str, pa.DataType], cells: Sequence[tuple[tuple[Any, ...], Version, str | None]]) -> pa.Table:
    """Return rows: key, a text, version and tombstone."""
    columns: dict[str, pa.Array] = {
        name: pa.array([key[place] for key, _, _ in cells], kind) for place, (name, kind) in enumerate(kinds.items())
    }
    columns["note"] = pa.array([note for _, _, note in cells], pa.string())
    columns["_version"] = pa.array([version._asdict() for _, version, _ in cells], VERSION)
    columns["_deleted"] = pa.array([note is None for _, _, note in cells])
    return pa.table(columns)


def made(folder: Path, kinds: dict[str, pa.DataType], chunks: Sequence[pa.Table], *, ours: bool = True) -> None:
    """Make a table with a file a chunk, as appends do; one that is not `ours` has no property of its statistics."""
    schema = Schema.from_arrow(chunks[0].schema)
    named = ",".join(f"`{name}`" for name, kind in kinds.items() if pa.types.is_integer(kind) or pa.types.is_string(kind))
    table = DeltaTable.create(str(folder), schema, configuration={STATISTICS: named} if ours and named else None)
    for number, chunk in enumerate(chunks):
        added = write(folder, [chunk], bounded(table, list(kinds)), number)
        assert added is not None
        merges.act(DeltaTable(str(folder)), [added])


def arrow_schema(folder: Path) -> pa.Schema:
    """Return the table's schema as its readers have it."""
    return DeltaTable(str(folder)).to_pyarrow_table().schema


def cells_of(folder: Path, kinds: dict[str, pa.DataType]) -> dict[str, tuple[Version, str | None]]:
    """Return what stands in the table, by the key's text."""
    return cells_in(DeltaTable(str(folder)).to_pyarrow_table(), kinds)


def cells_in(table: pa.Table, kinds: dict[str, pa.DataType]) -> dict[str, tuple[Version, str | None]]:
    """Return the cells of rows, by the key's text."""
    cells = {
        str([row[name] for name in kinds]): (Version(**row["_version"]), None if row["_deleted"] else row["note"])
        for row in table.to_pylist()
    }
    assert len(cells) == len(table), "one row a key"
    return cells


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("seed", range(3))
def test_what_stands_is_the_newest_of_each_key(tmp_path: Path, kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merges, "SMALL_BYTES", [0, 1 << 20, 2500][seed])
    kinds, key = KEYS[kind]
    draw = random.Random(f"{kind} {seed}")
    first = [(key(number), Version(0, 100, -1), "image") for number in range(24)]
    made(tmp_path, kinds, [table_of(kinds, first[start : start + 8]) for start in range(0, 24, 8)])
    expected = cells_of(tmp_path, kinds)
    assert len(expected) == 24
    for _ in range(5):
        offered = [
            (key(number), Version(draw.randint(0, 1), draw.choice([99, 100, 2**40]), draw.randint(-1, 2)), draw.choice([None, "x"]))
            for number in draw.sample(range(40), draw.randint(1, 20))
        ]
        taken = 0
        for k, cell in cells_in(table_of(kinds, offered).cast(arrow_schema(tmp_path)), kinds).items():
            if k not in expected or cell[0] > expected[k][0]:
                expected[k] = cell
                taken += 1
        assert merges.merge(str(tmp_path), table_of(kinds, offered), list(kinds), "_version") == taken
        assert cells_of(tmp_path, kinds) == expected
    assert merges.merge(str(tmp_path), table_of(kinds, offered), list(kinds), "_version") == 0, "twice is once"


def test_zero_has_no_sign(tmp_path: Path) -> None:
    kinds = {"f": pa.float64()}
    made(tmp_path, kinds, [table_of(kinds, [((0.0,), Version(0, 1, 0), "old")])])
    assert merges.merge(str(tmp_path), table_of(kinds, [((-0.0,), Version(0, 2, 0), "new")]), ["f"], "_version") == 1
    assert DeltaTable(str(tmp_path)).to_pyarrow_table()["note"].to_pylist() == ["new"]


def test_a_file_without_a_key_of_the_batch_is_passed_over(tmp_path: Path) -> None:
    kinds, key = KEYS["a number"]
    cells = [(key(number), Version(0, 100, -1), "image") for number in range(40)]
    made(tmp_path, kinds, [table_of(kinds, cells[start : start + 10]) for start in range(0, 40, 10)])
    before = {file.path for file in files_of(DeltaTable(str(tmp_path)))}
    changed = table_of(kinds, [(key(number), Version(0, 200, 0), "new") for number in (11, 12)])
    merges.merge(str(tmp_path), changed, ["id"], "_version")
    after = files_of(DeltaTable(str(tmp_path)))
    assert len(after) == 4
    assert len(before & {file.path for file in after}) == 3
    assert sorted(file.bounds["id"] for file in after) == [(-5, 4), (5, 14), (15, 24), (25, 34)]


def test_new_keys_go_to_a_small_file(tmp_path: Path) -> None:
    kinds, key = KEYS["a number"]
    made(tmp_path, kinds, [table_of(kinds, [(key(0), Version(0, 100, -1), "image")])])
    for number in range(1, 6):
        merges.merge(str(tmp_path), table_of(kinds, [(key(number), Version(0, 200, 0), "new")]), ["id"], "_version")
    assert len(files_of(DeltaTable(str(tmp_path)))) == 1
    assert len(cells_of(tmp_path, kinds)) == 6


def test_every_row_older_than_a_truncate_is_a_tombstone(tmp_path: Path) -> None:
    kinds, key = KEYS["five columns"]
    cells = [(key(number), Version(0, 100 + number, 0), "image") for number in range(12)]
    made(tmp_path, kinds, [table_of(kinds, cells[:6]), table_of(kinds, cells[6:])])
    at, before = Version(0, 104, 0), cells_of(tmp_path, kinds)
    merges.bury(str(tmp_path), list(kinds), "_version", "_deleted", at)
    assert cells_of(tmp_path, kinds) == {k: (at, None) if cell[0] < at else cell for k, cell in before.items()}
    rows = DeltaTable(str(tmp_path)).to_pyarrow_table().filter(pc.field("_deleted"))
    assert rows["note"].null_count == len(rows) == 4


def test_another_writer_in_between_is_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds, key = KEYS["a number"]
    made(tmp_path, kinds, [table_of(kinds, [(key(0), Version(0, 100, -1), "image")])])
    changed = table_of(kinds, [(key(0), Version(0, 200, 0), "ours"), (key(1), Version(0, 200, 0), "ours")])
    act, others = merges.act, [Version(0, 300, 0), Version(0, 150, 0)]

    def beaten(table: DeltaTable, actions: Sequence[Any]) -> None:
        while others:
            theirs = others.pop()
            write_deltalake(str(tmp_path), table_of(kinds, [(key(0), theirs, "theirs")]), mode="overwrite")
            break
        act(table, actions)

    monkeypatch.setattr(merges, "act", beaten)
    assert merges.merge(str(tmp_path), changed, ["id"], "_version") == 1
    rows = {row["id"]: row["note"] for row in DeltaTable(str(tmp_path)).to_pyarrow_table().to_pylist()}
    assert rows == {-5: "theirs", -4: "ours"}
    log = "".join(entry.read_text() for entry in (tmp_path / "_delta_log").glob("*.json"))
    assert [file.name for file in tmp_path.glob("*.parquet") if file.name not in log] == [], "what lost the race is left behind"


def test_a_feature_that_files_do_not_tell_of_is_refused(tmp_path: Path) -> None:
    kinds, key = KEYS["a number"]
    made(tmp_path, kinds, [table_of(kinds, [(key(0), Version(0, 100, -1), "image")])])
    DeltaTable(str(tmp_path)).alter.add_feature(TableFeatures.DeletionVectors, allow_protocol_versions_increase=True)
    with pytest.raises(CouldNotFinish, match="beside the table feature deletionVectors"):
        merges.merge(str(tmp_path), table_of(kinds, [(key(0), Version(0, 200, 0), "x")]), ["id"], "_version")


@pytest.mark.parametrize(
    ("properties", "reason"),
    [
        ({}, None),
        ({"delta.appendOnly": "false", "delta.enableChangeDataFeed": "false"}, None),
        ({"delta.appendOnly": "true"}, "has delta.appendOnly = true"),
        ({"delta.enableChangeDataFeed": "true"}, "has delta.enableChangeDataFeed = true"),
        ({"delta.enableDeletionVectors": "true"}, "has the table feature deletionVectors"),
    ],
)
def test_check_refuses_a_table_that_a_merge_could_not_keep(
    tmp_path: Path, properties: dict[str, str | None], reason: str | None
) -> None:  # fmt: skip
    kinds, _ = KEYS["a number"]
    schema = Schema.from_arrow(table_of(kinds, []).schema)
    table = DeltaTable.create(str(tmp_path / "there"), schema, configuration=properties)
    if "delta.enableDeletionVectors" in properties:
        table.alter.add_feature(TableFeatures.DeletionVectors, allow_protocol_versions_increase=True)
    told = DeltaStore("lake", tmp_path, "test").objections("", "there", ["id"])
    assert [one.partition(" has ")[2].partition(", which")[0] for one in told] == ([] if reason is None else [reason[4:]])


@pytest.mark.parametrize("ours", [True, False], ids=["our table", "a table that was there"])
@pytest.mark.parametrize("kind", KEYS)
def test_other_readers_filter_by_a_text_that_was_merged(tmp_path: Path, kind: str, ours: bool) -> None:
    kinds, key = KEYS[kind]
    made(tmp_path, kinds, [table_of(kinds, [(key(number), Version(0, 100, -1), "image") for number in range(9)])], ours=ours)
    merges.merge(str(tmp_path), table_of(kinds, [(key(3), Version(0, 200, 0), "changed")]), list(kinds), "_version")
    table = DeltaTable(str(tmp_path))
    assert table.to_pyarrow_dataset().to_table(filter=pc.field("note") == "changed").num_rows == 1
    assert table.to_pyarrow_table(filters=[("note", "=", "image")]).num_rows == 8
    with duckdb.connect() as session:
        query = "SELECT count(*) FROM read_parquet(?) WHERE note = 'changed'"
        assert session.execute(query, [list(table.file_uris())]).fetchone() == (1,)


def test_a_commit_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds, key = KEYS["a number"]
    made(tmp_path, kinds, [table_of(kinds, [(key(0), Version(0, 100, -1), "image")])])
    synced: list[Path] = []
    monkeypatch.setattr("changeover.stores.delta.files.sync", synced.append)
    monkeypatch.setattr("changeover.stores.delta.merges.sync", synced.append)
    merges.merge(str(tmp_path), table_of(kinds, [(key(0), Version(0, 200, 0), "x")]), ["id"], "_version")
    table = DeltaTable(str(tmp_path))
    [file] = files_of(table)
    log = tmp_path / "_delta_log"
    assert synced == [tmp_path / file.path, tmp_path, log / f"{table.version():020d}.json", log]
