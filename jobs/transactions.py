"""Transactions: the stream's messages put together as spool events, each at its place on the version axis.

Events come out one by one, in stream order, with their commit LSN, which the stream tells before the first of them; so a
transaction of any size passes through. The ordinal of a change is twice its index among all data messages of the transaction,
counted before anything is left out, so another connection that reads the same log gives the same places, and what is held
already is known by its place. What follows the mark of our own writes in its transaction has that mark as its note. A table that
differs from the prepared one gets an event that says how, at its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from typing import Any

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer

from changeover.errors import RowRefused, SourceChanged
from changeover.jobs import pgoutput
from changeover.jobs.entries import SourceColumn
from changeover.jobs.pgoutput import UNCHANGED, Values
from changeover.jobs.spool import ADDED, DELETE, INSERT, MARKER, NOWHERE, RELATION, TRUNCATE, UPDATE, Event, Image, Place
from changeover.stores.gate import OURS

log = logging.getLogger(__name__)

MARKER_PREFIX = "changeover"
TEXT_ARRAY, BOX_ARRAY = 1009, 1020
VECTORS = (22, 30)
"""int2vector and oidvector, which are arrays to the catalogue but are written as words."""


class Shape:
    """How the values of one table's messages become a spool event's row and key."""

    def __init__(self, name: str, relation: pgoutput.Relation, prepared: Sequence[SourceColumn]) -> None:
        by_name = {column.name: column for column in prepared}
        self.name = name
        self.columns = tuple(column.name for column in relation.columns)
        self.keys = [i for i, column in enumerate(self.columns) if column in by_name and by_name[column].key]
        self.key_columns = tuple(self.columns[i] for i in self.keys)
        self.arrays = [
            (i, _array_loader(column.oid))
            for i, column in enumerate(relation.columns)
            if column.name in by_name and by_name[column.name].array
        ]

    def row(self, values: Values, old: Values | None = None) -> tuple[Image, tuple[str, ...]]:
        """Return the row and the names of the values that were not sent; a whole old row supplies those."""
        if old is not None and UNCHANGED in values:
            values = tuple(o if v is UNCHANGED else v for v, o in zip(values, old, strict=True))
        if self.arrays:
            values = self._with_arrays(values)
        if UNCHANGED not in values:
            return (self.columns, values), ()  # type: ignore[return-value]
        sent = [v is not UNCHANGED for v in values]
        names = tuple(n for n, there in zip(self.columns, sent, strict=True) if there)
        missing = tuple(n for n, there in zip(self.columns, sent, strict=True) if not there)
        return (names, tuple(v for v in values if v is not UNCHANGED)), missing

    def key(self, values: Values) -> Image:
        """Return the key columns of an old row."""
        values = self._with_arrays(values)
        return self.key_columns, tuple(values[i] for i in self.keys)  # type: ignore[misc]

    def key_moved(self, old: Values, new: Values) -> bool:
        """Return whether an update gave its row another key; that an old image was sent does not yet say so."""
        return any(old[i] != new[i] and new[i] is not UNCHANGED for i in self.keys)

    def _with_arrays(self, values: Values) -> Values:
        """Return the values with each array as JSON."""
        changed = list(values)
        for index, load_array in self.arrays:
            if isinstance(text := values[index], str):
                changed[index] = self._array(self.columns[index], text, load_array)
        return tuple(changed)

    def _array(self, name: str, text: str, load_array: Callable[[bytes], object]) -> str:
        if text.startswith("["):  # bounds of its own, which the loader would lose: marked as the snapshot's reader marks them
            return f"[[{text}"
        try:
            return _json(load_array(text.encode()))
        except psycopg.DataError as error:
            raise RowRefused(self.name, f"column {name}", f"its value is no array literal: {error}") from error


def _json(value: Any) -> str:
    """Write an array of texts as `json.dumps` does, which makes an encoder anew for each list."""
    if isinstance(value, str):
        return encode_basestring(value)
    return "null" if value is None else f"[{', '.join([_json(part) for part in value])}]"


def _array_loader(oid: int) -> Callable[[bytes], object]:
    if oid in VECTORS:
        return lambda raw: raw.decode().split()
    # text[] reads any array as its elements' texts; box[] alone has another delimiter, by which psycopg knows it
    return Transformer().get_loader(oid if oid == BOX_ARRAY else TEXT_ARRAY, pq.Format.TEXT).load


def difference(relation: pgoutput.Relation, prepared: Sequence[SourceColumn], generated: frozenset[str]) -> str:
    """Return what a table in the stream lacks of the prepared one, naming each column; empty when it has all of it.

    Stored generated columns are not part of the stream: their absence is no difference.
    """
    now = {column.name: column for column in relation.columns}
    before = {column.name: column for column in prepared}
    found = [f"column {name} was dropped" for name in before if name not in now and name not in generated]
    for name in now.keys() & before.keys():
        if now[name].oid != before[name].oid:
            found.append(f"column {name} has another type (oid {now[name].oid}, was {before[name].type})")
        if relation.identity != "f" and now[name].key != before[name].key:
            found.append(f"column {name} {'became' if now[name].key else 'is no longer'} part of the replica identity")
    return "; ".join(sorted(found))


def additions(relation: pgoutput.Relation, prepared: Sequence[SourceColumn]) -> str:
    """Return the columns that a table has beyond the prepared ones, or an empty text."""
    before = {column.name for column in prepared}
    return "; ".join(f"column {c.name} was added (type oid {c.oid})" for c in relation.columns if c.name not in before)


@dataclass
class Assembler:
    """Turns the messages of one connection into events, which gather in `events`; table shapes last as long as the connection.

    What lies at or below `held` is left out. The ordinal of a change is twice its index among all data messages of its
    transaction, whatever comes of them; that a table looks different stands one below the first change in the new shape, and
    comes with that change.
    """

    tables: Mapping[str, Sequence[SourceColumn]]
    generated: Mapping[str, frozenset[str]] = field(default_factory=dict)
    held: Place = NOWHERE
    events: list[Event] = field(default_factory=list)
    marker: bool = False
    shapes: dict[int, Shape] = field(default_factory=dict)
    told: set[tuple[str, str]] = field(default_factory=set)
    open: pgoutput.Begin | None = None

    def __post_init__(self) -> None:
        """Build the table of what to do with each kind of message; the kinds left out say nothing to us."""
        self._index = 0
        self._ours: str | None = None
        self._notes: list[Event] = []
        self._take: dict[type, Callable[[Any], int | None]] = {
            pgoutput.Begin: self._begin,
            pgoutput.Commit: self._commit,
            pgoutput.Insert: lambda m: self._change(m.relation, INSERT, m.new),
            pgoutput.Update: lambda m: self._change(m.relation, UPDATE, m.new, m.kind, m.old),
            pgoutput.Delete: lambda m: self._change(m.relation, DELETE, None, m.kind, m.old),
            pgoutput.Truncate: lambda m: self._note(TRUNCATE, [self._shape(relation).name for relation in m.relations], self._ours),
            pgoutput.Message: self._message,
            pgoutput.Relation: self._relation,
        }

    def feed(self, message: pgoutput.Decoded) -> int | None:
        """Take a message; at a commit return the commit's end LSN."""
        take = self._take.get(type(message))
        return take(message) if take else None

    def taken(self) -> list[Event]:
        """Return the events so far and begin anew."""
        events, self.events, self.marker = self.events, [], False
        return events

    def _begin(self, message: pgoutput.Begin) -> None:
        self.open, self._index, self._ours = message, 0, None

    def _commit(self, message: pgoutput.Commit) -> int:
        self._now()
        self.open = None
        return message.end_lsn

    def _now(self) -> pgoutput.Begin:
        if self.open is None:
            raise pgoutput.MalformedMessage("a change outside of a transaction")
        return self.open

    def _shape(self, relation: int) -> Shape:
        if relation not in self.shapes:
            raise pgoutput.MalformedMessage(f"a change of the relation {relation}, which was not described")
        return self.shapes[relation]

    def _next(self) -> tuple[int, int, int, int, bool]:
        """Return the commit LSN, ordinal, xid and time of the next data message, and whether it is held already."""
        lsn, committed_at, xid = self._now()
        ordinal = 2 * self._index
        self._index += 1
        held = (lsn, ordinal) <= self.held
        if self._notes:
            self.events += [] if held else self._notes
            self._notes = []
        return lsn, ordinal, xid, committed_at, held

    def _change(self, relation: int, op: str, new: Values | None, kind: str = "", old: Values | None = None) -> None:
        shape = self._shape(relation)
        lsn, ordinal, xid, committed_at, held = self._next()
        if held:
            return
        row: Image | None = None
        key: Image | None = None
        missing: tuple[str, ...] = ()
        if new is not None:
            row, missing = shape.row(new, old if kind == "O" else None)
        if old is not None and (new is None or shape.key_moved(old, new)):
            key = shape.key(old)
        self.events.append(Event(shape.name, lsn, ordinal, op, row, key, missing, xid, committed_at, self._ours))

    def _note(self, op: str, relations: Sequence[str], note: str | None = None) -> None:
        lsn, ordinal, xid, committed_at, held = self._next()
        if not held:
            self.events += [Event(name, lsn, ordinal, op, None, None, (), xid, committed_at, note) for name in relations]

    def _message(self, message: pgoutput.Message) -> None:
        if message.transactional:
            ours = message.prefix == MARKER_PREFIX
            self._note(MARKER, [""] if ours else [], message.content.decode(errors="backslashreplace"))
            self.marker |= ours
            if message.prefix == OURS:
                self._ours = message.content.decode(errors="backslashreplace")

    def _relation(self, relation: pgoutput.Relation) -> None:
        name = f"{relation.schema}.{relation.name}"
        known = self.shapes.get(relation.oid)
        if name not in self.tables and known is None:
            raise SourceChanged("publication", ", ".join(sorted(self.tables)), f"one with {name}")
        source = name if name in self.tables else known.name  # type: ignore[union-attr]
        self.shapes[relation.oid] = Shape(source, relation, self.tables[source])
        found = difference(relation, self.tables[source], self.generated.get(source, frozenset()))
        if name != source:
            found = f"the table was renamed to {name}" + (f"; {found}" if found else "")
        # a renamed column is one that was dropped and one that was added
        note = "; ".join(filter(None, (found, additions(relation, self.tables[source]))))
        if note:
            lsn, committed_at, xid = self._now()
            op = RELATION if found else ADDED
            if (source, note) not in self.told:
                self.told.add((source, note))
                log.warning("%s: %s", source, note)
            self._notes.append(Event(source, lsn, 2 * self._index - 1, op, None, None, (), xid, committed_at, note))
