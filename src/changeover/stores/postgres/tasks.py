"""Tasks: what a task of Spark's does with a PostgreSQL target.

A task copies its lines into a temporary table and puts them through the gate in one transaction, again after a deadlock. A chunk's
rows and its mark in the ledger commit together, so a task that dies, is repeated, or was overtaken leaves nothing behind. An error
is yielded as data.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from changeover import failpoints
from changeover.errors import ChangeoverError, RowRefused
from changeover.position import Version
from changeover.session import connect, speaking_to
from changeover.spark.failures import failure_of
from changeover.stores.base.interface import Counts, Mark
from changeover.stores.base.taskresult import outcome, partition
from changeover.stores.postgres import gate, replica
from changeover.stores.postgres.batches import BATCH, apply_batch, change_columns, image_columns, load_batch, prepare_batch

if TYPE_CHECKING:
    import pyarrow as pa


ROWS_FAULT = ("22", "23", "44", "54000")
"""SQLSTATEs, or their classes, by which a server refuses a row for what is in it: data, constraints, a value too large to index."""

TRIES = 5
"""How often a transaction is tried that the server ends because of a deadlock."""


@dataclass(frozen=True)
class LoadTask:
    """What a Spark task does with one chunk's lines (task; once per attempt)."""

    dsn: str
    application: str
    table: gate.GatedTable
    chunks: tuple[int, ...]
    mark: Mark

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Copy, gate and mark in one transaction; a fenced-off attempt rolls back."""
        chunk = self.chunks[partition()]
        try:
            yield outcome(self.load(chunk, batches))
        except ChangeoverError as error:
            yield outcome(None, failure_of(error))

    def load(self, chunk: int, batches: Iterator[pa.RecordBatch]) -> Counts:
        """Load one chunk in one transaction."""
        started = time.monotonic()
        with (
            speaking_to(self.dsn, f"loading chunk {chunk} of {self.table.target}"),
            gated_session(self.dsn, self.application) as cursor,
        ):
            with refusing(cursor, self.table):
                prepare_batch(cursor, self.table, versions=False, keep=True)
                copy_in(cursor, image_columns(self.table), line_blocks(batches))
                cursor.connection.commit()  # Spark gives the rows once, and a deadlock may take the next transaction
                failpoints.reach("chunk-read", f"{self.table.target} {chunk}")
                counts = self._commit(cursor, chunk, started)
            failpoints.reach("target-committed", f"{self.table.target} {chunk}")
        failpoints.reach("between-chunks", f"{self.table.target} {chunk}")
        return counts

    def _commit(self, cursor: psycopg.Cursor[Any], chunk: int, started: float) -> Counts:
        """Insert, mark and commit; a batch of replay that deletes and then inserts can cross a chunk's rows in another order."""
        tries = TRIES
        while True:
            tries -= 1
            try:
                counts = self._insert(cursor, chunk, started)
                cursor.connection.commit()
                return counts
            except psycopg.errors.DeadlockDetected:
                cursor.connection.rollback()
                if not tries:
                    raise

    def _insert(self, cursor: psycopg.Cursor[Any], chunk: int, started: float) -> Counts:
        """Insert and mark; an attempt that was fenced off, or comes after its chunk was loaded, inserts nothing."""
        met: RowRefused | None = None
        counts = Counts(0, 0)
        try:
            counts = load_batch(cursor, self.table)
        except RowRefused as refused:
            met = refused  # by another row of the source, or by this very chunk, loaded before: the mark knows
        marked = self.mark.in_transaction(cursor, chunk, counts, time.monotonic() - started)
        if marked and met is None:
            return counts
        cursor.connection.rollback()
        if marked and met is not None:
            raise met
        return Counts(0, 0)


