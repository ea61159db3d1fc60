"""Markers: what we write into a store's log so that whoever waits on a position sees it passed, though nobody else writes.

The insert position of an idle server may lie in a page that nobody has begun, so no stream ever
reaches it by itself. After `pg_switch_wal()` it stays 40 bytes beyond all that is flushed. A marker
is written after the position was read and is flushed by its own commit, whatever
`synchronous_commit` says; it needs no standby. So a position is first read, then marked, then
waited for.
"""

from __future__ import annotations

from changeover.jobs.source import triggerlog
from changeover.names import MARKER_PREFIX
from changeover.session import Connection, wal_position


def emit_marker(connection: Connection, note: str) -> None:
    """Write a marker into a store's logs.

    It reaches the spools when the transaction commits, the caller's where there is one.

    Args:
        connection: A session with the store.
        note: What the marker says.
    """
    with connection.transaction():
        emit_message(connection, note)
        triggerlog.mark(connection, note)


def emit_message(connection: Connection, note: str) -> None:
    """Write a marker into a store's write-ahead log alone, which any role may.

    Args:
        connection: A session with the store.
        note: What the marker says.
    """
    with connection.transaction():
        connection.execute("SET LOCAL synchronous_commit = local")  # the walsender sends what is flushed, and nothing else
        connection.execute("SELECT pg_logical_emit_message(true, %s::text, %s::text)", [MARKER_PREFIX, note])


def move_on(connection: Connection, log: triggerlog.Log | None, note: str) -> None:
    """Have a log at rest pass a position that was read before, for somebody who waits for it; any role may.

    A marker is written behind it. A trigger log, in which an application may write nothing, is asked for a tick; where no capture
    runs, nobody hears that.

    Args:
        connection: A session with the store.
        log: The trigger log by which the store is captured, None where a slot does it.
        note: What a marker says.
    """
    if log is None:
        emit_message(connection, note)
    else:
        triggerlog.ask_for_a_tick(connection, log)


def mark(connection: Connection, note: str) -> int:
    """Return where a store's log is now, having written a marker behind it.

    Args:
        connection: A session with the store.
        note: What the marker says.

    Returns:
        The insert LSN, read before the marker was written.
    """
    position = wal_position(connection)
    emit_marker(connection, note)
    return position
