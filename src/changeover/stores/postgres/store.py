"""PostgreSQL as a target: chunks and batches by COPY into a temporary table, then through the gate, in one transaction.

Spark's tasks format rows as CSV for COPY (`copytext`) and hand the bytes on (`tasks`); the statements of `gate` decide. What is
read back, for verification, is one exported snapshot, held open by a session of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psycopg
from psycopg import sql

from changeover.errors import SnapshotLost
from changeover.names import NAME_BYTES, chosen, nth
from changeover.position import Version, format_lsn
from changeover.session import Connection, application_name, connect, one_row, server_name, settled, speaking_to, wal_position
from changeover.spark.failures import raise_failures
from changeover.spec import Target
from changeover.stores.base.fits import holds
from changeover.stores.base.interface import LSN, VERSION_COLUMNS, Collected, Counts, Frozen, Mark, TargetTable
from changeover.stores.base.pgtypes import Column, source_type
from changeover.stores.base.ranges import plan_ranges
from changeover.stores.base.reader import ExportedSnapshot, Reading, ReadTable, Taken, read_table
from changeover.stores.base.statements import CLOSE, Part
from changeover.stores.base.taskresult import OUTCOME
from changeover.stores.postgres import garbage, gate, refusal, replica
from changeover.stores.postgres import truncate as truncating
from changeover.stores.postgres.batches import BATCH, OWNED, WIDEST, change_columns, image_columns, prepare_batch
from changeover.stores.postgres.tasks import LoadTask, MergeTask, Untaken, copy_in, gated_session
from changeover.stores.tables import objections as objecting

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession


PASSING = "pg_temp"
"""The schema of a session's temporary tables."""

BATCHES_PER_RUN = 8
"""Transactions of a collection after which replay goes on: its lag, and a fence that waits for the lease, do not notice."""


