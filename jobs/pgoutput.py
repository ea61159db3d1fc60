"""The wire: PostgreSQL's streaming replication frames and pgoutput messages as typed values, and back where we answer.

Pure functions over bytes (protocol version 1, values as text): no connection, no state, no knowledge of tables. Every
byte of a message is accounted for, so a message that is cut short or of an unknown kind raises MalformedMessage and
is never skipped. The formats are those of the chapters "Streaming Replication Protocol" and "Logical Replication
Message Formats" of the PostgreSQL documentation.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import NamedTuple

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
"""PostgreSQL counts microseconds from here."""

EPOCH_MICROS = 946_684_800_000_000
"""The same moment in microseconds since 1970, as Arrow counts."""


class MalformedMessage(ValueError):
    """Bytes that no known message has."""


class Unchanged(Enum):
    """The mark of a large (TOAST) value that an update left alone and so did not send: no value, and not NULL."""

    UNCHANGED = "unchanged"


UNCHANGED = Unchanged.UNCHANGED
Value = str | None | Unchanged
Values = tuple[Value, ...]


class Begin(NamedTuple):
    """A transaction follows; `commit_lsn` is the start of its commit record, `committed_at` in microseconds since 1970."""

    commit_lsn: int
    committed_at: int
    xid: int


class Commit(NamedTuple):
    """The transaction is whole; `end_lsn` is the end of its commit record."""

    commit_lsn: int
    end_lsn: int


class Origin(NamedTuple):
    """The transaction came here by replication."""

    lsn: int
    name: str


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


class Type(NamedTuple):
    """A type that is not built in."""

    oid: int
    schema: str
    name: str


class Insert(NamedTuple):
    """A new row."""

    relation: int
    new: Values


class Update(NamedTuple):
    """A changed row; `kind` says what `old` is: K the old key, O the whole old row, empty when none was sent."""

    relation: int
    kind: str
    old: Values | None
    new: Values


class Delete(NamedTuple):
    """A removed row; `kind` says what `old` is: K the key (other columns NULL), O the whole row."""

    relation: int
    kind: str
    old: Values


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


Decoded = Begin | Commit | Origin | Relation | Type | Insert | Update | Delete | Truncate | Message


class Keepalive(NamedTuple):
    """The server has sent all up to `wal_end`; it wants an answer at once when `reply`."""

    wal_end: int
    reply: bool


KEEPALIVE, XLOG_DATA = ord("k"), ord("w")
XLOG_HEADER = 25
"""Bytes before the pgoutput message in an XLogData frame: kind, start, end, clock."""

_u16 = struct.Struct("!H").unpack_from
_u32 = struct.Struct("!I").unpack_from
_begin = struct.Struct("!xQqI")
_commit = struct.Struct("!xBQQq")
_column = struct.Struct("!Ii")
_message = struct.Struct("!xBQ")
_keepalive = struct.Struct("!xQqB")
_feedback = struct.Struct("!cQQQqB")

_TEXT, _NULL, _UNCHANGED = ord("t"), ord("n"), ord("u")


def decode(data: bytes, start: int = 0) -> Decoded:
    """Return the pgoutput message that begins at `start` and ends with `data`; raises MalformedMessage."""
    try:
        message, end = _DECODERS[data[start]](data, start)
    except KeyError as error:
        raise MalformedMessage(f"a message of unknown kind {chr(data[start])!r}") from error
    except (struct.error, IndexError, ValueError) as error:
        raise MalformedMessage(f"a message of {len(data) - start} bytes can't be read: {error}") from error
    if end != len(data):
        raise MalformedMessage(f"a message of {len(data) - start} bytes reads as one of {end - start}")
    return message


def keepalive(data: bytes) -> Keepalive:
    """Return a keepalive frame; raises MalformedMessage."""
    if len(data) != _keepalive.size:
        raise MalformedMessage(f"a keepalive of {len(data)} bytes")
    wal_end, _, reply = _keepalive.unpack(data)
    return Keepalive(wal_end, bool(reply))


def feedback(received: int, durable: int, now: datetime, *, ping: bool = False) -> bytes:
    """Return a status update: all up to `durable` may be forgotten; `ping` asks for an answer at once."""
    micros = (now - EPOCH) // timedelta(microseconds=1)
    return _feedback.pack(b"r", max(received, durable), durable, durable, micros, ping)


def _string(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(b"\0", at)
    return data[at:end].decode(), end + 1


def _values(data: bytes, at: int) -> tuple[Values, int]:
    (count,) = _u16(data, at)
    at += 2
    values: list[Value] = []
    for _ in range(count):
        kind = data[at]
        if kind == _TEXT:
            begin = at + 5
            at = begin + _u32(data, at + 1)[0]
            values.append(data[begin:at].decode())
        elif kind == _NULL:
            values.append(None)
            at += 1
        elif kind == _UNCHANGED:
            values.append(UNCHANGED)
            at += 1
        else:
            raise ValueError(f"a value of unknown kind {chr(kind)!r}")
    return tuple(values), at


def _read_begin(data: bytes, at: int) -> tuple[Begin, int]:
    lsn, micros, xid = _begin.unpack_from(data, at)
    return Begin(lsn, EPOCH_MICROS + micros, xid), at + _begin.size


def _read_commit(data: bytes, at: int) -> tuple[Commit, int]:
    _, lsn, end_lsn, _ = _commit.unpack_from(data, at)
    return Commit(lsn, end_lsn), at + _commit.size


def _read_origin(data: bytes, at: int) -> tuple[Origin, int]:
    (lsn,) = struct.unpack_from("!xQ", data, at)
    name, end = _string(data, at + 9)
    return Origin(lsn, name), end


def _read_relation(data: bytes, at: int) -> tuple[Relation, int]:
    (oid,) = _u32(data, at + 1)
    schema, at = _string(data, at + 5)
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


def _read_type(data: bytes, at: int) -> tuple[Type, int]:
    (oid,) = _u32(data, at + 1)
    schema, at = _string(data, at + 5)
    name, at = _string(data, at)
    return Type(oid, schema or "pg_catalog", name), at


def _expect(data: bytes, at: int, kind: bytes) -> int:
    if data[at] != kind[0]:
        raise ValueError(f"{chr(data[at])!r} where {kind.decode()!r} has to be")
    return at + 1


def _read_insert(data: bytes, at: int) -> tuple[Insert, int]:
    new, end = _values(data, _expect(data, at + 5, b"N"))
    return Insert(_u32(data, at + 1)[0], new), end


def _read_update(data: bytes, at: int) -> tuple[Update, int]:
    (relation,) = _u32(data, at + 1)
    kind, old, at = chr(data[at + 5]), None, at + 5
    if kind in "KO":
        old, at = _values(data, at + 1)
    new, at = _values(data, _expect(data, at, b"N"))
    return Update(relation, "" if old is None else kind, old, new), at


def _read_delete(data: bytes, at: int) -> tuple[Delete, int]:
    kind = chr(data[at + 5])
    if kind not in "KO":
        raise ValueError(f"{kind!r} where 'K' or 'O' has to be")
    old, end = _values(data, at + 6)
    return Delete(_u32(data, at + 1)[0], kind, old), end


def _read_truncate(data: bytes, at: int) -> tuple[Truncate, int]:
    count, options = struct.unpack_from("!xIB", data, at)
    relations = struct.unpack_from(f"!{count}I", data, at + 6)
    return Truncate(relations, bool(options & 1), bool(options & 2)), at + 6 + 4 * count


def _read_message(data: bytes, at: int) -> tuple[Message, int]:
    flags, lsn = _message.unpack_from(data, at)
    prefix, at = _string(data, at + _message.size)
    end = at + 4 + _u32(data, at)[0]
    return Message(bool(flags & 1), lsn, prefix, data[at + 4 : end]), end


_DECODERS: dict[int, Callable[[bytes, int], tuple[Decoded, int]]] = {
    ord("B"): _read_begin,
    ord("C"): _read_commit,
    ord("O"): _read_origin,
    ord("R"): _read_relation,
    ord("Y"): _read_type,
    ord("I"): _read_insert,
    ord("U"): _read_update,
    ord("D"): _read_delete,
    ord("T"): _read_truncate,
    ord("M"): _read_message,
}
