"""The rows of many messages at once, against an encoder and a reading of our own, one message after another."""

from __future__ import annotations

import json
import struct
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from changeover.errors import RowRefused
from changeover.jobs.decode import pgoutput
from changeover.jobs.decode.pgoutput import MalformedMessage
from changeover.jobs.decode.transactions import Assembler, difference
from changeover.jobs.ledger.records import SourceColumn
from changeover.jobs.spool.events import NOWHERE, Position
from changeover.stores.postgres.gate import OURS

WHEN = datetime(2026, 11, 21, 12, 30, 0, 123456, tzinfo=UTC)
MICROS = (WHEN - pgoutput.EPOCH) // timedelta(microseconds=1)
HEADER = b"w" + struct.pack("!QQq", 1, 2, MICROS)
UNSENT = "unsent"

TABLES = {
    "public.one": [
        SourceColumn("a", "text", 25, False, True, True),
        SourceColumn("b", "bigint", 20, False, True, True),
        SourceColumn("words", "text[]", 1009, True, False, False),
        SourceColumn("large", "text", 25, False, False, False),
    ],
    "public.two": [SourceColumn("id", "bigint", 20, False, True, True)],
}
OIDS = {"public.one": 70001, "public.two": 70002}


class Unsent(NamedTuple):
    """A value that an update did not send."""


Value = str | None | Unsent
Row = tuple[Value, ...]


class Change(NamedTuple):
    """What the writer did, and how the stream tells it."""

    table: str
    op: str
    old_kind: str
    old: Row | None
    new: Row | None


def cstring(text: str) -> bytes:
    return text.encode() + b"\0"


def framed(message: bytes) -> bytes:
    return HEADER + message


def encoded(row: Row) -> bytes:
    parts = [struct.pack("!H", len(row))]
    for value in row:
        if isinstance(value, str):
            raw = value.encode()
            parts.append(b"t" + struct.pack("!I", len(raw)) + raw)
        else:
            parts.append(b"n" if value is None else b"u")
    return b"".join(parts)


def described(table: str) -> bytes:
    columns = TABLES[table]
    schema, name = table.split(".")
    parts = [bytes([c.key]) + cstring(c.name) + struct.pack("!Ii", c.oid, -1) for c in columns]
    head = b"R" + struct.pack("!I", OIDS[table]) + cstring(schema) + cstring(name) + b"d" + struct.pack("!H", len(columns))
    return framed(head + b"".join(parts))


def begin(lsn: int, xid: int) -> bytes:
    return framed(b"B" + struct.pack("!QqI", lsn, MICROS, xid))


def commit(lsn: int) -> bytes:
    return framed(b"C\0" + struct.pack("!QQq", lsn, lsn + 8, MICROS))


def told(change: Change) -> bytes:
    old = change.old_kind.encode() + encoded(change.old) if change.old is not None else b""
    new = b"N" + encoded(change.new) if change.new is not None else b""
    return framed(change.op.encode() + struct.pack("!I", OIDS[change.table]) + old + new)


