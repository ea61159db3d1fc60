"""The stream: a session with a store's walsender, by which a slot is read.

Nothing here waits without bound, and a server that has gone silent counts as gone. What is not taken stays with the server.
"""

from __future__ import annotations

import select
import time
from datetime import UTC, datetime

import psycopg
from psycopg import pq, sql

from changeover.errors import LeaseHeld, ServerUnavailable, SourceChanged
from changeover.jobs.decode import pgoutput
from changeover.jobs.ledger.records import Stream
from changeover.position import format_lsn
from changeover.session import Connection, has_no_encoding, one_row, server_name

FEEDBACK_SECONDS = 10.0
SILENCE_SECONDS = 60.0


def decoding(publication: str) -> dict[str, str]:
    """Return the options by which a slot is decoded, the same whichever way it is read (pure).

    Args:
        publication: The publication's name.

    Returns:
        Option and value, as pgoutput takes them.
    """
    return {"proto_version": "1", "publication_names": f'"{publication}"', "messages": "true"}


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
        """Return the frames that are there, waiting for the first one (capture).

        A few frames cost as much to read as some hundreds, so they gather for a while.

        Args:
            wait_seconds: How long to wait where there is none, in seconds.
            most: About how many bytes at most.
            gather_seconds: How long more frames may gather from the first one on, in seconds.

        Returns:
            The frames, none where nothing came.

        Raises:
            ServerUnavailable: The server ended the stream.
        """
        frames: list[bytes] = []
        take, size, until = self.connection.pgconn.get_copy_data, 0, 0.0
        while size < most and not self.over:
            length, data = take(1)
            if length > 0:
                until = until or time.monotonic() + gather_seconds
                frames.append(bytes(data))
                size += length
            elif length < 0:
                self.over = True
            elif not self.more(max(0.0, until - time.monotonic()) if frames else wait_seconds):
                break
        if self.over and not frames:  # what came before the end is taken first
            self.ended()
        return frames

    def more(self, wait_seconds: float) -> bool:
        """Read what the socket has (capture).

        Args:
            wait_seconds: How long to wait for anything, in seconds.

        Returns:
            Whether it had anything.
        """
        if not self._poll.poll(wait_seconds * 1000):
            return False
        self.connection.pgconn.consume_input()
        self.heard = time.monotonic()
        return True

    def ended(self) -> None:
        """Look how the data ended.

        Raises:
            psycopg.Error: The server says what went wrong.
            ServerUnavailable: The data has no end.
        """
        result = self.connection.pgconn.get_result()
        if result is not None and result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result)
        raise ServerUnavailable(server_name(self.dsn), "the server ended the stream")


class Replication(CopyStream):
    """A session with the slot's walsender."""

    received = 0
    """Up to where the server has sent."""

    def identify(self, stream: Stream) -> None:
        """Raise SourceChanged unless the server has the prepared system identifier and timeline.

        Args:
            stream: What prepare made.

        Raises:
            SourceChanged: It is another server, or another timeline.
        """
        found = one_row(self.connection.execute("IDENTIFY_SYSTEM"))
        pairs = (("system identifier", stream.system_id, found[0]), ("timeline", stream.timeline, found[1]))
        for what, prepared, now in pairs:
            if str(prepared) != str(now):
                raise SourceChanged(what, str(prepared), str(now))

    def start(self, stream: Stream, at: int) -> None:
        """Begin to stream what committed at a position or later (capture).

        A server without an encoding sends its bytes as they are, so that one row which is no text
        does not end the stream.

        Args:
            stream: What prepare made.
            at: The LSN.

        Raises:
            LeaseHeld: Another session has the slot.
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
        """Tell the server what is durable (capture).

        Args:
            durable: The LSN up to which all is spooled.
            ping: Whether the server is to answer at once, which shows that it is alive.

        Raises:
            ServerUnavailable: The server ended the stream.
        """
        if self.over:
            self.ended()
        wire = self.connection.pgconn
        wire.put_copy_data(pgoutput.feedback(self.received, durable, datetime.now(UTC), ping=ping))
        wire.flush()

    def check_alive(self) -> None:
        """Raise ServerUnavailable when nothing has come for SILENCE_SECONDS, although we ask for answers.

        Raises:
            ServerUnavailable: The server has been silent for that long.
        """
        if time.monotonic() - self.heard > SILENCE_SECONDS:
            raise ServerUnavailable(server_name(self.dsn), f"nothing heard for {SILENCE_SECONDS:g} s")


def answer_interval(connection: Connection) -> float:
    """Return how often to answer, so that the server's wal_sender_timeout never strikes.

    Args:
        connection: A session with the store.

    Returns:
        Seconds between two answers.
    """
    row = one_row(connection.execute("SELECT setting::bigint FROM pg_settings WHERE name = 'wal_sender_timeout'"))
    return min(FEEDBACK_SECONDS, row[0] / 1000 / 3) if row[0] else FEEDBACK_SECONDS
