"""The messages about tables against an encoder of its own, and against bytes that are no message."""

from __future__ import annotations

import struct
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from changeover.jobs.decode import pgoutput
from changeover.jobs.decode.pgoutput import MalformedMessage

WHEN = datetime(2026, 11, 21, 12, 30, 0, 123456, tzinfo=UTC)
MICROS = (WHEN - pgoutput.EPOCH) // timedelta(microseconds=1)

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
oids = st.integers(0, 2**32 - 1)
lsns = st.integers(0, 2**63 - 1)


def cstring(text: str) -> bytes:
    return text.encode() + b"\0"


@given(st.lists(st.tuples(texts, oids, st.integers(-1, 2**31 - 1), st.booleans()), max_size=8), texts)
def test_relation_round_trip(columns: list[tuple[str, int, int, bool]], name: str) -> None:
    parts = [bytes([key]) + cstring(column) + struct.pack("!Ii", oid, typmod) for column, oid, typmod, key in columns]
    data = b"R" + struct.pack("!I", 7) + b"\0" + cstring(name) + b"d" + struct.pack("!H", len(columns)) + b"".join(parts)
    expected = tuple(pgoutput.Column(*column) for column in columns)
    assert pgoutput.relation(data) == pgoutput.Relation(7, "pg_catalog", name, "d", expected)


@given(st.lists(oids, max_size=5), st.booleans(), st.booleans())
def test_truncate_round_trip(relations: list[int], cascade: bool, restart: bool) -> None:
    data = b"T" + struct.pack(f"!IB{len(relations)}I", len(relations), cascade + 2 * restart, *relations)
    assert pgoutput.truncate(data) == pgoutput.Truncate(tuple(relations), cascade, restart)


@given(st.booleans(), lsns, texts, st.binary())
def test_message_round_trip(transactional: bool, lsn: int, prefix: str, content: bytes) -> None:
    data = b"M" + struct.pack("!BQ", transactional, lsn) + cstring(prefix) + struct.pack("!I", len(content)) + content
    assert pgoutput.message(data) == pgoutput.Message(transactional, lsn, prefix, content)


@given(st.lists(oids, max_size=5), st.data())
def test_a_message_cut_short_or_too_long_is_refused(relations: list[int], data: st.DataObject) -> None:
    whole = b"T" + struct.pack(f"!IB{len(relations)}I", len(relations), 0, *relations)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(MalformedMessage):
        pgoutput.truncate(whole[:cut])
    with pytest.raises(MalformedMessage):
        pgoutput.truncate(whole + b"n")


def test_frames() -> None:
    assert pgoutput.keepalive(b"k" + struct.pack("!QqB", 77, MICROS, 1)) == pgoutput.Keepalive(77, True)
    with pytest.raises(MalformedMessage):
        pgoutput.keepalive(b"k")
    assert pgoutput.feedback(9, 5, WHEN, ping=True) == b"r" + struct.pack("!QQQqB", 9, 5, 5, MICROS, 1)
