"""Garbage collection of row versions in a PostgreSQL target, by position: the floor goes up first, and answers for their keys.

A row version up to a version may go once no writer can still judge by a floor below that version.
So the new floor is committed first. Then every gated statement that began under the old one has
ended (the barrier). Only then rows are deleted, a few of the table's blocks a transaction. The
order is `statements.COLLECT`. A run that dies between any two steps leaves a floor that is right
and rows that the next one deletes. The caller holds the target's lease; runs where its session runs
(driver).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from psycopg import sql

from changeover import failpoints
from changeover.position import Version, format_lsn
from changeover.session import Connection, one_row
from changeover.stores.base.interface import Collected
from changeover.stores.base.statements import COLLECT, Part
from changeover.stores.postgres.gate import GatedTable, barrier, raise_floor, version_of
from changeover.stores.postgres.truncate import alone

BLOCKS_PER_BATCH = 128
"""Blocks of the table of row versions in one transaction, some ten thousand rows: a writer of one of them waits for a few
milliseconds.
"""

KILL_POINTS = {Part.RAISE_FLOOR: "collect-floor", Part.LOCK_EXCLUSIVE: "collect-barrier", Part.PURGE: "collect-batch"}


def collect(
    connection: Connection, table: GatedTable, upto: Version, server: str, *, block: int = 0, batches: int = 1 << 62
) -> Collected:
    """Delete row versions up to a version, from a block on, in so many batches at most; `floors.collectable` must allow it.

    Safe to repeat, from any block. Raises LockNotGranted where gated writes do not end.
    """
    run = _Collection(connection, table, upto, server, block, batches)
    with alone(connection, table):
        for ((part,),) in COLLECT:
            STEPS[part](run)
            failpoints.reach(KILL_POINTS[part], table.target)
    return Collected(run.rows, run.block if run.block < run.end() else None)


@dataclass
class _Collection:
    """A collection on its way through the blocks of the table of row versions."""

    connection: Connection
    table: GatedTable
    upto: Version
    server: str
    block: int
    batches: int
    rows: int = 0

    def end(self) -> int:
        """Return the table's length in blocks."""
        row = one_row(
            self.connection.execute(
                "SELECT pg_relation_size(%s::regclass) / current_setting('block_size')::integer",
                [self.table.row_versions.as_string(self.connection)],
            )
        )
        return int(row[0])


def _raise_floor(run: _Collection) -> None:
    raise_floor(run.connection, run.table, run.upto)


def _barrier(run: _Collection) -> None:
    barrier(run.connection, run.table, run.server)


def _purge(run: _Collection) -> None:
    """Delete by blocks: a row up to the floor stays where it is, for what the gate takes instead is above the floor.

    A row that a writer holds is passed over, and left to the next collection. So this one waits for
    no row, and can't be part of a deadlock.
    """
    end = run.end()
    while run.block < end and run.batches > 0:
        run.rows += run.connection.execute(purge(run.table, run.upto, run.block)).rowcount
        run.block, run.batches = run.block + BLOCKS_PER_BATCH, run.batches - 1
        failpoints.reach("collect-between", f"{run.table.target} {run.block}")


def purge(table: GatedTable, upto: Version, block: int) -> sql.Composed:
    """Return the statement that deletes row versions up to a version, by `collected`, from a batch of blocks."""
    return sql.SQL(
        "DELETE FROM {row_versions} WHERE ctid = ANY (ARRAY(SELECT ctid FROM {row_versions} WHERE ctid >= {first}::tid"
        " AND ctid < {last}::tid"
        " AND {version} <= ({epoch}, {lsn}::pg_lsn, {ordinal}) FOR UPDATE SKIP LOCKED))"
    ).format(
        row_versions=table.row_versions,
        version=version_of(),
        first=sql.Literal(f"({block},0)"),
        last=sql.Literal(f"({block + BLOCKS_PER_BATCH},0)"),
        epoch=sql.Literal(upto.epoch),
        lsn=sql.Literal(format_lsn(upto.lsn)),
        ordinal=sql.Literal(upto.ordinal),
    )


STEPS: dict[Part, Callable[[_Collection], None]] = {
    Part.RAISE_FLOOR: _raise_floor,
    Part.LOCK_EXCLUSIVE: _barrier,
    Part.PURGE: _purge,
}
"""What each part of `statements.COLLECT` does; each is committed before the next begins."""


def row_versions(connection: Connection, table: GatedTable) -> int:
    """Return about how many row versions there are, as the server's statistics have it; costs nothing, 0 without the table."""
    row = one_row(
        connection.execute(
            "SELECT coalesce(pg_stat_get_live_tuples(to_regclass(%s)), 0)", [table.row_versions.as_string(connection)]
        )
    )
    return int(row[0])
