"""The wire: frames of PostgreSQL's streaming replication, and pgoutput's messages about tables; rows are read by `columns`.

Pure functions over bytes (protocol version 1, values as text): no connection, no state, no knowledge of tables. Every
byte of a message is accounted for, so a message that is cut short raises MalformedMessage and is never skipped. The formats
are those of the chapters "Streaming Replication Protocol" and "Logical Replication Message Formats" of the PostgreSQL
documentation.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeVar

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
"""PostgreSQL counts microseconds from here."""

EPOCH_MICROS = 946_684_800_000_000
"""The same moment in microseconds since 1970, as Arrow counts."""


class MalformedMessage(ValueError):
    """Bytes that no known message has."""


class Column(NamedTuple):
    """A column as it was at that point of the stream; `key` when it is part of the replica identity."""

    name: str
    oid: int
    typmod: int
    key: bool


class Relation(NamedTuple):
    """A table as it was at that point of the stream; `identity` is d, n, f or i (default, nothing, full, index)."""

    oid: int
    schema: str
    name: str
    identity: str
    columns: tuple[Column, ...]


class Truncate(NamedTuple):
    """Tables emptied by one statement."""

    relations: tuple[int, ...]
    cascade: bool
    restart_identity: bool


class Message(NamedTuple):
    """A message written by pg_logical_emit_message."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


class Keepalive(NamedTuple):
    """The server has sent all up to `wal_end`; it wants an answer at once when `reply`."""

    wal_end: int
    reply: bool


KEEPALIVE, XLOG_DATA = ord("k"), ord("w")
XLOG_HEADER = 25
"""Bytes before the pgoutput message in an XLogData frame: kind, start, end, clock."""

_u16 = struct.Struct("!H").unpack_from
_u32 = struct.Struct("!I").unpack_from
_column = struct.Struct("!Ii")
_message = struct.Struct("!xBQ")
_keepalive = struct.Struct("!xQqB")
_feedback = struct.Struct("!cQQQqB")


def relation(data: bytes) -> Relation:
    """Return a Relation message; raises MalformedMessage."""
    return _whole(_read_relation, data)


def truncate(data: bytes) -> Truncate:
    """Return a Truncate message; raises MalformedMessage."""
    return _whole(_read_truncate, data)


def message(data: bytes) -> Message:
    """Return a logical decoding message; raises MalformedMessage."""
    return _whole(_read_message, data)


Read = TypeVar("Read")


def _whole(read: Callable[[bytes], tuple[Read, int]], data: bytes) -> Read:
    try:
        parsed, end = read(data)
    except (struct.error, IndexError, ValueError) as error:
        raise MalformedMessage(f"a message of {len(data)} bytes can't be read: {error}") from error
    if end != len(data):
        raise MalformedMessage(f"a message of {len(data)} bytes reads as one of {end}")
    return parsed


def keepalive(data: bytes) -> Keepalive:
    """Return a keepalive frame (pure).

    Args:
        data: The frame's bytes.

    Returns:
        Up to where the server has sent, an LSN, and whether it asks for an answer.

    Raises:
        MalformedMessage: The frame can't be read.
    """
    if len(data) != _keepalive.size:
        raise MalformedMessage(f"a keepalive of {len(data)} bytes")
    wal_end, _, reply = _keepalive.unpack(data)
    return Keepalive(wal_end, bool(reply))


def feedback(received: int, durable: int, now: datetime, *, ping: bool = False) -> bytes:
    """Return a status update for the server (pure).

    Args:
        received: Up to where the server's bytes came, an LSN.
        durable: The LSN up to which all may be forgotten.
        now: The time that it bears.
        ping: Whether it asks for an answer at once.

    Returns:
        The message's bytes.
    """
    micros = (now - EPOCH) // timedelta(microseconds=1)
    return _feedback.pack(b"r", max(received, durable), durable, durable, micros, ping)


def _string(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(b"\0", at)
    return data[at:end].decode(), end + 1


def _read_relation(data: bytes) -> tuple[Relation, int]:
    (oid,) = _u32(data, 1)
    schema, at = _string(data, 5)
    name, at = _string(data, at)
    identity = chr(data[at])
    (count,) = _u16(data, at + 1)
    at += 3
    columns = []
    for _ in range(count):
        key = bool(data[at] & 1)
        column, at = _string(data, at + 1)
        type_oid, typmod = _column.unpack_from(data, at)
        columns.append(Column(column, type_oid, typmod, key))
        at += _column.size
    # an empty schema stands for pg_catalog
    return Relation(oid, schema or "pg_catalog", name, identity, tuple(columns)), at


def _read_truncate(data: bytes) -> tuple[Truncate, int]:
    count, options = struct.unpack_from("!xIB", data)
    relations = struct.unpack_from(f"!{count}I", data, 6)
    return Truncate(relations, bool(options & 1), bool(options & 2)), 6 + 4 * count


def _read_message(data: bytes) -> tuple[Message, int]:
    flags, lsn = _message.unpack_from(data)
    prefix, at = _string(data, _message.size)
    end = at + 4 + _u32(data, at)[0]
    return Message(bool(flags & 1), lsn, prefix, data[at + 4 : end]), end
