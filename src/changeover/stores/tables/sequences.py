"""Sequences of a PostgreSQL table: which ones its columns draw from, how far they are, and moving them on, never back.

A column draws from a sequence that it owns (serial, identity) or that its default names. `drawn` is read from the sequence
itself, so that values whose rows were deleted or rolled back count as used, and those that a session keeps in its cache too.
Everything runs where the caller's session runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import psycopg
from psycopg import sql

from changeover.errors import LockNotGranted
from changeover.session import Connection

LOCK_TIMEOUT = "300ms"

MARGIN = 10_000
"""How far a sequence goes past what a table holds while rows still come: those stay below it."""

MOVE_SECONDS = 5.0
"""How long to wait for transactions that have drawn from a sequence; each try holds up others for LOCK_TIMEOUT at most."""

SEQUENCES = """
SELECT DISTINCT a.attname, n.nspname, c.relname, s.seqincrement, s.seqmin, s.seqmax,
    a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype),
    EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum AND i.indpred IS NULL)
FROM pg_attribute a
LEFT JOIN pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = a.attrelid
        AND d.refobjsubid = a.attnum AND d.deptype IN ('a', 'i')
    OR d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid AND d.refclassid = 'pg_class'::regclass
JOIN pg_class c ON c.relkind = 'S' AND c.oid = CASE WHEN d.classid = 'pg_class'::regclass THEN d.objid ELSE d.refobjid END
JOIN pg_sequence s ON s.seqrelid = c.oid
JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped
"""


@dataclass(frozen=True)
class Sequence:
    """A sequence that a column draws from; `counts` says that the column holds its values themselves, as whole numbers."""

    column: str
    schema: str
    name: str
    increment: int
    least: int
    most: int
    counts: bool
    indexed: bool

    @property
    def identifier(self) -> sql.Identifier:
        """Return its name for statements."""
        return sql.Identifier(self.schema, self.name)

    def farthest(self, *values: int | None) -> int | None:
        """Return the value that this sequence would reach last, None without any (pure)."""
        known = [value for value in values if value is not None]
        return (max if self.increment > 0 else min)(known, default=None)


def sequences(connection: Connection, schema: str, name: str) -> list[Sequence]:
    """Return the sequences from which a table's columns draw.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.

    Returns:
        The sequences, one a column that draws.
    """
    table = sql.Identifier(schema, name).as_string(connection)
    return [Sequence(*row) for row in connection.execute(SEQUENCES, [table]).fetchall()]


def drawn(connection: Connection, sequence: Sequence) -> int | None:
    """Return the last value that may have been drawn, None of a sequence that nobody used.

    Args:
        connection: A session with the store.
        sequence: The sequence.

    Returns:
        The value, None of a sequence that nobody used.
    """
    row = connection.execute(sql.SQL("SELECT last_value, is_called FROM {}").format(sequence.identifier)).fetchone()
    return int(row[0]) if row is not None and row[1] else None


def held(connection: Connection, schema: str, name: str, sequence: Sequence) -> int | None:
    """Return the farthest value that stands in the column, None without rows or where the column holds something else.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.
        sequence: The sequence.

    Returns:
        The value, None without rows or where the column holds something else.
    """
    if not sequence.counts:
        return None
    function = sql.SQL("max" if sequence.increment > 0 else "min")
    row = connection.execute(
        sql.SQL("SELECT {}({}) FROM {}").format(function, sql.Identifier(sequence.column), sql.Identifier(schema, name))
    ).fetchone()
    return int(row[0]) if row is not None and row[0] is not None else None


def ahead(sequence: Sequence, held: int | None) -> int | None:
    """Return where a sequence has the margin beyond a value, or that value where it could not count so far (pure).

    Args:
        sequence: The sequence.
        held: The farthest value that stands in the column, None without any.

    Returns:
        Where to move the sequence to, None where there is no value.
    """
    if held is None:
        return None
    raised = held + MARGIN * sequence.increment
    return raised if sequence.least <= raised < sequence.most else held


def move_past(connection: Connection, sequence: Sequence, *values: int | None, seconds: float = MOVE_SECONDS) -> None:
    """Let the next value drawn lie beyond all of these; a sequence that is further already stays where it is.

    Sessions may draw meanwhile: while it is looked at and moved nobody can, so it is never taken
    back behind a value of theirs. That waits for transactions that have drawn and are open; raises
    LockNotGranted after so many seconds. A role that does not own the sequence moves it without the
    wait, which is the same only while nobody draws (`jobs.preflight.division` asks for the owner).

    Args:
        connection: A session with the store.
        sequence: The sequence.
        *values: The values that the next one must lie beyond; None counts for nothing.
        seconds: How long to wait for transactions that have drawn, in seconds.

    Raises:
        LockNotGranted: A transaction that drew from the sequence stays open.
    """
    if not _needs_moving(connection, sequence, values):
        return
    if not owned(connection, sequence):
        _set_past(connection, sequence, values)
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            with connection.transaction():
                connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
                connection.execute(_locking(sequence))
                _set_past(connection, sequence, values)
            return
        except psycopg.errors.LockNotAvailable as error:
            if time.monotonic() > deadline:
                server, name = f"{connection.info.host}/{connection.info.dbname}", f"{sequence.schema}.{sequence.name}"
                raise LockNotGranted(server, f"lock on the sequence {name}", "a transaction that drew from it") from error
            time.sleep(0.05)


def _locking(sequence: Sequence) -> sql.Composed:
    """Take the lock that `nextval` waits for, to the transaction's end: no LOCK takes a sequence, but a new increment does."""
    return sql.SQL("ALTER SEQUENCE {} INCREMENT BY {}").format(sequence.identifier, sql.Literal(sequence.increment))


def _needs_moving(connection: Connection, sequence: Sequence, values: Iterable[int | None]) -> bool:
    now = drawn(connection, sequence)
    return sequence.farthest(now, *values) != now


def owned(connection: Connection, sequence: Sequence) -> bool:
    """Return whether the role may lock the sequence."""
    row = connection.execute(
        "SELECT pg_has_role(relowner, 'USAGE') FROM pg_class WHERE oid = %s::regclass", [sequence.identifier.as_string(connection)]
    ).fetchone()
    return bool(row and row[0])


def _set_past(connection: Connection, sequence: Sequence, values: Iterable[int | None]) -> None:
    now = drawn(connection, sequence)
    farthest = sequence.farthest(now, *values)
    if farthest is not None and farthest != now:
        bounded = max(sequence.least, min(sequence.most, farthest))
        connection.execute("SELECT setval(%s, %s)", [sequence.identifier.as_string(connection), bounded])
