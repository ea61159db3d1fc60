"""Replication: the proof that a slot is still the prepared stream, and what it keeps on the server.

The proof is made anew at every connection: the same system and timeline, and the slot there, whole,
and not ahead of what is durable here. What the publication is, `definition` tells.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import closing

from changeover.errors import SourceChanged, SpoolGap
from changeover.jobs.ledger.records import Stream
from changeover.jobs.source.stream import Replication
from changeover.names import joined, qualified
from changeover.position import format_lsn, parse_lsn
from changeover.session import Connection, application_name, connect, one_row, speaking_to
from changeover.spec import Spec

LOW_SHARE = 0.25
"""Share of max_slot_wal_keep_size below which what is left of it is an alarm."""


CATCHUP = "catchup"
"""The step in the application name of the session that reads what a slot is behind by."""

SLOT_STATE = """
SELECT pg_current_wal_insert_lsn()::text, CASE WHEN s.slot_name IS NULL THEN 'missing' WHEN s.wal_status = 'lost' THEN 'lost'
    WHEN s.active OR EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = left(%s, 63))
    THEN 'active' ELSE 'inactive' END, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), s.restart_lsn)::bigint
FROM (SELECT) AS one LEFT JOIN pg_replication_slots s ON s.slot_name = %s
"""


def slot_state(connection: Connection, migration: str, slot: str) -> tuple[str, str, int | None]:
    """Return how a slot stands.

    The state is missing, lost, active or inactive; a slot is active too between two rounds of
    catch-up, where it is at rest.

    Args:
        connection: A session with the store.
        migration: The migration's name.
        slot: The slot's name.

    Returns:
        (the store's insert LSN, the slot's state, bytes of WAL that it keeps or None).
    """
    row = one_row(connection.execute(SLOT_STATE, [application_name(migration, CATCHUP), slot]))
    return row[0], row[1], row[2]


def require_stream(dsn: str, application: str, stream: Stream, durable: int) -> None:
    """Raise SourceChanged or SpoolGap unless the prepared stream is still whole from `durable` on (driver).

    Args:
        dsn: The store's DSN.
        application: The session's application name.
        stream: What prepare made.
        durable: The LSN up to which all is spooled.

    Raises:
        SourceChanged: It is another server, or the slot is gone or another one.
        SpoolGap: The slot is ahead of what is durable.
    """
    with closing(connect(dsn, application)) as connection, speaking_to(dsn, "checking the change stream"):
        check_slot(connection, stream, durable)
    with closing(connect(dsn, application, replication=True)) as connection:
        Replication(connection, dsn).identify(stream)


def check_slot(connection: Connection, stream: Stream, durable: int) -> None:
    """Raise SourceChanged unless the slot is there, ours and whole; SpoolGap when it is ahead of what is durable.

    Args:
        connection: A session with the store.
        stream: What prepare made.
        durable: The LSN up to which all is spooled.

    Raises:
        SourceChanged: The slot is gone, another one, or lacks WAL.
        SpoolGap: The slot is ahead of what is durable.
    """
    if (change := slot_change(connection, stream)) is not None:
        raise change
    row = connection.execute(
        "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s", [stream.slot]
    ).fetchone()
    if row is not None and parse_lsn(row[0]) > durable:
        raise SpoolGap(row[0], format_lsn(durable))


def slot_change(connection: Connection, stream: Stream) -> SourceChanged | None:
    """Return how the slot is not the one that was made, or lacks WAL.

    Args:
        connection: A session with the store.
        stream: What prepare made.

    Returns:
        The change, as the error that may be raised; None where the slot is as it was.
    """
    row = connection.execute(
        "SELECT coalesce(plugin = 'pgoutput' AND database = current_database() AND NOT temporary, false), two_phase,"
        " wal_status = 'lost' OR confirmed_flush_lsn IS NULL FROM pg_replication_slots WHERE slot_name = %s",
        [stream.slot],
    ).fetchone()
    if row is None:
        return SourceChanged("replication slot", stream.slot, "missing")
    ours, two_phase, lost = row
    if not ours:
        return SourceChanged("replication slot", f"{stream.slot} of pgoutput", "another of that name")
    if two_phase:
        return SourceChanged("replication slot", f"{stream.slot} without", "one with two_phase")
    if lost:
        return SourceChanged("replication slot", stream.slot, "invalidated, so that the WAL it needs is gone")
    return None


def slot_alarm(connection: Connection, slot: str) -> str | None:
    """Return what to do about a slot that the server will drop, or that fills its disk.

    Args:
        connection: A session with the store.
        slot: The slot's name.

    Returns:
        A sentence, None while nothing is to be done.
    """
    row = connection.execute(
        "SELECT s.wal_status, s.safe_wal_size, pg_wal_lsn_diff(pg_current_wal_lsn(), s.restart_lsn)::bigint,"
        " l.setting::bigint << 20 FROM pg_replication_slots s, pg_settings l"
        " WHERE s.slot_name = %s AND l.name = 'max_slot_wal_keep_size' AND s.wal_status <> 'lost'",
        [slot],
    ).fetchone()
    if row is None:
        return None
    status, safe, kept, limit = row
    if status == "reserved" and (safe is None or safe > limit * LOW_SHARE):
        return None
    then = "no limit is set, so the server's disk may fill up" if safe is None else f"{max(safe, 0):,} bytes more and it is lost"
    raising = "set max_slot_wal_keep_size" if safe is None else f"raise max_slot_wal_keep_size (now {limit:,} bytes)"
    return (
        f"slot {slot} keeps {kept:,} bytes of WAL (wal_status {status}); {then}: see that capture runs and keeps up and that no"
        f" transaction stays open for long, or {raising}"
    )


def generated_columns(connection: Connection, publication: str) -> dict[str, frozenset[str]]:
    """Return the generated columns of the published tables, which the stream leaves out.

    Args:
        connection: A session with the store.
        publication: The publication's name.

    Returns:
        Qualified table name and its generated columns.
    """
    rows = connection.execute(
        "SELECT p.schemaname, p.tablename, array_agg(a.attname::text) FROM pg_publication_tables p"
        " JOIN pg_namespace n ON n.nspname = p.schemaname"
        " JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename"
        " JOIN pg_attribute a ON a.attrelid = c.oid AND a.attgenerated <> '' AND NOT a.attisdropped"
        " WHERE p.pubname = %s GROUP BY 1, 2",
        [publication],
    )
    return {joined(schema, name): frozenset(columns) for schema, name, columns in rows.fetchall()}


def column_numbers(connection: Connection, tables: Collection[str]) -> dict[str, dict[str, int]]:
    """Return the numbers (`attnum`) of the columns of each table.

    A partitioned table's columns have its own numbers, not its partitions'.

    Args:
        connection: A session with the store.
        tables: Qualified table names.

    Returns:
        Table, column and number.
    """
    rows = connection.execute(
        "SELECT n.nspname, c.relname, jsonb_object_agg(a.attname, a.attnum) FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0"
        " AND NOT a.attisdropped JOIN unnest(%s::text[], %s::text[]) AS asked (schema, name)"
        " ON (n.nspname, c.relname) = (asked.schema, asked.name) GROUP BY 1, 2",
        [list(names) for names in zip(*map(qualified, tables), strict=True)] or [[], []],
    )
    return {joined(schema, name): numbers for schema, name, numbers in rows.fetchall()}


def slot_of(spec: Spec) -> str:
    """Return the name of the new store's slot and publication (pure).

    No migration's name begins as its own part does.

    Args:
        spec: The migration's spec.

    Returns:
        The name.
    """
    return f"changeover__new_{spec.name}"