class PostgresStore:
    """A PostgreSQL target of one migration, with a session of its own for the driver's statements."""

    merges_while_loading = True
    takes_text = True

    def __init__(self, name: str, dsn: str, migration: str, step: str, connection: Connection) -> None:
        self.name = name
        self.dsn = dsn
        self.application = application_name(migration, step)
        self.connection = connection

    @classmethod
    @contextmanager
    def open(cls, target: Target, migration: str, step: str) -> Iterator[Self]:
        """Connect for a step.

        Args:
            target: The target's section of the spec.
            migration: The migration's name.
            step: The step, which names the session.

        Yields:
            The store, whose session ends with the block.

        Raises:
            ServerUnavailable: The server can't be reached.
            SecretMissing: The environment variable of the DSN is not set.
        """
        dsn = target.dsn_value
        with connect(dsn, application_name(migration, step)) as connection:
            replica.take(connection)
            yield cls(target.name, settled(dsn, connection), migration, step, connection)

    def columns(self, schema: str, name: str) -> tuple[Column, ...] | None:
        """Return the table's columns, generated ones left out; None when there is no such table."""
        return catalogue_columns(self.connection, schema, name)

    def type_of(self, column: Column) -> str:
        """Return a column's type by the name that this kind of store has for it."""
        return column.type

    def holds(self, source: Column, target: Column) -> bool:
        """Return whether a column of a table here holds every value of a source column, carried as it is."""
        return target.spark_type != "" and holds(source.type, target.type)

    def misfits(self, table: str, names: Sequence[str], *, owned: bool = False) -> list[str]:
        """Return which names are too long for PostgreSQL, which would cut them, and whether there are too many columns."""
        reasons = [
            f"target table {table} would have the column {name}, whose name is too long: {NAME_BYTES} bytes at most"
            for name in names
            if len(name.encode()) > NAME_BYTES
        ]
        widest = WIDEST - len(OWNED) * owned
        if len(names) > widest:
            reasons.append(
                f"target table {table} would be filled in {len(names):,} columns, and {widest:,} is the most that a batch"
                f" holds beside its versions{' and the keys of their rows' * owned}: leave columns out by `drop`"
            )
        return reasons

    def objections(self, schema: str, name: str, key: Sequence[str]) -> list[str]:
        """Return what stands against the relation as a target: its key, and whatever acts by itself when rows are written."""
        return [f"target {self.name}: {reason}" for reason in objecting.objections(self.connection, schema, name, key)]

    def remarks(self, schema: str, name: str) -> list[str]:
        """Return that a crash would empty the table, where it is unlogged."""
        return [f"target {self.name}: {remark}" for remark in objecting.remarks(self.connection, schema, name)]

    def has_rows(self, schema: str, name: str) -> bool:
        """Return whether the table has any row."""
        query = sql.SQL("SELECT EXISTS (SELECT FROM {})").format(sql.Identifier(schema, name))
        with speaking_to(self.dsn, f"looking into {schema}.{name}"):
            row = self.connection.execute(query).fetchone()
        return bool(row and row[0])

    def create(self, table: TargetTable) -> None:
        """Create the table with its primary key."""
        with speaking_to(self.dsn, f"creating {table}"):
            self.connection.execute(_creation(table))

    def install(self, table: TargetTable, image: Version) -> None:
        """Install the gate; idempotent."""
        with speaking_to(self.dsn, f"installing the gate of {table}"):
            gate.install(self.connection, replace(self.gated(table), owned=table.owned), image)

    def gated(self, table: TargetTable) -> gate.GatedTable:
        """Return the table as the gate's statements need it.

        Args:
            table: The target table.

        Returns:
            The gated table, as the catalogue has it now.
        """
        loose = gate.loose_columns(self.connection, table.schema, table.name, table.key)
        gated = gate.GatedTable(table.schema, table.name, table.key, table.names, loose)
        return replace(gated, owned=table.owned and gate.has_owners(self.connection, gated))

    def load(self, table: TargetTable, chunks: Sequence[int], read: Callable[[Sequence[int]], DataFrame], mark: Mark) -> None:
        """Load all chunks in one Spark job, a task a chunk."""
        from changeover.stores.postgres.copytext import copy_lines

        gated = self.gated(table)
        lines = copy_lines(chosen(read(chunks), image_columns(gated)))
        task = LoadTask(self.dsn, self.application, gated, tuple(chunks), mark)
        raise_failures(row.failure for row in lines.mapInArrow(task, OUTCOME).collect())

    def try_rows(self, table: TargetTable, rows: DataFrame) -> None:
        """Put one partition of images through the gate by an attempt that no chunk is marked for, so it is rolled back."""
        self.load(table, [0], lambda _: rows.coalesce(1), Untaken())

    def close(self, table: TargetTable) -> int:
        """Close by `statements.CLOSE`: barrier, then sweep; return how many ghosts it removed."""
        with speaking_to(self.dsn, f"closing {table}"):
            steps = {Part.LOCK_EXCLUSIVE: self._barrier, Part.SWEEP: self._sweep}
            return sum(steps[part](self.gated(table)) for ((part,),) in CLOSE)

    def _barrier(self, table: gate.GatedTable) -> int:
        return gate.barrier(self.connection, table, server_name(self.dsn))

    def _sweep(self, table: gate.GatedTable) -> int:
        with truncating.alone(self.connection, table):
            return gate.sweep(self.connection, table)

    def try_changes(self, table: TargetTable, changes: DataFrame) -> None:
        """Put changes through the gate in a transaction that is rolled back."""
        self._merge(table, changes.coalesce(1), write=False)

    def merge(self, table: TargetTable, changes: DataFrame, reached: Version | None = None) -> Counts:
        """Offer changes through the gate, a transaction a partition; partitions must not share a key.

        With `reached` it is one transaction, whose position is the gate.
        """
        return self._merge(table, changes, reached)

    def _merge(self, table: TargetTable, changes: DataFrame, reached: Version | None = None, *, write: bool = True) -> Counts:
        from changeover.stores.postgres.copytext import copy_lines

        if reached is not None:
            changes = changes.coalesce(1)
        gated = self.gated(table)
        lines = copy_lines(chosen(changes, change_columns(gated)), lsn_columns=(nth(VERSION_COLUMNS.index(LSN)),))
        task = MergeTask(self.dsn, self.application, gated, reached, write)
        rows = lines.mapInArrow(task, OUTCOME).collect()
        raise_failures(row.failure for row in rows)
        return Counts(sum(row.offered for row in rows), sum(row.taken for row in rows))

    def pass_on(self, table: TargetTable, changes: pa.Table, reached: Version | None = None, *, write: bool = True) -> Counts:
        """Offer changes as texts through the gate, in one transaction of this process: no task, no JVM.

        Args:
            table: The target table.
            changes: One change a key, its values as texts.
            reached: Up to which version they are complete; None promises nothing.
            write: Whether the rows are written; else what was done is rolled back.

        Returns:
            How many changes were offered, taken and refused.

        Raises:
            ServerUnavailable: The store can't be reached.
            RowRefused: A row can't be in the table.
        """
        import pyarrow as pa
        from pyarrow import csv

        lines = pa.BufferOutputStream()
        csv.write_csv(changes, lines, csv.WriteOptions(include_header=False, quoting_style="all_valid"))
        task = MergeTask(self.dsn, self.application, self.gated(table), reached, write)
        return task.merge([memoryview(lines.getvalue())])

    def truncate(self, table: TargetTable, version: Version) -> None:
        """Raise the floor, then delete what is older, in batches."""
        with speaking_to(self.dsn, f"truncating {table}"):
            truncating.truncate(self.connection, self.gated(table), version, server_name(self.dsn))

    def row_versions(self, table: TargetTable) -> int:
        """Return the server's own estimate of the row versions."""
        return garbage.row_versions(self.connection, self.gated(table))

    def collect(self, table: TargetTable, upto: Version, start: int) -> Collected:
        """Collect row versions by `statements.COLLECT`, in a run of about a second."""
        with speaking_to(self.dsn, f"collecting row versions of {table}"):
            return garbage.collect(
                self.connection, self.gated(table), upto, server_name(self.dsn), block=start, batches=BATCHES_PER_RUN
            )

    @contextmanager
    def freeze(
        self, spark: SparkSession, tables: Sequence[TargetTable], parts: int, taken: Taken | None = None
    ) -> Iterator[Callable[[TargetTable], Frozen]]:  # fmt: skip
        """Hold one exported REPEATABLE READ snapshot of all the tables open; the position is the insert LSN read inside it."""
        reads = {table: self._read(table) for table in tables}
        with freeze(spark, self.dsn, self.application, list(reads.values()), parts, taken) as hold:
            yield lambda table: hold(reads[table])

    def _read(self, table: TargetTable) -> ReadTable:
        """Return a table as readers take it."""
        key = tuple(column for name in table.key for column in table.columns if column.name == name)
        row = self.connection.execute(
            "SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass(%s)",
            [sql.Identifier(table.schema, table.name).as_string(self.connection)],
        ).fetchone()
        return ReadTable(table.schema, table.name, table.columns, key, partitioned=bool(row and row[0]))

    @contextmanager
    def rehearsing(
        self, spark: SparkSession, table: TargetTable, scratch: Path, images: DataFrame, changes: DataFrame
    ) -> Iterator[DataFrame | None]:
        """COPY no line into batches of the table's shape, which are rolled back, and read no row of it."""
        from changeover.stores.postgres.copytext import copy_lines

        versioned = (*VERSION_COLUMNS, *table.names)
        with speaking_to(self.dsn, f"copying no row into {table}"), gated_session(self.dsn, self.application) as cursor:
            shape = self._shape(cursor, table)
            for frame, names in ((images, table.names), (changes, versioned)):
                lines = copy_lines(chosen(frame, names), lsn_columns=(nth(versioned.index(LSN)),) if names is versioned else ())
                prepare_batch(cursor, shape, versions=names is versioned)
                copy_in(cursor, names, [memoryview(row.line.encode()) for row in lines.collect()])
                cursor.execute(sql.SQL("DROP TABLE {}").format(BATCH))
        if shape.schema != PASSING:
            with self.freeze(spark, [table], 1) as hold:
                rows = hold(table).frame([])
                rows.collect()
                yield rows
        else:
            with freeze(spark, self.dsn, self.application, [SERVER], 1) as hold_server:
                hold_server(SERVER).frame([]).collect()
            yield None

    def _shape(self, cursor: psycopg.Cursor[Any], table: TargetTable) -> gate.GatedTable:
        """Return the table, or one like it for this transaction where it is not there yet."""
        if self.columns(table.schema, table.name) is not None:
            return self.gated(table)
        shape = replace(table, schema=PASSING, name="changeover_rehearsal")
        cursor.execute(_creation(shape))
        return self.gated(shape)

    def begin_anew(self, table: TargetTable, image: Version, appended: Sequence[str]) -> None:
        """Empty the table and its row versions under a new floor; a chunk of an earlier epoch has lost its mark in the ledger."""
        with speaking_to(self.dsn, f"emptying {table}"):
            gate.begin_anew(self.connection, self.gated(table), image, server_name(self.dsn))

    def finalize(self, table: TargetTable) -> None:
        """Remove the gate, its floor, its tombstones and a refusal; the table and its rows stay."""
        with speaking_to(self.dsn, f"removing the gate of {table}"):
            gate.remove(self.connection, table.schema, table.name)
            refusal.remove(self.connection, table.schema, table.name)

    def abort(self, table: TargetTable, created: bool) -> None:
        """Remove the gate, and the table where prepare created it."""
        self.finalize(table)
        if created:
            with speaking_to(self.dsn, f"dropping {table}"):
                self.connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(table.schema, table.name)))