def image(names: list[str], row: Row, chosen: list[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i in chosen:
        value = row[i]
        if not isinstance(value, Unsent):
            found[names[i]] = (
                value if names[i] != "words" or value is None else json.dumps(value[1:-1].split(","), ensure_ascii=False)
            )
    return found


def expected(change: Change, lsn: int, index: int, xid: int) -> dict[str, Any]:
    """Return the event of one change, the plain way."""
    columns = TABLES[change.table]
    names, everything = [c.name for c in columns], list(range(len(columns)))
    keys = [i for i, column in enumerate(columns) if column.key]
    new, old = change.new, change.old
    if new is not None and old is not None and change.old_kind == "O":
        new = tuple(o if isinstance(n, Unsent) else n for n, o in zip(new, old, strict=True))
    moved = new is None or (old is not None and any(old[i] != new[i] and not isinstance(new[i], Unsent) for i in keys))
    return {
        "relation": change.table,
        "lsn": lsn,
        "ordinal": 2 * index,
        "op": change.op,
        "row": None if new is None else image(names, new, everything),
        "key": image(names, old, keys) if old is not None and moved else None,
        "missing": [] if new is None else [name for name, value in zip(names, new, strict=True) if isinstance(value, Unsent)],
        "xid": xid,
        "committed_at": WHEN,
        "note": None,
    }


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
keys = st.tuples(st.sampled_from(["x", "y", "é", ""]), st.sampled_from(["1", "2"]))
arrays = st.lists(st.sampled_from(["p", "q", "é"]), min_size=1, max_size=3).map(lambda words: "{" + ",".join(words) + "}")
sent = st.tuples(st.none() | arrays, st.none() | texts)
unsent = st.tuples(st.just(Unsent()) | arrays, st.just(Unsent()) | texts)


@st.composite
def changes(draw: st.DrawFn) -> Change:
    if draw(st.booleans()):
        op = draw(st.sampled_from("ID"))
        row = (draw(st.sampled_from(["1", "2", "3"])),)
        return Change("public.two", op, "" if op == "I" else "K", None if op == "I" else row, row if op == "I" else None)
    op = draw(st.sampled_from("IUUUD"))
    kind = "" if op == "I" else draw(st.sampled_from("KO" if op == "D" else ["", "K", "O"]))
    old = None
    if kind:
        old = (*draw(keys), *((None, None) if kind == "K" else draw(sent)))
    new = None if op == "D" else (*draw(keys), *(draw(sent) if op == "I" else draw(unsent)))
    return Change("public.one", op, kind, old, new)


transactions = st.lists(st.lists(changes(), max_size=6), max_size=6)


def stream(done: list[list[Change]]) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Return the frames of some transactions, each table described where it first comes, and the events."""
    frames: list[bytes] = []
    events: list[dict[str, Any]] = []
    known: set[str] = set()
    for number, made in enumerate(done):
        lsn, xid = 1000 + 100 * number, 7 + number
        frames.append(begin(lsn, xid))
        for index, change in enumerate(made):
            if change.table not in known:
                known.add(change.table)
                frames.append(described(change.table))
            frames.append(told(change))
            events.append(expected(change, lsn, index, xid))
        frames.append(commit(lsn))
    return frames, events


def found(assembler: Assembler) -> list[dict[str, Any]]:
    taken = assembler.taken()
    rows: list[dict[str, Any]] = pa.concat_tables(taken).to_pylist(maps_as_pydicts="strict") if taken else []
    return sorted(rows, key=lambda row: (row["lsn"], row["ordinal"]))


@settings(deadline=None)
@given(transactions, st.data())
def test_any_stream_taken_in_any_parts_gives_the_same_events(done: list[list[Change]], data: st.DataObject) -> None:
    frames, events = stream(done)
    assembler = Assembler(TABLES)
    rows: list[dict[str, Any]] = []
    ends: list[int] = []
    at = 0
    while at < len(frames):
        size = data.draw(st.integers(1, len(frames)))
        ends += assembler.take(frames[at : at + size])
        rows += found(assembler)
        at += size
    assert rows == events
    assert ends == [1000 + 100 * number + 8 for number in range(len(done))]
    assert assembler.open is None


@settings(deadline=None)
@given(transactions, st.data())
def test_what_is_held_is_left_out(done: list[list[Change]], data: st.DataObject) -> None:
    frames, events = stream(done)
    held: Position = NOWHERE
    if events:
        last = data.draw(st.sampled_from(events))
        held = (last["lsn"], last["ordinal"])
    assembler = Assembler(TABLES, held=held)
    assembler.take(frames)
    assert found(assembler) == [event for event in events if (event["lsn"], event["ordinal"]) > held]


@settings(deadline=None)
@given(changes(), st.data())
def test_a_row_cut_short_or_too_long_is_refused(change: Change, data: st.DataObject) -> None:
    whole = told(change)
    cut = data.draw(st.integers(len(HEADER) + 1, len(whole) - 1))
    for wrong in (whole[:cut], whole + b"n"):
        assembler = Assembler(TABLES)
        assembler.take([begin(1000, 7), described(change.table)])
        with pytest.raises(MalformedMessage):
            # a message behind it must not lend it its bytes
            assembler.take([wrong, told(change), told(change)])


ROW = encoded(("x", "1", None, None))


@pytest.mark.parametrize(
    "message",
    [
        b"Z", b"I\0\1\x11\x71X" + ROW, b"D\0\1\x11\x71N" + ROW, b"U\0\1\x11\x71K" + ROW + b"Z" + ROW, b"I\0\1\x11\x71N\0\1n",
        b"I\0\1\x11\x71N\0\4t\xff\xff\xff\xffnnn", b"I\0\1\x11\x71N\0\4znnn",
        b"I\0\0\0\1N" + ROW,
        b"B", b"C\0", b"B" + struct.pack("!QqI", 5, MICROS, 9),
    ],
)  # fmt: skip
def test_bytes_of_no_known_message_are_refused(message: bytes) -> None:
    assembler = Assembler(TABLES)
    assembler.take([begin(1000, 7), described("public.one")])
    with pytest.raises(MalformedMessage):
        assembler.take([framed(message)])


def test_in_the_place_of_a_row_that_is_no_text_its_table_is_said_to_have_one() -> None:
    assembler = Assembler(TABLES)
    bad, good = b"I\0\1\x11\x71N\0\4t\0\0\0\1\xffnnn", b"I\0\1\x11\x71N" + ROW
    assembler.take([begin(1000, 7), described("public.one"), *map(framed, (good, bad, good))])
    events = pa.concat_tables(assembler.taken()).to_pylist()
    assert [(event["op"], event["ordinal"]) for event in events] == [("I", 0), ("R", 2), ("I", 4)]
    assert events[1]["note"] == "a row came whose a held bytes that are no UTF-8: correct it"


def test_a_change_outside_of_a_transaction_is_refused() -> None:
    change = Change("public.two", "I", "", None, ("1",))
    for frames in ([told(change)], [begin(1, 1), commit(1), told(change)], [commit(1)], [HEADER]):
        assembler = Assembler(TABLES)
        assembler.take([begin(900, 6), described("public.two"), commit(900)])
        with pytest.raises(MalformedMessage):
            assembler.take(frames)


def marked(prefix: str, content: str, transactional: bool = True) -> bytes:
    raw = content.encode()
    return framed(b"M" + struct.pack("!BQ", transactional, 1) + cstring(prefix) + struct.pack("!I", len(raw)) + raw)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_what_follows_our_mark_in_its_transaction_bears_it(size: int) -> None:
    two = told(Change("public.two", "I", "", None, ("1",)))
    empty = framed(b"T" + struct.pack("!IBI", 1, 0, OIDS["public.two"]))
    frames = [
        begin(1000, 7), described("public.two"), two, marked(OURS, "changes"), two, marked("other", "x"), two, empty, commit(1000),
        begin(2000, 8), two, commit(2000), begin(3000, 9), marked(OURS, "no", transactional=False), two,
        marked(OURS, "images"), two, commit(3000),
    ]  # fmt: skip
    assembler = Assembler(TABLES)
    rows: list[dict[str, Any]] = []
    for at in range(0, len(frames), size):
        assembler.take(frames[at : at + size])
        rows += found(assembler)
    assert [(row["lsn"], row["ordinal"], row["op"], row["note"]) for row in rows] == [
        (1000, 0, "I", None), (1000, 4, "I", "changes"), (1000, 8, "I", "changes"), (1000, 10, "T", "changes"),
        (2000, 0, "I", None), (3000, 0, "I", None), (3000, 4, "I", "images"),
    ]  # fmt: skip


def test_an_array_of_its_own_bounds_is_marked_and_no_array_is_refused() -> None:
    assembler = Assembler(TABLES)
    row: Row = ("x", "1", "[0:1]={p,q}", None)
    assembler.take([begin(1000, 7), described("public.one"), told(Change("public.one", "I", "", None, row))])
    assert found(assembler)[0]["row"]["words"] == "[[[0:1]={p,q}"
    with pytest.raises(RowRefused, match=r"public\.one.*column words"):
        assembler.take([told(Change("public.one", "I", "", None, ("x", "2", "p", None)))])


@pytest.mark.parametrize(("modifier", "differs"), [(655366, True), (-1, True), (655364, False)])
def test_another_modifier_is_another_type(modifier: int, differs: bool) -> None:
    """numeric(10,2) to numeric(10,4) or numeric rewrites no row, and the old scale would round what comes."""
    prepared = [SourceColumn("n", "numeric(10,2)", 1700, False, False, False, 655364)]
    relation = pgoutput.Relation(1, "public", "t", "d", (pgoutput.Column("n", 1700, modifier, False),))
    assert bool(difference(relation, prepared, frozenset())) is differs
