"""The decoder against an encoder of its own, and against bytes that are no message."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from changeover.jobs import pgoutput
from changeover.jobs.pgoutput import UNCHANGED, MalformedMessage, Values

WHEN = datetime(2026, 11, 21, 12, 30, 0, 123456, tzinfo=UTC)
MICROS = (WHEN - pgoutput.EPOCH) // timedelta(microseconds=1)

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
values = st.lists(st.one_of(st.none(), st.just(UNCHANGED), st.just(""), texts), max_size=20).map(tuple)
oids = st.integers(0, 2**32 - 1)
lsns = st.integers(0, 2**63 - 1)


def encoded(row: Values) -> bytes:
    parts = [struct.pack("!H", len(row))]
    for value in row:
        if value is None:
            parts.append(b"n")
        elif value is UNCHANGED:
            parts.append(b"u")
        else:
            raw = str(value).encode()
            parts.append(b"t" + struct.pack("!I", len(raw)) + raw)
    return b"".join(parts)


def cstring(text: str) -> bytes:
    return text.encode() + b"\0"


@given(oids, values)
def test_insert_round_trip(relation: int, new: Values) -> None:
    data = b"I" + struct.pack("!I", relation) + b"N" + encoded(new)
    assert pgoutput.decode(data) == pgoutput.Insert(relation, new)


@given(oids, values, values, st.sampled_from(["", "K", "O"]))
def test_update_round_trip(relation: int, old: Values, new: Values, kind: str) -> None:
    before = kind.encode() + encoded(old) if kind else b""
    data = b"U" + struct.pack("!I", relation) + before + b"N" + encoded(new)
    assert pgoutput.decode(data) == pgoutput.Update(relation, kind, old if kind else None, new)


@given(oids, values, st.sampled_from(["K", "O"]))
def test_delete_round_trip(relation: int, old: Values, kind: str) -> None:
    data = b"D" + struct.pack("!I", relation) + kind.encode() + encoded(old)
    assert pgoutput.decode(data) == pgoutput.Delete(relation, kind, old)


@given(lsns, lsns, oids)
def test_begin_and_commit_round_trip(lsn: int, end_lsn: int, xid: int) -> None:
    begin = b"B" + struct.pack("!QqI", lsn, MICROS, xid)
    commit = b"C\0" + struct.pack("!QQq", lsn, end_lsn, MICROS)
    assert pgoutput.decode(begin) == pgoutput.Begin(lsn, round(WHEN.timestamp() * 1_000_000), xid)
    assert pgoutput.decode(commit) == pgoutput.Commit(lsn, end_lsn)


@given(st.lists(st.tuples(texts, oids, st.integers(-1, 2**31 - 1), st.booleans()), max_size=8), texts)
def test_relation_round_trip(columns: list[tuple[str, int, int, bool]], name: str) -> None:
    parts = [bytes([key]) + cstring(column) + struct.pack("!Ii", oid, typmod) for column, oid, typmod, key in columns]
    data = b"R" + struct.pack("!I", 7) + b"\0" + cstring(name) + b"d" + struct.pack("!H", len(columns)) + b"".join(parts)
    expected = tuple(pgoutput.Column(*column) for column in columns)
    assert pgoutput.decode(data) == pgoutput.Relation(7, "pg_catalog", name, "d", expected)


@given(st.lists(oids, max_size=5), st.booleans(), st.booleans())
def test_truncate_round_trip(relations: list[int], cascade: bool, restart: bool) -> None:
    data = b"T" + struct.pack(f"!IB{len(relations)}I", len(relations), cascade + 2 * restart, *relations)
    assert pgoutput.decode(data) == pgoutput.Truncate(tuple(relations), cascade, restart)


@given(st.booleans(), lsns, texts, st.binary())
def test_message_round_trip(transactional: bool, lsn: int, prefix: str, content: bytes) -> None:
    data = b"M" + struct.pack("!BQ", transactional, lsn) + cstring(prefix) + struct.pack("!I", len(content)) + content
    assert pgoutput.decode(data) == pgoutput.Message(transactional, lsn, prefix, content)


@given(oids, texts, texts, lsns)
def test_type_and_origin_round_trip(oid: int, schema: str, name: str, lsn: int) -> None:
    kind = b"Y" + struct.pack("!I", oid) + cstring(schema) + cstring(name)
    assert pgoutput.decode(kind) == pgoutput.Type(oid, schema or "pg_catalog", name)
    assert pgoutput.decode(b"O" + struct.pack("!Q", lsn) + cstring(name)) == pgoutput.Origin(lsn, name)


@given(values, st.data())
def test_a_message_cut_short_or_too_long_is_refused(new: Values, data: st.DataObject) -> None:
    whole = b"I" + struct.pack("!I", 1) + b"N" + encoded(new)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(MalformedMessage):
        pgoutput.decode(whole[:cut])
    with pytest.raises(MalformedMessage):
        pgoutput.decode(whole + b"n")


@pytest.mark.parametrize("data", [b"", b"Z", b"I\0\0\0\1X", b"D\0\0\0\1N\0\0", b"I\0\0\0\1N\0\1z", b"I\0\0\0\1N\0\1t\0\0\0\1\xff"])
def test_bytes_of_no_known_message_are_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        pgoutput.decode(data)


def test_frames() -> None:
    frame = b"w" + struct.pack("!QQq", 1, 2, MICROS) + b"B" + struct.pack("!QqI", 5, MICROS, 9)
    assert pgoutput.decode(frame, pgoutput.XLOG_HEADER) == pgoutput.Begin(5, round(WHEN.timestamp() * 1_000_000), 9)
    assert pgoutput.keepalive(b"k" + struct.pack("!QqB", 77, MICROS, 1)) == pgoutput.Keepalive(77, True)
    with pytest.raises(MalformedMessage):
        pgoutput.keepalive(b"k")
    assert pgoutput.feedback(9, 5, WHEN, ping=True) == b"r" + struct.pack("!QQQqB", 9, 5, 5, MICROS, 1)