def _creation(table: TargetTable) -> sql.Composed:
    """Compose the statement that creates a table."""
    columns = sql.SQL(", ").join(
        sql.SQL("{} {}{}").format(
            sql.Identifier(column.name),
            sql.SQL(column.type),  # a name that format_type or our own table printed
            sql.SQL(" NOT NULL" if column.not_null or column.name in table.key else ""),
        )
        for column in table.columns
    )
    key = sql.SQL(", ").join(sql.Identifier(name) for name in table.key)
    return sql.SQL("CREATE TABLE {} ({}, PRIMARY KEY ({}))").format(sql.Identifier(table.schema, table.name), columns, key)


SERVER = ReadTable("pg_catalog", "pg_class", (Column("relpages", "integer", "int"),), (Column("relpages", "integer", "int"),))
"""A table that every server has, read where only the session is asked for."""


@contextmanager
def freeze(
    spark: SparkSession, dsn: str, application: str, tables: Sequence[ReadTable], parts: int, taken: Taken | None = None
) -> Iterator[Callable[[ReadTable], Frozen]]:  # fmt: skip
    """Hold one state of tables in PostgreSQL, by two sessions however many they are (driver).

    What it yields plans a table's ranges in the same snapshot, and raises what stands against that
    table alone.

    Args:
        spark: The Spark session.
        dsn: The store's DSN.
        application: The sessions' name in pg_stat_activity.
        tables: The tables.
        parts: Into how many ranges a table is divided at most.
        taken: What takes the snapshot, whose holder outlives the block; None takes one of now.

    Yields:
        What plans one of the tables.

    Raises:
        ServerUnavailable: The store can't be reached.
    """
    with connect(dsn, application) as watch:
        same_file = {table: file_watch(watch, table) for table in tables}
        with exporting(dsn, application) if taken is None else nullcontext(taken()) as (holder, snapshot):
            position = format_lsn(wal_position(holder))
            yield lambda table: frozen_at(spark, dsn, application, table, snapshot, position, holder, parts, same_file[table])


