"""TRUNCATE in a PostgreSQL target: the floor goes up first, then every older row is deleted through the gate, in batches.

One DELETE would take a newer row with it: it waits for a writer's row, and then judges by what its own snapshot knew of that
row's version. So every key goes through the row versions, whose row lock a writer takes first. The floor is committed, and all
earlier gated statements have ended, before the first row is looked at, so no older image or change can come behind the
deletes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import sql

from changeover.position import Version, format_lsn
from changeover.session import Connection
from changeover.stores.base.interface import VERSION_COLUMNS
from changeover.stores.postgres.batches import BATCH, apply_batch, prepare_batch
from changeover.stores.postgres.gate import GatedTable, barrier, raise_floor, version_of

ROWS_PER_BATCH = 50_000


def truncate(connection: Connection, table: GatedTable, version: Version, server: str) -> int:
    """Delete every row older than a TRUNCATE of that version; safe to repeat (driver).

    Args:
        connection: A session with the store.
        table: The gated table.
        version: The TRUNCATE's version.
        server: The server's name, for messages.

    Returns:
        The number of rows that were deleted.

    Raises:
        LockNotGranted: Others hold the table too long.
    """
    with alone(connection, table):
        # one below: the deletes themselves bear the version, and nothing else can
        floor = version._replace(ordinal=version.ordinal - 1)
        if raise_floor(connection, table, floor) > floor:
            return 0  # by a later TRUNCATE, whose deletes these would be
        barrier(connection, table, server)
        removed = 0
        while gone := _delete_some(connection, table, version):
            removed += gone
        return removed


@contextmanager
def alone(connection: Connection, table: GatedTable) -> Iterator[None]:
    """Keep sweep and TRUNCATE of one table apart, without a writer noticing."""
    names = sql.SQL("hashtext('changeover.alone'), hashtext({})").format(sql.Literal(table.target))
    connection.execute(sql.SQL("SELECT pg_advisory_lock({})").format(names))
    try:
        yield
    finally:
        connection.execute(sql.SQL("SELECT pg_advisory_unlock({})").format(names))


def _delete_some(connection: Connection, table: GatedTable, version: Version) -> int:
    """Offer deletes of some rows that no change at or above the version has touched; return how many rows there were."""
    with connection.transaction(), connection.cursor() as cursor:
        prepare_batch(cursor, table, versions=True)
        deleted = cursor.execute(
            sql.SQL(
                "INSERT INTO {batch} ({names}, {key})"
                " SELECT {epoch}, {lsn}, {ordinal}, true, {t_key} FROM {table} AS t"
                " WHERE NOT EXISTS (SELECT FROM {row_versions} AS d"
                " WHERE {same} AND {d} >= ({epoch}, {lsn}, {ordinal})) LIMIT {limit}"
            ).format(
                batch=BATCH,
                names=table.list(VERSION_COLUMNS),
                d=version_of("d"),
                key=table.list(table.key),
                t_key=table.list(table.key, "t"),
                epoch=sql.Literal(version.epoch),
                lsn=sql.SQL("{}::pg_lsn").format(sql.Literal(format_lsn(version.lsn))),
                ordinal=sql.Literal(version.ordinal),
                table=table.table,
                row_versions=table.row_versions,
                same=table.same_key("d", "t"),
                limit=sql.Literal(ROWS_PER_BATCH),
            )
        ).rowcount
        apply_batch(cursor, table)
        return deleted
