"""Replication: a session with the slot's walsender, and the proof that it is still the prepared stream.

The proof is made anew at every connection: the same system and timeline, and the slot there, whole, and not ahead of what is
durable here; what the publication is, `definition` tells. Nothing here waits without bound, and a server that has gone silent
counts as gone.
"""

from __future__ import annotations

import select
import time
from collections.abc import Collection
from contextlib import closing
from datetime import UTC, datetime

import psycopg
from psycopg import pq, sql

from changeover.errors import LeaseHeld, ServerUnavailable, SourceChanged, SpoolGap
from changeover.jobs.decode import pgoutput
from changeover.jobs.ledger.records import Stream
from changeover.jobs.preflight.charsets import has_no_encoding
from changeover.names import joined, qualified
from changeover.position import format_lsn, parse_lsn
from changeover.session import Connection, application_name, connect, server_name, speaking_to

FEEDBACK_SECONDS = 10.0
SILENCE_SECONDS = 60.0

LOW_SHARE = 0.25
"""Share of max_slot_wal_keep_size below which what is left of it is an alarm."""


BACKLOG = "backlog"
"""The step in the application name of the session that reads a slot's backlog."""

SLOT_STATE = """
SELECT pg_current_wal_insert_lsn()::text, CASE WHEN s.slot_name IS NULL THEN 'missing' WHEN s.wal_status = 'lost' THEN 'lost'
    WHEN s.active OR EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = left(%s, 63))
    THEN 'active' ELSE 'inactive' END, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), s.restart_lsn)::bigint
FROM (SELECT) AS one LEFT JOIN pg_replication_slots s ON s.slot_name = %s
"""


def decoding(publication: str) -> dict[str, str]:
    """Return the options by which a slot is decoded, the same whichever way it is read."""
    return {"proto_version": "1", "publication_names": f'"{publication}"', "messages": "true"}


def slot_state(connection: Connection, migration: str, slot: str) -> tuple[str, str, int | None]:
    """Return the store's position, the slot's state, and the bytes of WAL that it keeps.

    The state is missing, lost, active or inactive; a slot is active too between two turns of its backlog, where it is at rest.
    """
    row = connection.execute(SLOT_STATE, [application_name(migration, BACKLOG), slot]).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


class CopyStream:
    """A session that sends data by the COPY protocol; every wait in it is bounded, and what is not taken stays with the server."""

    def __init__(self, connection: Connection, dsn: str) -> None:
        self.connection = connection
        self.dsn = dsn
        self.heard = time.monotonic()
        self.over = False
        self._poll = select.poll()
        self._poll.register(connection.pgconn.socket, select.POLLIN)

    def frames(self, wait_seconds: float, most: int, *, gather_seconds: float) -> list[bytes]:
        """Return the frames that are there, up to about `most` bytes, after waiting up to `wait_seconds` when there is none.

        From the first one on it lets more of them gather, for that long: a few cost as much to read as some hundreds.
        """
        found: list[bytes] = []
        take, size, until = self.connection.pgconn.get_copy_data, 0, 0.0
        while size < most and not self.over:
            length, data = take(1)
            if length > 0:
                until = until or time.monotonic() + gather_seconds
                found.append(bytes(data))
                size += length
            elif length < 0:
                self.over = True
            elif not self.more(max(0.0, until - time.monotonic()) if found else wait_seconds):
                break
        if self.over and not found:  # what came before the end is taken first
            self.ended()
        return found

    def more(self, wait_seconds: float) -> bool:
        """Read what the socket has; return whether it had anything."""
        if not self._poll.poll(wait_seconds * 1000):
            return False
        self.connection.pgconn.consume_input()
        self.heard = time.monotonic()
        return True

    def ended(self) -> None:
        """Look how the data ended; raises psycopg.Error, or ServerUnavailable where it has no end."""
        result = self.connection.pgconn.get_result()
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result)
        raise ServerUnavailable(server_name(self.dsn), "the server ended the stream")


