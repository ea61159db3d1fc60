"""Batches at the gate of a PostgreSQL store: many changes or a chunk's images, offered in one transaction of the caller's.

A batch comes by COPY in a temporary table and goes through the parts that `statements` names, in that order: changes by GATE or
CATCH_UP, a chunk's images by LOAD. What each part does is said here, once. Only READ COMMITTED is accepted. Runs where the
cursor's session runs, in tasks mostly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
from psycopg import sql

from changeover.errors import CouldNotFinish, RowRefused
from changeover.position import Version
from changeover.session import one_row
from changeover.stores.base import interface
from changeover.stores.base.interface import LEFT, OWNER, VERSION_COLUMNS, Counts
from changeover.stores.base.statements import CATCH_UP, GATE, LOAD, Part
from changeover.stores.postgres import owners
from changeover.stores.postgres.gate import GATE_EPOCH, MARK, NO_VERSION, OURS, GatedTable, raise_floor, version_of

BATCH = sql.Identifier("pg_temp", "changeover_batch")
"""The session's temporary table in which a batch of images or changes comes by COPY."""

WIDEST = 1600 - len(VERSION_COLUMNS)
"""How many columns of a table fit into a batch beside the versions: PostgreSQL's tables have 1,600 at most."""

OWNED = (OWNER, LEFT)
"""What a batch of changes has besides where source keys are kept."""


def image_columns(table: GatedTable) -> tuple[str, ...]:
    """Return the columns in which images come."""
    return (*table.columns, *([OWNER] if table.owned else []))


def change_columns(table: GatedTable) -> tuple[str, ...]:
    """Return the columns in which changes come."""
    return (*VERSION_COLUMNS, *table.columns, *(OWNED if table.owned else []))


def prepare_batch(cursor: psycopg.Cursor[Any], table: GatedTable, versions: bool, *, keep: bool = False) -> None:
    """Create the session's batch table: the table's columns, with versions in front for changes.

    It lasts for this transaction, or where it is kept as long as the session, for a transaction
    that may have to be repeated.

    Args:
        cursor: A cursor in the caller's transaction (task or driver).
        table: The gated table.
        versions: Whether the batch holds changes, which bear versions; images do not.
        keep: Whether it lasts as long as the session.
    """
    cursor.execute(
        sql.SQL(
            "CREATE TEMPORARY TABLE changeover_batch ON COMMIT {end} AS SELECT {extra}{columns}{owners} FROM {table} WITH NO DATA"
        ).format(
            owners=sql.SQL(f", NULL::text AS {OWNER}, NULL::text[] AS {LEFT}" if table.owned else ""),
            end=sql.SQL("PRESERVE ROWS" if keep else "DROP"),
            extra=sql.SQL("{}, ").format(NO_VERSION) if versions else sql.SQL(""),
            columns=table.list(table.columns),
            table=table.table,
        )
    )


def lock_shared(cursor: psycopg.Cursor[Any], table: GatedTable) -> Counts:
    """Take the table's lock, SHARED, alone, so that the next statement's snapshot is taken under it."""
    require_read_committed(cursor)
    cursor.execute(sql.SQL("SELECT pg_advisory_xact_lock_shared({})").format(table.lock_key))
    return Counts(0, 0)


def require_read_committed(cursor: psycopg.Cursor[Any]) -> None:
    """Raise CouldNotFinish at any other isolation level: each statement must see what committed before it."""
    row = cursor.execute("SHOW transaction_isolation").fetchone()
    if row is None or row[0] != "read committed":
        raise CouldNotFinish(f"the gate needs READ COMMITTED, not {row}")


def apply_batch(cursor: psycopg.Cursor[Any], table: GatedTable, reached: Version | None = None) -> Counts:
    """Offer the batch table's changes, one row a key as texts, through the gate, in the caller's transaction.

    With `reached` the batch has every change up to that version that was not offered before, and
    the position is the gate (`statements.CATCH_UP`). Where another session holds the table's lock,
    each key's version is, as always.

    Args:
        cursor: A cursor in the caller's transaction (task or driver).
        table: The gated table.
        reached: Up to which version the batch has every change; None promises nothing.

    Returns:
        How many rows were offered, taken and refused.

    Raises:
        RowRefused: Two rows meet in one key of the target.
    """
    (offered, epoch) = one_row(cursor.execute(sql.SQL("SELECT count(*), max(_changeover_epoch) FROM {}").format(BATCH)))
    if not offered and reached is None:
        require_read_committed(cursor)
        return Counts(0, 0)
    if table.loose:
        _collapse(cursor, table)
    cursor.execute(MARK, [OURS, "changes"])
    # a store that has lost authority lets the gate of the present epoch pass, see refusal
    passes = epoch if epoch is not None or reached is None else reached.epoch
    cursor.execute("SELECT set_config('changeover.epoch', %s, true)", [str(passes)])
    steps: dict[Part, Step] = OF_CHANGES
    procedure = GATE
    if reached is not None and _lock_exclusive(cursor, table):
        steps = {**OF_CHANGES, Part.LOCK_EXCLUSIVE: _locked, Part.RAISE_FLOOR: lambda cursor, table: _raise(cursor, table, reached)}
        (procedure,) = CATCH_UP
    owners.require_sole(cursor, table, BATCH)
    taken = sum(steps[part](cursor, table).taken for (part,) in procedure)
    owners.record_changes(cursor, table, BATCH)
    return Counts(offered, taken)