@dataclass(frozen=True)
class MergeTask:
    """What a Spark task does with one partition's changes (task; safe to repeat); not to `write` rolls back what was done."""

    dsn: str
    application: str
    table: gate.GatedTable
    reached: Version | None = None
    write: bool = True

    def __call__(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Copy and gate in one transaction, again after a deadlock with an application's write."""
        changes = list(line_blocks(batches))
        if not changes:
            return
        try:
            yield outcome(self.merge(changes))
        except ChangeoverError as error:
            yield outcome(None, failure_of(error))

    def merge(self, changes: Sequence[memoryview]) -> Counts:
        """Apply changes in one transaction; they are CSV lines of versions and columns."""
        tries = TRIES
        with speaking_to(self.dsn, f"applying changes to {self.table.target}"):
            while True:
                tries -= 1
                try:
                    with gated_session(self.dsn, self.application) as cursor, refusing(cursor, self.table):
                        prepare_batch(cursor, self.table, versions=True)
                        copy_in(cursor, change_columns(self.table), changes)
                        counts = apply_batch(cursor, self.table, self.reached)
                        if self.write:
                            cursor.connection.commit()
                        return counts
                except psycopg.errors.DeadlockDetected:
                    if not tries:
                        raise


ROOM = {"temp_buffers": "64MB", "work_mem": "64MB"}
"""A batch stays in the server's memory, where it is sorted; with the defaults a chunk goes to disk and back twice."""


@contextmanager
def gated_session(dsn: str, application: str) -> Iterator[psycopg.Cursor[Any]]:
    """Open a session for one transaction through the gate; what is not committed is rolled back."""
    with connect(dsn, application, autocommit=False, settings=ROOM) as connection:
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        replica.take(connection)
        connection.commit()  # what is set in a transaction that is rolled back is set no more
        with connection.cursor() as cursor:
            yield cursor
            connection.rollback()


OUT_OF_RANGE = "22003"
"""SQLSTATE of a number that its type can't hold, which stands in the midst of the message."""


@contextmanager
def refusing(cursor: psycopg.Cursor[Any], table: gate.GatedTable) -> Iterator[None]:
    """Turn what the server says against a row into RowRefused, which names the column and no value of it."""
    try:
        yield
    except psycopg.Error as error:
        if not (error.sqlstate or "").startswith(ROWS_FAULT):
            raise
        cursor.connection.rollback()
        message = _without_value(error.diag.message_primary or "", error.sqlstate or "")
        raise RowRefused(table.target, _column_of(cursor, table, error.diag), f"{message}, SQLSTATE {error.sqlstate}") from error


FOREIGN = re.compile("[»«„“”「」『』].*", re.DOTALL)
"""From a quotation mark on that no English message has."""


def _without_value(message: str, state: str) -> str:
    """Return what a server says, in whatever language, without the value that it repeats."""
    cut = FOREIGN.sub("", message.partition(': "')[0])
    return (re.sub(r'"[^"]*" ?', "", cut) if state == OUT_OF_RANGE else cut).rstrip(" :")


def _column_of(cursor: psycopg.Cursor[Any], table: gate.GatedTable, diagnostic: psycopg.errors.Diagnostic) -> str:
    """Return the columns that a server's refusal is about, as far as it tells."""
    names = [diagnostic.column_name] if diagnostic.column_name else []
    if copied := re.search(r"COPY changeover_batch, line \d+, column (.*)", diagnostic.context or "", re.DOTALL):
        names = [name for name in sorted(table.columns, key=len, reverse=True) if copied[1].startswith(name)][:1]
    if diagnostic.constraint_name and not names:
        names = [
            row[0]
            for row in cursor.execute(
                "SELECT a.attname FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey)"
                " WHERE c.conrelid = to_regclass(%s) AND c.conname = %s ORDER BY a.attnum",
                [table.table.as_string(cursor), diagnostic.constraint_name],
            )
        ]
        cursor.connection.rollback()
    return f"column {', '.join(names)}" if names else "a row"


@dataclass(frozen=True)
class Untaken:
    """The mark of an attempt that is to write nothing: no chunk is ever its own, so it rolls back."""

    def in_transaction(self, cursor: psycopg.Cursor[Any], chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark nothing."""
        return False

    def afterwards(self, chunk: int, counts: Counts, seconds: float) -> bool:
        """Mark nothing."""
        return False

    def identity(self, chunk: int) -> str:
        """Return a name that is no chunk's."""
        return "changeover/untaken"


def copy_in(cursor: psycopg.Cursor[Any], columns: Sequence[str], blocks: Iterable[memoryview]) -> None:
    """Send CSV lines into the batch table."""
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(BATCH, sql.SQL(", ").join(map(sql.Identifier, columns)))
    with cursor.copy(statement) as copy:
        for block in blocks:
            copy.write(block)


def line_blocks(batches: Iterable[pa.RecordBatch]) -> Iterator[memoryview]:
    """Yield the lines of each batch: Arrow keeps them end to end, so a batch is one run of bytes."""
    return (_line_bytes(batch.column(0)) for batch in batches if batch.num_rows)


def _line_bytes(lines: pa.StringArray) -> memoryview:
    import pyarrow as pa

    _, offsets, data = lines.buffers()
    ends = memoryview(offsets).cast("q") if pa.types.is_large_string(lines.type) else memoryview(offsets).cast("i")
    return memoryview(data)[ends[lines.offset] : ends[lines.offset + len(lines)]]
