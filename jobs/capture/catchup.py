"""Catching up: what a slot keeps far behind the server's end, read in bounded rounds, faster than it is streamed.

The stream sends each message by itself; here `pg_logical_slot_peek_binary_changes` decodes a
stretch of the log, and COPY sends its rows together. A round ends at a position that is below the
server's end when the round begins. It brings every transaction that committed below, whole and in
commit order, with the messages that the stream would have sent. Nothing is consumed by it: the slot
moves only by `acknowledge`, to what its caller holds durably. A round keeps decoded rows in the
server, in temporary files beyond work_mem. So it is taken only where the log that they can come
from is small, and what is larger is left to the stream. While a round is read the slot is held as
the stream would hold it. Runs where capture runs.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import chain

import numpy as np
import psycopg
from psycopg import pq, sql

from changeover.errors import LeaseHeld, ServerUnavailable
from changeover.jobs.decode.columns import Wire
from changeover.jobs.decode.pgoutput import MalformedMessage
from changeover.jobs.ledger.records import Stream
from changeover.jobs.source.replication import CATCHUP
from changeover.jobs.source.stream import CopyStream, decoding
from changeover.position import format_lsn, parse_lsn
from changeover.session import Connection, application_name, connect, server_name

FAR_BYTES = 8 << 20
"""WAL behind the server's end from which on what is behind is read in rounds."""

NEAR_BYTES = 1 << 20
"""WAL behind the server's end at which the stream takes over."""

ROUND_BYTES = 16 << 20
"""WAL of one round: so much is decoded in a fraction of a second, and the spool's end then moves."""

REACH_BYTES = 512 << 20
"""WAL that a round may have to read, with what came before it in transactions that were open: the bound of what it keeps."""

TAKE_BYTES = 4 << 20
WAIT_SECONDS = 0.05
CANCEL_SECONDS = 5.0

HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
"""COPY's binary format begins with it: its signature, no flags, no extension."""

TRAILER = b"\xff\xff"
ROW_BYTES = 6
"""Bytes before a row's one value: the number of values, and its length."""

log = logging.getLogger(__name__)


def round_end(connection: Connection, slot: str, durable: int, least: int) -> int | None:
    """Return where a round from `durable` on may end; None where less than `least` is left, or where it may be too large.

    A round reads again from where the server keeps the log for transactions that were open, so it
    grows with that. It is twice as long where there is room: what is read again costs less than
    what is new.
    """
    row = connection.execute(
        "SELECT restart_lsn::text, pg_current_wal_flush_lsn()::text FROM pg_replication_slots WHERE slot_name = %s", [slot]
    ).fetchone()
    if row is None or row[0] is None:  # the stream tells what became of it
        return None
    kept, end = map(parse_lsn, row)
    again = durable - kept
    upto = min(end, durable + max(ROUND_BYTES, min(2 * again, REACH_BYTES - again)))
    if upto - durable < least:
        return None
    if upto - kept > REACH_BYTES:
        log.info("an open transaction keeps %s bytes of WAL: the stream brings what is behind", f"{upto - kept:,}")
        return None
    return upto


class CatchupReader(CopyStream):
    """A session that reads what a slot is behind by round by round."""

    def __init__(self, connection: Connection, dsn: str, stream: Stream) -> None:
        super().__init__(connection, dsn)
        self.stream = stream

    def read(self, upto: int) -> Generator[Wire | None]:
        """Yield all that committed between the slot's position and `upto`, many messages at once; None when there are none yet.

        Raises LeaseHeld while another session has the slot, psycopg.Error, ServerUnavailable, MalformedMessage.
        """
        self.over = False
        try:
            yield from self._begin(upto)
            begun = False
            while (rows := self.frames(WAIT_SECONDS, TAKE_BYTES, gather_seconds=WAIT_SECONDS)) or not self.over:
                if rows and not begun:
                    rows[0], begun = _without_header(rows[0]), True
                if rows and rows[-1] == TRAILER:
                    rows.pop()
                yield _messages(rows) if rows else None
        finally:
            if not self.over and self.connection.pgconn.status == pq.ConnStatus.OK:
                # else the server decodes to the round's end before it lets the slot go
                self.connection.cancel_safe(timeout=CANCEL_SECONDS)

    def _begin(self, upto: int) -> Iterator[None]:
        """Start a round; yield while the server decodes."""
        wire = self.connection.pgconn
        options = chain.from_iterable(decoding(self.stream.publication).items())
        query = PEEK.format(
            slot=sql.Literal(self.stream.slot),
            upto=sql.Literal(format_lsn(upto)),
            options=sql.SQL(", ").join(map(sql.Literal, options)),
        )
        wire.send_query(query.as_bytes(self.connection))
        wire.flush()
        while wire.is_busy():
            if not self.more(WAIT_SECONDS):
                yield None
        result = wire.get_result()
        if result is None or result.status != pq.ExecStatus.COPY_OUT:
            self.over = True
            error = psycopg.errors.error_from_result(result) if result is not None else psycopg.OperationalError("no answer")
            if isinstance(error, psycopg.errors.ObjectInUse):
                raise LeaseHeld("capture", str(error).strip()) from error
            raise error

    def ended(self) -> None:
        """Take the end of a round's rows; raises psycopg.Error."""
        wire = self.connection.pgconn
        while (result := wire.get_result()) is not None:
            if result.status != pq.ExecStatus.COMMAND_OK:
                raise psycopg.errors.error_from_result(result)

    def acknowledge(self, durable: int) -> None:
        """Let the server forget what lies below a position, as `Replication.answer` does."""
        self.connection.execute(
            "SELECT pg_replication_slot_advance(slot_name, %(lsn)s::pg_lsn) FROM pg_replication_slots"
            " WHERE slot_name = %(slot)s AND confirmed_flush_lsn < %(lsn)s::pg_lsn",
            {"lsn": format_lsn(durable), "slot": self.stream.slot},
        )

    def check_alive(self, other: Connection) -> None:
        """Raise ServerUnavailable where another session does not see this one any more: a round may be silent for long."""
        pid = self.connection.info.backend_pid
        if other.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone() is None:
            raise ServerUnavailable(server_name(self.dsn), "the session that catches up is gone")


PEEK = sql.SQL(
    "COPY (SELECT data FROM pg_logical_slot_peek_binary_changes({slot}, {upto}, NULL, {options})) TO STDOUT (FORMAT binary)"
)


def refused(error: psycopg.Error) -> bool:
    """Return whether the server refused a round, and may still stream: a right, a limit, a timeout, a slot that it gave up."""
    return error.sqlstate is not None and not error.sqlstate.startswith(("08", "57P"))


@contextmanager
def reading(dsn: str, migration: str, stream: Stream) -> Iterator[CatchupReader]:
    """Open a session for what a slot is behind by; raises ServerUnavailable."""
    with closing(connect(dsn, application_name(migration, CATCHUP))) as connection:
        yield CatchupReader(connection, dsn, stream)


def _without_header(row: bytes) -> bytes:
    """Return the first row, before which the format has its header."""
    if not row.startswith(HEADER):
        raise MalformedMessage("COPY's binary format begins otherwise")
    return row[len(HEADER) :]


def _messages(rows: list[bytes]) -> Wire:
    wire = Wire(rows, ROW_BYTES)
    if not np.array_equal(wire.unsigned(4, wire.start - 4), wire.end - wire.start):
        raise MalformedMessage("a row of another length than it says")
    return wire