class Replication(CopyStream):
    """A session with the slot's walsender."""

    received = 0
    """Up to where the server has sent."""

    def identify(self, stream: Stream) -> None:
        """Raise SourceChanged unless the server has the prepared system identifier and timeline."""
        found = self.connection.execute("IDENTIFY_SYSTEM").fetchone()
        assert found is not None
        pairs = (("system identifier", stream.system_id, found[0]), ("timeline", stream.timeline, found[1]))
        for what, prepared, now in pairs:
            if str(prepared) != str(now):
                raise SourceChanged(what, str(prepared), str(now))

    def start(self, stream: Stream, at: int) -> None:
        """Begin to stream what committed at `at` or later; raises LeaseHeld while another session has the slot.

        A server without an encoding sends its bytes as they are, so that one row which is no text does not end the stream.
        """
        if has_no_encoding(self.connection):
            self.connection.pgconn.exec_(b"SET client_encoding TO 'SQL_ASCII'")
        options = [sql.SQL(name) + sql.SQL(" ") + sql.Literal(value) for name, value in decoding(stream.publication).items()]
        command = sql.SQL("START_REPLICATION SLOT {} LOGICAL {} ({})").format(
            sql.Identifier(stream.slot), sql.SQL(format_lsn(at)), sql.SQL(", ").join(options)
        )
        result = self.connection.pgconn.exec_(command.as_bytes(self.connection))
        if result.status != pq.ExecStatus.COPY_BOTH:
            error = psycopg.errors.error_from_result(result)
            if isinstance(error, psycopg.errors.ObjectInUse):
                raise LeaseHeld("capture", str(error).strip()) from error
            raise error

    def answer(self, durable: int, *, ping: bool = False) -> None:
        """Tell the server what is durable; with `ping` it answers at once, which shows that it is alive. Raises as `ended`."""
        if self.over:
            self.ended()
        wire = self.connection.pgconn
        wire.put_copy_data(pgoutput.feedback(self.received, durable, datetime.now(UTC), ping=ping))
        wire.flush()

    def check_alive(self) -> None:
        """Raise ServerUnavailable when nothing has come for SILENCE_SECONDS, although we ask for answers."""
        if time.monotonic() - self.heard > SILENCE_SECONDS:
            raise ServerUnavailable(server_name(self.dsn), f"nothing heard for {SILENCE_SECONDS:g} s")


def require_stream(dsn: str, application: str, stream: Stream, durable: int) -> None:
    """Raise SourceChanged or SpoolGap unless the prepared stream is still whole from `durable` on (driver)."""
    with closing(connect(dsn, application)) as connection, speaking_to(dsn, "checking the change stream"):
        check_slot(connection, stream, durable)
    with closing(connect(dsn, application, replication=True)) as connection:
        Replication(connection, dsn).identify(stream)


def check_slot(connection: Connection, stream: Stream, durable: int) -> None:
    """Raise SourceChanged unless the slot is there, ours and whole; SpoolGap when it is ahead of what is durable."""
    if (change := slot_change(connection, stream)) is not None:
        raise change
    row = connection.execute(
        "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s", [stream.slot]
    ).fetchone()
    if row is not None and parse_lsn(row[0]) > durable:
        raise SpoolGap(row[0], format_lsn(durable))


def slot_change(connection: Connection, stream: Stream) -> SourceChanged | None:
    """Return how the slot is not the one that was made, or lacks WAL; None where it is as it was."""
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
    """Return what to do about a slot that the server will drop, or that fills its disk, unless something changes; else None."""
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
    """Return the generated columns of the published tables, which the stream leaves out."""
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
    """Return the numbers of the columns of each table, partitioned ones by their own, not by their partitions'."""
    rows = connection.execute(
        "SELECT n.nspname, c.relname, jsonb_object_agg(a.attname, a.attnum) FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0"
        " AND NOT a.attisdropped JOIN unnest(%s::text[], %s::text[]) AS asked (schema, name)"
        " ON (n.nspname, c.relname) = (asked.schema, asked.name) GROUP BY 1, 2",
        [list(names) for names in zip(*map(qualified, tables), strict=True)] or [[], []],
    )
    return {joined(schema, name): numbers for schema, name, numbers in rows.fetchall()}


def answer_interval(connection: Connection) -> float:
    """Return how often to answer, in seconds, so that the server's wal_sender_timeout never strikes."""
    row = connection.execute("SELECT setting::bigint FROM pg_settings WHERE name = 'wal_sender_timeout'").fetchone()
    assert row is not None
    return min(FEEDBACK_SECONDS, row[0] / 1000 / 3) if row[0] else FEEDBACK_SECONDS