FILES = """
SELECT oid::bigint, pg_relation_filenode(oid)::bigint FROM (
    SELECT to_regclass(%(table)s)::oid AS oid UNION SELECT relid::oid FROM pg_partition_tree(to_regclass(%(table)s))) AS parts
ORDER BY oid
"""


def file_watch(connection: Connection, table: ReadTable) -> Callable[[], bool]:
    """Return what tells whether a table and its partitions have the files that they have now (driver).

    It is asked for before a snapshot is taken: a file that is replaced later reads as empty in it,
    without an error.

    Args:
        connection: A session with the store.
        table: The table.

    Returns:
        A function that tells whether the files are still the same.
    """
    named = {"table": sql.Identifier(table.schema, table.name).as_string(connection)}
    before = connection.execute(FILES, named).fetchall()
    return lambda: connection.execute(FILES, named).fetchall() == before


@contextmanager
def exporting(dsn: str, application: str) -> Iterator[tuple[Connection, ExportedSnapshot]]:
    """Hold a snapshot of this moment open for others to import (driver).

    Args:
        dsn: The store's DSN.
        application: The session's application name.

    Yields:
        The session that holds it, and the snapshot.
    """
    with connect(dsn, application, autocommit=False) as holder:
        holder.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        holder.read_only = True
        row = one_row(holder.execute("SELECT pg_export_snapshot(), pg_current_snapshot()::text"))
        yield holder, ExportedSnapshot(*row)


