"""The real stores as targets of a case: a gated PostgreSQL table, and a Delta table that takes the batches of all cases together.

Cases share a table in which each has keys of its own, so that a run makes one database and few MERGEs. What a chunk's task and a
batch do is the product's own: `LoadTask`, `apply_batch`, the gate's function, `AppendTask`, `last_of_each_key`,
`Transform.changes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pyarrow as pa
from psycopg import sql
from pyspark.sql import SparkSession

from changeover.jobs.apply.batch import last_of_each_key
from changeover.jobs.spool.events import DELETE, SCHEMA, UPDATE
from changeover.jobs.transform.derivation import derivations
from changeover.jobs.transform.transform import Transform
from changeover.position import Version, format_lsn
from changeover.session import Connection
from changeover.spec import Table
from changeover.stores.base.interface import Counts, TargetTable
from changeover.stores.base.pgtypes import Column
from changeover.stores.delta.appends import DELETED, VERSION, AppendTask
from changeover.stores.delta.store import DeltaStore
from changeover.stores.postgres import batches, gate
from changeover.stores.postgres.tasks import LoadTask
from tests.cases.playing import offers_of
from tests.cases.reading import V0, VALUES, Cells, Event, Image, Key
from tests.model.gate import Cell

KEY = ("of_case", "k1", "k2")
NAMES = (*KEY, "v1", "v2", "v3")
TABLE = gate.GatedTable("public", "cases", KEY, NAMES)
DDL = f"""
CREATE TABLE cases (of_case text, k1 text, k2 text, v1 text, v2 text, v3 text, PRIMARY KEY ({", ".join(KEY)}));
CREATE TABLE marks (of_case text, chunk integer, PRIMARY KEY (of_case, chunk));
"""

COLUMNS = tuple(Column(name, "text", "string", name in KEY) for name in NAMES)
DELTA = TargetTable("public", "cases", COLUMNS, KEY)
MOVED = Table("public.cases", "public.cases", KEY)
TRANSFORM = Transform(MOVED, COLUMNS, DELTA, derivations(MOVED, COLUMNS), COLUMNS[: len(KEY)])
SPOOLED = pa.schema([SCHEMA.field(name) for name in ("lsn", "ordinal", "op", "row", "key", "missing", "xid")])


class Died(Exception):
    """A loader dies here."""


@dataclass(frozen=True)
class Mark:
    """A chunk's mark, in a table as the ledger's is; one that dies marks nothing."""

    of_case: str
    dies: bool

    def in_transaction(self, cursor: psycopg.Cursor[Any], chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark in the rows' transaction, once."""
        if self.dies:
            return False
        return cursor.execute("INSERT INTO marks VALUES (%s, %s) ON CONFLICT DO NOTHING", [self.of_case, chunk]).rowcount == 1

    def afterwards(self, chunk: int, counts: Counts, seconds: float) -> bool:
        """Die after the append, or let it be."""
        if self.dies:
            raise Died
        return True

    def identity(self, chunk: int) -> str:
        """Return the chunk's application id."""
        return f"changeover/cases/{self.of_case}/{chunk}"


@dataclass
class Gate:
    """One case's keys in the gated table; batches as replay offers them, or each change alone as an application does."""

    connection: Connection
    dsn: str
    of_case: str
    one_by_one: bool = False

    def load(self, chunk: int, images: Mapping[Key, Image], dies: bool) -> None:
        """Load a chunk by what a Spark task does with its lines."""
        lines = pa.array([_csv((self.of_case, *key, *row)) for key, row in images.items()], pa.string())
        task = LoadTask(self.dsn, "changeover:tests:cases", TABLE, (chunk,), Mark(self.of_case, dies))
        task.load(chunk, iter([pa.record_batch([lines], names=["line"])]))

    def offer(self, events: Sequence[Event]) -> None:
        """Offer what the events say."""
        rows = [
            (version.epoch, format_lsn(version.lsn), version.ordinal, image is None, self.of_case, *key, *_values(image))
            for key, (version, image) in offers_of(events, self.one_by_one)
        ]
        if self.one_by_one:
            with self.connection.cursor() as cursor:
                cursor.executemany(
                    'SELECT changeover."gate_public.cases"(%s, %s, %s, %s, ROW(%s, %s, %s, %s, %s, %s)::cases)', rows
                )
            return
        with self.connection.transaction(), self.connection.cursor() as cursor:
            batches.prepare_batch(cursor, TABLE, versions=True)
            places = sql.SQL(", ").join([sql.Placeholder()] * (len(NAMES) + 4))
            cursor.executemany(sql.SQL("INSERT INTO {} VALUES ({})").format(batches.BATCH, places), rows)
            batches.apply_batch(cursor, TABLE)

    def cells(self) -> Cells:
        """Return the cells: versions from their table, images from the table."""
        found = self.connection.execute(
            "SELECT k1, k2, t._changeover_epoch, t._changeover_lsn - '0/0'::pg_lsn, t._changeover_ordinal,"
            " t._changeover_deleted, c.of_case IS NOT NULL, v1, v2, v3"
            ' FROM cases c FULL JOIN changeover."versions_public.cases" t USING (of_case, k1, k2) WHERE of_case = %s',
            [self.of_case],
        ).fetchall()
        cells: Cells = {}
        for k1, k2, epoch, lsn, ordinal, deleted, there, *values in found:
            assert there is not deleted, f"{k1} {k2}: a tombstone has no row, and a live cell has one"
            version = V0 if epoch is None else Version(epoch, int(lsn), ordinal)
            cells[k1, k2] = Cell(version, tuple(values) if there else None)
        return cells