def _collapse(cursor: psycopg.Cursor[Any], table: GatedTable) -> None:
    """Keep the last change of each key as the server compares keys, the target column's way: 1 and 1.0 are one key.

    The batch is this session's alone, so it makes no difference when this is done.
    """
    cursor.execute(
        sql.SQL(
            "DELETE FROM {batch} AS b USING (SELECT ctid AS place, row_number() OVER (PARTITION BY {key}"
            " ORDER BY _changeover_epoch DESC, _changeover_lsn DESC, _changeover_ordinal DESC) AS rank FROM {batch}) AS d"
            " WHERE b.ctid = d.place AND d.rank > 1"
        ).format(batch=BATCH, key=table.list(table.key))
    )


def _lock_exclusive(cursor: psycopg.Cursor[Any], table: GatedTable) -> bool:
    """Take the table's lock, exclusive, if it is free: nobody is made to wait who was there before."""
    require_read_committed(cursor)
    row = cursor.execute(sql.SQL("SELECT pg_try_advisory_xact_lock({})").format(table.lock_key)).fetchone()
    return row is not None and bool(row[0])


def _locked(cursor: psycopg.Cursor[Any], table: GatedTable) -> Counts:
    """The lock is there already: whether it was free decided on the procedure."""
    return Counts(0, 0)


def _drop_older(cursor: psycopg.Cursor[Any], table: GatedTable) -> Counts:
    """Leave in the batch what is above the floor and above the cell, and no version of its keys (under the exclusive lock)."""
    cursor.execute(
        sql.SQL(
            "DELETE FROM {batch} AS b USING changeover.gate AS g WHERE g.target = {target} AND {b} <= (g.epoch, g.lsn, g.ordinal)"
        ).format(batch=BATCH, b=version_of("b"), target=sql.Literal(table.target))
    )
    cursor.execute(
        sql.SQL("DELETE FROM {batch} AS b USING {row_versions} AS t WHERE {same} AND {b} <= {t}").format(
            batch=BATCH, row_versions=table.row_versions, same=table.same_key("t", "b"), b=version_of("b"), t=version_of("t")
        )
    )
    # the floor, raised in this transaction, answers for the rest: a tombstone left behind would take a row at a repeated sweep
    cursor.execute(
        sql.SQL("DELETE FROM {row_versions} AS t USING {batch} AS b WHERE {same}").format(
            batch=BATCH, row_versions=table.row_versions, same=table.same_key("t", "b")
        )
    )
    return Counts(0, 0)


def _raise(cursor: psycopg.Cursor[Any], table: GatedTable, floor: Version) -> Counts:
    raise_floor(cursor.connection, table, floor)
    return Counts(0, 0)


def _touch_batch(cursor: psycopg.Cursor[Any], table: GatedTable) -> Counts:
    """Record the winners and leave only them in the batch; rows are counted where they are written."""
    cursor.execute(
        sql.SQL(
            "WITH won AS ({touch} RETURNING {t_key}) DELETE FROM {batch} AS b WHERE NOT EXISTS (SELECT FROM won WHERE {same})"
        ).format(touch=table.touch(BATCH), t_key=table.list(table.key, "t"), batch=BATCH, same=table.same_key("won", "b"))
    )
    return Counts(0, 0)


Step = Callable[[psycopg.Cursor[Any], GatedTable], Counts]

OF_CHANGES: dict[Part, Step] = {
    Part.LOCK_SHARED: lock_shared,
    Part.TOUCH: _touch_batch,
    Part.DROP_OLDER: _drop_older,
    Part.DELETE: lambda cursor, table: Counts(0, cursor.execute(table.delete(BATCH)).rowcount),
    Part.UPSERT: lambda cursor, table: Counts(0, cursor.execute(table.upsert(BATCH)).rowcount),
}
"""What each part of `statements.GATE` and `CATCH_UP` does with a batch of changes; what it took are rows written."""