def frozen_at(
    spark: SparkSession, dsn: str, application: str, table: ReadTable, snapshot: ExportedSnapshot, position: str,
    holder: Connection, parts: int, same_file: Callable[[], bool],
) -> Frozen:  # fmt: skip
    """Return a frozen state whose snapshot `holder` holds; `holder` runs the user's own queries (driver).

    What fails of one table is undone, so that the others' snapshot stays.

    Args:
        spark: The Spark session.
        dsn: The store's DSN.
        application: The sessions' name in pg_stat_activity.
        table: The table.
        snapshot: The exported snapshot.
        position: What it shows, an LSN as text.
        holder: The session that holds the snapshot.
        parts: Into how many ranges the table is divided at most.
        same_file: What tells whether the table has the file that it had.

    Returns:
        The frozen state, good for as long as the holder's transaction.

    Raises:
        ServerUnavailable: The store can't be reached.
        DatabaseFailed: The store refuses a read.
    """
    with speaking_to(dsn, f"planning the reads of {table.schema}.{table.name}"), holder.transaction():
        ranges = plan_ranges(holder, table.schema, table.name, [c.name for c in table.key], parts)

    def frame(keys: Sequence[tuple[str, ...]] | None = None) -> DataFrame:
        return read_table(spark, dsn, application, table, ranges, snapshot, keys)

    def query(text: str) -> list[tuple[Any, ...]]:
        with speaking_to(dsn, "running a check of the spec"), holder.transaction():
            return holder.execute(text.encode()).fetchall()

    return Frozen(position, ranges, frame, query, same_file, Reading(dsn, application, table, snapshot))


def catalogue_columns(connection: Connection, schema: str, name: str) -> tuple[Column, ...] | None:
    """Return a table's columns with their types from the catalogue, generated ones left out; None without such a table."""
    rows = connection.execute(
        "SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid"
        " WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped"
        " AND a.attgenerated = '' ORDER BY a.attnum",
        [schema, name],
    ).fetchall()
    if not rows:
        return None
    return tuple(Column(row[0], row[1], _spark_type(row[1]), row[2]) for row in rows)


def _spark_type(type_name: str) -> str:
    carried = source_type(type_name)
    return carried.spark if carried else ""


@contextmanager
def importing(dsn: str, application: str, snapshot: str) -> Iterator[tuple[Connection, ExportedSnapshot]]:
    """Open a session inside an exported snapshot, and tell what it sees (driver).

    Args:
        dsn: The store's DSN.
        application: The session's application name.
        snapshot: The exported snapshot's name.

    Yields:
        The session, and the snapshot with what it sees.

    Raises:
        SnapshotLost: The snapshot can't be imported any more.
    """
    with connect(dsn, application, autocommit=False) as session:
        session.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        session.read_only = True
        try:
            session.execute(sql.SQL("SET TRANSACTION SNAPSHOT {}").format(sql.Literal(snapshot)))
        except psycopg.Error as error:
            raise SnapshotLost(snapshot, str(error).splitlines()[0]) from error
        row = one_row(session.execute("SELECT pg_current_snapshot()::text"))
        yield session, ExportedSnapshot(snapshot, row[0])
