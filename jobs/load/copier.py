"""The copier: pending chunks read in the kept snapshot, transformed, and loaded into each target.

A Spark job that may die at any point and be run again. Chunks that are marked in the ledger are not
repeated, and one that was written but not marked is not written twice. A row that can't be carried
over is named by key and column; its chunk stays pending, and everything else is loaded. The next
run reads that chunk in a newer snapshot, as after a lost one, in which the row may be corrected.
Its images bear v0 all the same, since its table keeps its tombstones until it is closed. When the
last chunk is in, the table is closed: the source's file is compared with the one that was prepared,
then barrier and sweep. Only a closed table may be verified or read.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg

from changeover import failpoints
from changeover.errors import (
    ChangeoverError,
    CouldNotFinish,
    RowRefused,
    SnapshotLost,
    SourceChanged,
    TableStopped,
    TextRefused,
    together,
)
from changeover.jobs.guarantee import assumptions
from changeover.jobs.guarantee.assumptions import Asked, Moment
from changeover.jobs.ledger.chunks import append_name
from changeover.jobs.ledger.ledger import Ledger, mark_loaded
from changeover.jobs.ledger.records import CLOSED, LOADED, PENDING, Stream
from changeover.jobs.load import badrow
from changeover.jobs.load.prepared import require_prepared
from changeover.jobs.source import snapshot
from changeover.jobs.source.catalog import source_table, store_columns
from changeover.jobs.source.changes import change_source
from changeover.jobs.source.snapshot import exported
from changeover.jobs.spool.table import spool_of
from changeover.jobs.transform.transform import Transform
from changeover.position import Version
from changeover.session import application_name, connect, one_row, speaking_to
from changeover.spark.failures import from_spark
from changeover.spec import Spec
from changeover.stores import open_store
from changeover.stores.base import ranges as planning
from changeover.stores.base.interface import Counts, Store
from changeover.stores.base.reader import ExportedSnapshot, KeyRange, Reading, ReadTable, read_table

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

ROWS_PER_CHUNK = 250_000
FEWEST_CHUNKS = 8
"""Even a small table gets a few chunks, so that a killed run repeats little."""

MOST_NAMED = 5
"""Bad rows, one a chunk, after which a run leaves a table: each costs a job that fails, and a wrong rule fails in every chunk."""


@dataclass(frozen=True)
class Loaded:
    """What a backfill did for one table and target."""

    source: str
    target: str
    chunks: int
    rows: int
    refused: int
    swept: int


@dataclass(frozen=True)
class LedgerMark:
    """Marks a chunk of one attempt; picklable, so that a task can mark in the transaction of its rows."""

    dsn: str
    migration: str
    source: str
    target: str
    token: int
    image: Version

    def in_transaction(self, cursor: psycopg.Cursor[Any], chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark in the transaction of the rows (task); False when a later attempt has claimed the chunk."""
        return mark_loaded(
            cursor,
            self.migration,
            self.source,
            self.target,
            chunk,
            self.token,
            (counts.offered, counts.refused),
            seconds,
        )

    def afterwards(self, chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark in a transaction of its own, after an idempotent append (task)."""
        with (
            connect(self.dsn, application_name(self.migration, "backfill")) as connection,
            connection.cursor() as cursor,
        ):
            return self.in_transaction(cursor, chunk, counts, seconds)

    def identity(self, chunk: int) -> str:
        """Return the chunk's name for idempotent appends: the same for every attempt, another for every chunk and prepare."""
        return append_name(self.migration, self.image, self.source, self.target, chunk)


def backfill(spec: Spec, spark: SparkSession, targets: Sequence[str] | None = None) -> list[Loaded]:
    """Load all pending chunks of every table into the targets and close them (driver).

    Args:
        spec: The migration's spec.
        spark: The Spark session.
        targets: The targets' names, all unless given.

    Returns:
        One a load: chunks, rows offered and refused, and rows swept.

    Raises:
        StepOrder: Prepare did not run.
        SnapshotLost: No snapshot can be imported, and none can take its place.
        TableStopped: A table was stopped.
        RowRefused: Rows can't be carried over; the other tables are done.
        LeaseHeld: Another backfill runs.
    """
    with Ledger.open(spec, "backfill") as ledger:
        prepared = require_prepared(spec, spark, ledger, "backfill")
        with ledger.lease("backfill"), ledger.recorded("backfill") as report:
            refused: list[ChangeoverError] = []
            for (source, target), transform in prepared.transforms.items():
                if targets is None or target in targets:
                    with open_store(spec, spec.targets[target], "backfill") as store:
                        store.install(transform.target, prepared.stream.image)
                        try:
                            refused += _Load(spec, spark, ledger, prepared.stream, transform, store).run(source)
                        except (RowRefused, TextRefused) as bad:  # a key that can't be planned with
                            refused.append(bad)
            if refused:
                _leave_snapshot(spec, ledger)
                raise together(refused)
            summaries = [_summary(ledger, source, target) for source, target in prepared.transforms]
            if all(load.state == CLOSED for load in ledger.loads()):
                snapshot.release(spec.source.dsn.resolve(), spec.name)
            report["loads"] = [loaded.__dict__ for loaded in summaries]
            return summaries


def _leave_snapshot(spec: Spec, ledger: Ledger) -> None:
    """Have what is pending read in a newer snapshot, in which a row may be corrected; the stream joins it to this one."""
    ledger.record_snapshot("", ledger.stream("backfill").visible)
    snapshot.release(spec.source.dsn.resolve(), spec.name)


def _summary(ledger: Ledger, source: str, target: str) -> Loaded:
    load = ledger.load(source, target)
    chunks = ledger.chunks(source, target)
    row = one_row(
        ledger.connection.execute(
            "SELECT coalesce(sum(rows), 0), coalesce(sum(refused), 0) FROM changeover.chunk"
            " WHERE migration = %s AND source = %s AND target = %s",
            [ledger.migration, source, target],
        )
    )
    return Loaded(source, target, len(chunks), int(row[0]), int(row[1]), load.swept)


@dataclass(frozen=True)
class _Load:
    """One table's load into one target."""

    spec: Spec
    spark: SparkSession
    ledger: Ledger
    stream: Stream
    transform: Transform
    store: Store

    def run(self, source: str) -> list[ChangeoverError]:
        """Plan, load what is pending, close; return what rows were refused, whose chunks are still pending."""
        state = self.ledger.load(source, self.store.name).state
        _, columns = self.ledger.source_table(source)
        if stopped := self.ledger.stopped().get(source):
            raise TableStopped(source, stopped)
        if state == PENDING:
            read = self._read_table(columns_of=store_columns(columns))
            self._plan(source, read)
            refused = self._load_pending(source, read)
            if refused:
                return refused
            self.ledger.set_state(source, self.store.name, LOADED, self.stream.epoch)
        if state in (PENDING, LOADED):
            failpoints.reach("before-close")
            with connect(self.spec.source.dsn.resolve(), application_name(self.spec.name, "backfill")) as old:
                assumptions.require(Moment.CLOSE, Asked(self.spec, old, self.ledger, source))
            swept = self.store.close(self.transform.target)
            self.ledger.set_state(source, self.store.name, CLOSED, self.stream.epoch, swept)
        return []

    def _read_table(self, columns_of: Sequence[Any]) -> ReadTable:
        schema, name = self.transform.table.source_name
        with connect(self.spec.source.dsn.resolve(), application_name(self.spec.name, "backfill")) as old:
            old_table = source_table(old, self.transform.table)
        if old_table is None:
            raise SourceChanged(f"table {self.transform.table.source}", "a table", "nothing by that name")
        return ReadTable(schema, name, tuple(columns_of), old_table.key, old_table.partitions is not None)

    def _plan(self, source: str, read: ReadTable) -> None:
        """Record the ranges once; a later run goes on with the same ones."""
        if self.ledger.chunks(source, self.store.name):
            return
        dsn = self.spec.source.dsn.resolve()
        with connect(dsn, application_name(self.spec.name, "backfill")) as old, speaking_to(dsn, f"planning chunks of {source}"):
            count = planning.chunk_count(old, read.schema, read.name, ROWS_PER_CHUNK, FEWEST_CHUNKS)
            ranges = planning.plan_ranges(old, read.schema, read.name, [c.name for c in read.key], count)
        self.ledger.record_chunks(source, self.store.name, ranges, self.stream.epoch)

    def _load_pending(self, source: str, read: ReadTable) -> list[ChangeoverError]:
        """Load every chunk that is not; one with a bad row is set aside, and its refusal returned."""
        ranges = {row.chunk: (row.lower, row.upper) for row in self.ledger.chunks(source, self.store.name)}
        planning.require_partition(source, list(ranges.values()))
        aside: dict[int, ChangeoverError] = {}
        while pending := self._pending(source, aside):
            live = self._snapshot()
            token = self.ledger.claim(source, self.store.name)  # a task that a failed job left behind marks nothing any more
            mark = LedgerMark(self.ledger.dsn, self.spec.name, source, self.store.name, token, self.stream.image)

            def rows(numbers: Sequence[int], live: ExportedSnapshot = live) -> DataFrame:
                return self._rows(read, live, [ranges[n] for n in numbers])

            try:
                with from_spark(source, "a chunk of the backfill"):
                    self.store.load(self.transform.target, pending, rows, mark)
            except (RowRefused, TextRefused) as refused:
                bad = self._bad_row(source, read, live, {ranges[n]: n for n in self._pending(source, aside)})
                if bad is None:
                    return [*aside.values(), refused]
                chunk, row = bad
                aside[chunk] = row
                if len(aside) == MOST_NAMED:
                    break
            else:
                self._require_all_loaded(source, self._pending(source, aside))
        return list(aside.values())

    def _pending(self, source: str, aside: Collection[int]) -> list[int]:
        chunks = self.ledger.chunks(source, self.store.name)
        return [row.chunk for row in chunks if row.loaded is None and row.chunk not in aside]

    def _rows(self, read: ReadTable, live: ExportedSnapshot, ranges: Sequence[KeyRange]) -> DataFrame:
        """Return what goes to the target, one partition a range."""
        dsn, application = self.spec.source.dsn.resolve(), application_name(self.spec.name, "backfill")
        moved = self.transform.only_moved() if self.store.takes_text else frozenset()
        return self.transform.images(read_table(self.spark, dsn, application, read, ranges, live, moved=moved), moved=moved)

    def _bad_row(
        self, source: str, read: ReadTable, live: ExportedSnapshot, pending: Mapping[KeyRange, int]
    ) -> tuple[int, RowRefused] | None:
        """Return the chunk of the first bad row, and its refusal: tasks begin in order, so it is one of the first that are open."""
        under_way = list(pending)[: 2 * self.spark.sparkContext.defaultParallelism]
        reading = Reading(self.spec.source.dsn.resolve(), application_name(self.spec.name, "backfill"), read, live)

        def search() -> tuple[KeyRange, RowRefused] | None:
            return badrow.in_ranges(
                self.transform, reading, under_way, lambda bounds: self._rows(read, live, [bounds]),
                lambda frame: self.store.try_rows(self.transform.target, frame),
            )  # fmt: skip

        bad = badrow.sought(source, search)
        return None if bad is None else (pending[bad[0]], bad[1])

    def _snapshot(self) -> ExportedSnapshot:
        """Return the kept snapshot, or a new one that shows at least as much: the stream brings whatever lies between the two."""
        dsn, application = self.spec.source.dsn.resolve(), application_name(self.spec.name, "backfill")
        stream = self.ledger.stream("backfill")
        try:
            return snapshot.kept(dsn, application, exported(stream))
        except SnapshotLost as lost:
            log.warning("%s; pending chunks are read in a new one", lost)

        source = change_source(self.spec)
        spool_of(self.spec, stream.epoch).proved(stream.l0, lambda durable: source.require_whole("backfill", stream, durable))
        kept = snapshot.renew(self.spec, stream.visible)
        self.ledger.record_snapshot(" ".join(one.name for one in kept), kept[0].visible)
        return kept[0]

    def _require_all_loaded(self, source: str, left: Sequence[int]) -> None:
        if left:
            raise CouldNotFinish(f"{source} into {self.store.name}: chunks {left} were claimed by another backfill: run again")