def load_batch(cursor: psycopg.Cursor[Any], table: GatedTable) -> Counts:
    """Insert the batch table's images where no cell is, in the caller's transaction; count those that a tombstone refused.

    The chunk's mark, the last part of `statements.LOAD`, is the caller's, in the same transaction.

    Args:
        cursor: A cursor in the caller's transaction (task or driver).
        table: The gated table.

    Returns:
        How many rows were offered, taken and refused.

    Raises:
        RowRefused: Two rows meet in one key of the target.
    """
    cursor.execute(MARK, [OURS, "images"])
    cursor.execute(GATE_EPOCH, [table.target])
    found = cursor.execute(sql.SQL("SELECT count(*) FROM {}").format(BATCH)).fetchone()
    offered = int(found[0]) if found else 0
    counts = {part: OF_IMAGES[part](cursor, table) for (part,) in LOAD if part is not Part.MARK}
    row_versions, inserted = counts[Part.REFUSE].offered, counts[Part.INSERT].taken
    if offered - row_versions > inserted and (met := collisions(cursor, table)):
        raise RowRefused(table.target, owners.meeting(cursor, table, BATCH) or f"target key {met[0]}", interface.MEET)
    owners.record_images(cursor, table, BATCH)
    return Counts(offered, inserted, counts[Part.REFUSE].refused)


def _refuse_changed(cursor: psycopg.Cursor[Any], table: GatedTable) -> Counts:
    """Take images of keys that have a row version out of the batch.

    Counts them, and those that a tombstone refused.
    """
    gone = one_row(
        cursor.execute(
            sql.SQL(
                "WITH gone AS (DELETE FROM {batch} AS b USING {row_versions} AS t WHERE {same} RETURNING t._changeover_deleted)"
                " SELECT count(*), count(*) FILTER (WHERE _changeover_deleted) FROM gone"
            ).format(batch=BATCH, row_versions=table.row_versions, same=table.same_key("t", "b"))
        )
    )
    return Counts(int(gone[0]), 0, int(gone[1]))


def _insert_images(cursor: psycopg.Cursor[Any], table: GatedTable) -> Counts:
    """Insert what is left of the batch, by floor and cell as this statement's own snapshot has them."""
    inserted = cursor.execute(
        sql.SQL(
            "INSERT INTO {table} ({columns}) OVERRIDING SYSTEM VALUE SELECT {b_columns} FROM {batch} AS b, changeover.gate AS g"
            " WHERE g.target = {target} AND (g.epoch, g.lsn, g.ordinal) = (g.image_epoch, g.image_lsn, -1)"
            " AND NOT EXISTS (SELECT FROM {row_versions} AS t WHERE {same}) ORDER BY {b_key} ON CONFLICT ({key}) DO NOTHING"
        ).format(
            table=table.table,
            columns=table.list(table.columns),
            b_columns=table.list(table.columns, "b"),
            batch=BATCH,
            target=sql.Literal(table.target),
            row_versions=table.row_versions,
            same=table.same_key("t", "b"),
            b_key=table.list(table.key, "b"),
            key=table.list(table.key),
        )
    ).rowcount
    return Counts(0, inserted)


OF_IMAGES: dict[Part, Step] = {Part.LOCK_SHARED: lock_shared, Part.REFUSE: _refuse_changed, Part.INSERT: _insert_images}
"""What each part of `statements.LOAD` does with a chunk's images."""


def collisions(cursor: psycopg.Cursor[Any], table: GatedTable) -> list[str]:
    """Return keys in which two images meet: twice in the batch, or in a row that another chunk wrote (no live write did)."""
    rows = cursor.execute(
        sql.SQL(
            "SELECT ROW({b_key})::text FROM {batch} AS b JOIN {table} AS t ON {same_table}"
            " WHERE t.xmin <> pg_current_xact_id()::xid"
            " AND NOT EXISTS (SELECT FROM {row_versions} AS d WHERE {same_versions})"
            " UNION ALL SELECT ROW({b_key})::text FROM {batch} AS b GROUP BY {b_key} HAVING count(*) > 1 LIMIT 5"
        ).format(
            b_key=table.list(table.key, "b"),
            batch=BATCH,
            table=table.table,
            same_table=table.same_key("t", "b"),
            row_versions=table.row_versions,
            same_versions=table.same_key("d", "b"),
        )
    ).fetchall()
    return [str(row[0]) for row in rows]
