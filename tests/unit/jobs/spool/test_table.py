"""The spool: once, in order, one format, one writer, and on stable storage before it says so."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chispa import assert_df_equality
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from changeover.errors import LeaseHeld, SourceChanged, StepOrder
from changeover.jobs.spool.events import SCHEMA, Event, Image, arrow_table
from changeover.jobs.spool.table import CHECKPOINT_EVERY, FORMAT_KEY, Spool

WHEN = 1_795_264_200_123_456


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    spool = Spool(tmp_path / "spool")
    spool.create()
    return spool


def image(row: Mapping[str, str | None] | None) -> Image | None:
    return None if row is None else (tuple(row), tuple(row.values()))


def put(lsn: int, ordinal: int = 0, **row: str | None) -> Event:
    return Event("public.follows", lsn, ordinal, "I", image(row), None, (), 7, WHEN)


def found(table: pa.Table) -> list[Event]:
    """Return the events that a table holds."""
    rows: Sequence[dict[str, Any]] = table.set_column(
        table.schema.get_field_index("committed_at"), "committed_at", table["committed_at"].cast(pa.int64())
    ).to_pylist(maps_as_pydicts="strict")
    return [Event(**{**row, "row": image(row["row"]), "key": image(row["key"]), "missing": tuple(row["missing"])}) for row in rows]


def listed(spool: Spool) -> list[dict[str, Any]]:
    """Return the files that the log names."""
    files: list[dict[str, Any]] = pa.table(spool._latest().get_add_actions(flatten=True)).to_pylist()
    return files


def test_a_new_spool_is_empty_and_made_once(spool: Spool) -> None:
    spool.create()
    assert spool.end() == 0
    assert spool.events().num_rows == 0


def test_a_spool_knows_where_its_stream_begins(spool: Spool, tmp_path: Path) -> None:
    assert spool.begin() == 0
    later = Spool(tmp_path / "later")
    later.create(7 << 32)
    later.create(9 << 32)  # there already
    assert Spool(tmp_path / "later").begin() == 7 << 32


def test_an_event_comes_back_as_it_was(spool: Spool) -> None:
    row, key = image({"a": "1", "b": None, "c": ""}), image({"a": "0"})
    whole = Event("public.follows", 16, 2, "U", row, key, ("d",), 7, WHEN)
    marker = Event("", 16, 4, "M", None, None, (), 7, WHEN, "hello")
    spool.append([whole, marker], 24)
    assert found(spool.events()) == [whole, marker]


def test_an_append_that_was_made_before_is_left_out(spool: Spool) -> None:
    spool.append([put(10)], 18)
    spool.append([put(10)], 18)
    Spool(spool.path).append([put(5), put(10)], 17)
    assert spool.end() == 18
    assert spool.events().num_rows == 1


def test_a_part_of_a_transaction_is_held_but_not_seen_before_the_rest(spool: Spool) -> None:
    spool.append([put(10), put(20, 0), put(20, 2)], 18)
    assert (spool.end(), spool.held()) == (18, (20, 2))
    assert found(spool.events()) == [put(10)]
    assert spool.outline(0, 2**62).num_rows == 1
    spool.append([put(20, 0), put(20, 2)], 18)  # sent again
    Spool(spool.path).append([put(20, 4)], 18)
    assert spool.held() == (20, 4)
    spool.append([put(20, 6)], 28)
    assert (spool.end(), spool.held()) == (28, (28, -2))
    assert found(spool.events()) == [put(10), *(put(20, ordinal) for ordinal in (0, 2, 4, 6))]


def test_an_empty_append_moves_the_end_alone(spool: Spool) -> None:
    spool.append([], 500)
    assert (Spool(spool.path).end(), spool.events().num_rows) == (500, 0)


def test_events_are_chosen_by_commit_lsn_and_sorted(spool: Spool) -> None:
    spool.append([put(10, 2), put(10, 0), put(20)], 28)
    spool.append([put(30)], 38)
    assert [(row["lsn"], row["ordinal"]) for row in spool.events(10, 30).to_pylist()] == [(10, 0), (10, 2), (20, 0)]
    assert spool.events(11, 20).num_rows == 0


def test_small_files_become_one_and_nothing_else_changes(spool: Spool) -> None:
    reader = Spool(spool.path)
    for lsn in range(10, 130, 10):
        spool.append([put(lsn, 0, a="x"), put(lsn + 1, 0), put(lsn + 1, 2)], lsn + 1)
    before, end, held = reader.events(), reader.end(), reader.held()
    actions = reader._latest().get_add_actions(flatten=True)
    assert spool.compact() == 12
    assert spool.compact() == 0
    assert (reader.events(), reader.end(), reader.held()) == (before, end, held)
    (file,) = listed(spool)
    assert (file["num_records"], file["min.lsn"], file["max.lsn"]) == (36, 10, 121)
    assert sum(pq.read_table(spool.path / path).num_rows for path in pa.table(actions)["path"].to_pylist()) == 36, "still readable"
    spool.append([put(121, 4)], 130)
    assert Spool(spool.path).events().num_rows == 37


@pytest.mark.heavy
def test_an_event_is_written_a_few_times_at_most(spool: Spool) -> None:
    written, files = 0, {}
    for number in range(1, 401):
        spool.append([put(10 * number)] * (1 + number % 7), 10 * number + 5)
        if number % 10 == 0:
            appended = {file["path"] for file in listed(spool)}
            spool.compact()
            files = {file["path"]: file["num_records"] for file in listed(spool)}
            written += sum(count for path, count in files.items() if path not in appended)
    assert sum(files.values()) == spool.events().num_rows == sum(1 + number % 7 for number in range(1, 401))
    assert len(files) < 15, "a few sizes, instead of one for each append"
    assert written < 8 * spool.events().num_rows, "about the logarithm of 40 merges; all files each time would be 20"


def test_large_files_are_left_alone(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("changeover.jobs.spool.compaction.SMALL_EVENTS", 5)
    for lsn in (10, 20, 30):
        spool.append([put(lsn, 2 * n) for n in range(6 if lsn == 20 else 2)], lsn + 5)
    assert spool.compact() == 2
    assert sorted(file["num_records"] for file in listed(spool)) == [4, 6]
    assert [row["lsn"] for row in spool.events().to_pylist()] == [10] * 2 + [20] * 6 + [30] * 2


def test_files_left_behind_go_when_no_reader_can_have_them(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    orphan = spool.path / "part-orphan.parquet"
    orphan.touch()
    for lsn in range(10, 60, 10):
        spool.append([put(lsn)], lsn + 8)
    os.utime(orphan, (0, 0))
    for path in spool.path.glob("part-*"):
        os.utime(path, (0, 0))  # written long ago, but merged just now
    spool.compact()
    assert len(list(spool.path.glob("*.parquet"))) == 6
    assert not orphan.exists()
    monkeypatch.setattr("changeover.jobs.spool.table.RETAIN_SECONDS", -1)
    spool.compact()
    (left,) = spool.path.glob("*.parquet")
    assert left.name in [file["path"] for file in listed(spool)]
    assert spool.events().num_rows == 5


def test_a_merge_is_as_durable_as_an_append(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    for lsn in (10, 20):
        spool.append([put(lsn)], lsn + 8)
    old = {path.name for path in spool.path.glob("*.parquet")}
    synced: list[tuple[str, bool]] = []
    entry = spool.path / "_delta_log" / f"{3:020d}.json"
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append((os.readlink(f"/proc/self/fd/{fd}"), entry.exists())))
    spool.compact()
    (data,) = (path for path in spool.path.glob("*.parquet") if path.name not in old)
    root = spool.path
    expected = [(data, False), (root, False), (entry, True), (root / "_delta_log", True)]
    assert synced == [(str(path), committed) for path, committed in expected]


@pytest.mark.heavy
def test_old_log_entries_go_and_a_reader_that_slept_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("changeover.jobs.spool.table.LOG_RETENTION", "interval 0 seconds")
    spool, reader = Spool(tmp_path / "spool"), Spool(tmp_path / "spool")
    spool.create()
    spool.append([put(5)], 8)
    assert reader.end() == 8
    for number in range(1, 3 * CHECKPOINT_EVERY):
        spool.append([put(10 * number)], 10 * number + 8)
    assert len(list((spool.path / "_delta_log").glob("*.json"))) < 2 * CHECKPOINT_EVERY
    end = spool.end()
    assert reader.end() == Spool(spool.path).end() == end
    assert reader.events().num_rows == 3 * CHECKPOINT_EVERY
    for ordinal in range(0, 2 * CHECKPOINT_EVERY, 2):  # a part on both sides of a checkpoint
        spool.append([put(10 * end, ordinal)], end)
        assert Spool(spool.path).held() == reader.held() == (10 * end, ordinal)


@pytest.mark.heavy
def test_the_end_and_the_events_survive_checkpoints(spool: Spool) -> None:
    reader = Spool(spool.path)
    for lsn in range(10, 10 * (CHECKPOINT_EVERY + 8), 10):
        spool.append([put(lsn)], lsn + 8)
        assert reader.end() == lsn + 8
    assert (spool.path / "_delta_log" / "_last_checkpoint").exists()
    assert Spool(spool.path).end() == reader.end()
    assert Spool(spool.path).events().num_rows == CHECKPOINT_EVERY + 7


def test_a_second_writer_is_refused(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Spool(spool.path)
    write = Spool._write

    def write_late(self: Spool, batch: list[Event]) -> object:
        monkeypatch.undo()
        other.append([put(10)], 18)
        return write(self, batch)

    monkeypatch.setattr(Spool, "_write", write_late)
    with pytest.raises(LeaseHeld, match="another capture"):
        spool.append([put(10), put(20)], 28)
    assert (spool.end(), spool.events().num_rows) == (18, 1)


def test_everything_is_on_stable_storage_in_order(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    entry = spool.path / "_delta_log" / f"{1:020d}.json"

    def record(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), entry.exists()))

    monkeypatch.setattr(os, "fsync", record)
    spool.append([put(10)], 18)
    (data,) = spool.path.glob("*.parquet")
    root = spool.path
    expected = [(data, False), (root, False), (entry, True), (root / "_delta_log", True)]
    assert synced == [(str(path), committed) for path, committed in expected]


def test_without_a_spool_prepare_is_named(tmp_path: Path) -> None:
    with pytest.raises(StepOrder, match="changeover prepare"):
        Spool(tmp_path / "none").end()


def test_another_format_is_refused(tmp_path: Path) -> None:
    DeltaTable.create(tmp_path / "spool", SCHEMA, configuration={FORMAT_KEY: "999"}, raise_if_key_not_exists=False)
    with pytest.raises(SourceChanged, match=r"spool format .* is 999"):
        Spool(tmp_path / "spool").create()


def test_spark_reads_the_same(spool: Spool, spark: SparkSession) -> None:
    spool.append([put(10, 0, a="1", b=None), put(20, 0, a="2")], 28)
    spool.append([put(30, 0, a="3")], 38)
    expected = spark.createDataFrame(
        [(10, {"a": "1", "b": None}, None, []), (20, {"a": "2"}, None, []), (30, {"a": "3"}, None, [])],
        "lsn bigint, row map<string, string>, key map<string, string>, missing array<string>",
    )
    read = spark.read.format("delta").load(str(spool.path)).orderBy("lsn").select(expected.columns)
    assert_df_equality(read, expected, ignore_nullable=True)


def test_a_batch_reaches_so_far_and_splits_no_transaction(spool: Spool) -> None:
    for lsn in range(10, 100, 10):
        spool.append([put(lsn, 2 * n) for n in range(5)], lsn + 5)
    spool.append([put(100, 2 * n) for n in range(3)], 95)
    spool.append([put(100, 2 * n) for n in range(3, 6)], 105)
    assert spool.reach(0, 2**62, 12, 1 << 30) == 31, "three files, and no transaction in part"
    assert spool.reach(31, 2**62, 1, 1 << 30) == 41
    assert spool.reach(0, 2**62, 1000, 1) == 11, "bytes count too"
    assert spool.reach(95, 2**62, 1, 1 << 30) == 101, "a transaction in two files"
    assert spool.reach(0, 25, 1000, 1 << 30) == 25
    assert spool.reach(105, 2**62, 1, 1 << 30) == 105, "nothing is left"
    parts = list(spool.parts(20, 101, "public.follows", 12, 1 << 30))
    assert [len(part) for part in parts] == [15, 15, 13, 3]
    assert sorted({lsn for part in parts for lsn in part["lsn"].to_pylist()}) == [*range(20, 101, 10)]
    assert len(list(spool.parts(20, 101, "public.follows", 1000, 1))) == 10, "each file is large enough for a part of its own"
    assert not list(spool.parts(0, 2**62, "public.other", 12, 1 << 30))


texts = st.text(st.characters(exclude_categories=["Cs"]))
maps = st.none() | st.dictionaries(texts, st.none() | texts, max_size=4)
events = st.builds(
    Event,
    relation=texts,
    lsn=st.integers(0, 2**62),
    ordinal=st.integers(-1, 2**40),
    op=st.sampled_from("IUDTMR"),
    row=maps.map(image),
    key=maps.map(image),
    missing=st.lists(texts, max_size=3).map(tuple),
    xid=st.integers(0, 2**32),
    committed_at=st.just(WHEN),
    note=st.none() | texts,
)


@given(st.lists(events, min_size=1, max_size=6))
def test_any_event_goes_through_arrow_unchanged(batch: list[Event]) -> None:
    assert found(arrow_table(batch)) == batch