def _values(image: object | None) -> Image:
    return image if isinstance(image, tuple) else (None,) * VALUES


def _csv(values: Iterable[str | None]) -> str:
    return ",".join("" if value is None else '"' + value.replace('"', '""') + '"' for value in values) + "\n"


@dataclass
class Lake:
    """The one Delta table: chunks are appended when a case asks, batches wait, since nothing merges before the last append."""

    store: DeltaStore
    waiting: list[list[tuple[str, Event]]] = field(default_factory=list)

    def merge_all(self, spark: SparkSession) -> None:
        """Offer the first batches of all cases in one MERGE, then the second ones, and so on."""
        for batch in self.waiting:
            events = pa.Table.from_pylist([_spooled(of_case, event) for of_case, event in batch], SPOOLED)
            frame = spark.createDataFrame(last_of_each_key(events, KEY, NAMES)).coalesce(1)
            self.store.merge(DELTA, TRANSFORM.changes(frame, 0).coalesce(1))

    def cells(self, spark: SparkSession) -> dict[str, Cells]:
        """Return each case's cells."""
        cells: dict[str, Cells] = {}
        for row in spark.read.format("delta").load(str(self.store.path("cases"))).collect():
            of_case, k1, k2, *values = [row[name] for name in NAMES]
            held = cells.setdefault(of_case, {})
            assert (k1, k2) not in held, f"{of_case}: two rows of {k1} {k2}"
            held[k1, k2] = Cell(Version(*row[VERSION]), None if row[DELETED] else tuple(values))
        return cells


@dataclass
class LakeCase:
    """One case's keys in the Delta table."""

    lake: Lake
    of_case: str
    batches: int = 0

    def load(self, chunk: int, images: Mapping[Key, Image], dies: bool) -> None:
        """Append a chunk as a Spark task does."""
        rows = [(self.of_case, *key, *row) for key, row in images.items()]
        columns = [pa.array([row[place] for row in rows], pa.string()) for place in range(len(NAMES))]
        task = AppendTask(str(self.lake.store.path("cases")), KEY, KEY, (chunk,), V0, Mark(self.of_case, dies))
        with suppress(Died):
            task.append(chunk, iter([pa.record_batch(columns, names=list(NAMES))]))

    def offer(self, events: Sequence[Event]) -> None:
        """Put a batch in its line."""
        while len(self.lake.waiting) <= self.batches:
            self.lake.waiting.append([])
        self.lake.waiting[self.batches] += [(self.of_case, event) for event in events]
        self.batches += 1


def _spooled(of_case: str, event: Event) -> dict[str, Any]:
    """Return an event as the spool has it."""

    def named(key: Key) -> dict[str, str]:
        return dict(zip(KEY, (of_case, *key), strict=True))

    _, lsn, ordinal = event.version
    found: dict[str, Any] = {"lsn": lsn, "ordinal": ordinal, "missing": [], "xid": 7}
    if event.image is None:
        return {**found, "op": DELETE, "key": named(event.key)}
    row = {**named(event.key), **dict(zip(NAMES[len(KEY) :], event.image, strict=True))}
    return {**found, "op": UPDATE, "row": row, "key": named(event.old_key) if event.old_key else None}


def lake_at(store: DeltaStore) -> Lake:
    """Make the table."""
    store.create(DELTA)
    store.install(DELTA, V0)
    return Lake(store)
