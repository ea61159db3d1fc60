"""Transactions: the stream's messages put together as spool events, each at its place on the version axis.

A transaction comes out whole, at its commit, and nothing of it before. The ordinal of a change is twice its index
among all data messages of the transaction, counted before anything is left out, so another connection that reads the
same log gives the same events. A table that differs from the prepared one gets an event that says how, at its place
in the stream. A transaction is held in memory until its commit arrives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer

from changeover.errors import RowRefused, SourceChanged
from changeover.jobs import pgoutput
from changeover.jobs.entries import SourceColumn
from changeover.jobs.pgoutput import UNCHANGED, Values
from changeover.jobs.spool import ADDED, DELETE, INSERT, MARKER, RELATION, TRUNCATE, UPDATE, Event

MARKER_PREFIX = "changeover"
TEXT_ARRAY, BOX_ARRAY = 1009, 1020
VECTORS = (22, 30)
"""int2vector and oidvector, which are arrays to the catalogue but are written as words."""

Texts = Mapping[str, str | None]
Part = tuple[str, int, str, Texts | None, Texts | None, tuple[str, ...], str | None]
"""An event's relation, ordinal, op, row, key, missing and note: all but what its transaction says."""


class Shape:
    """How the values of one table's messages become a spool event's row and key."""

    def __init__(self, name: str, relation: pgoutput.Relation, prepared: Sequence[SourceColumn]) -> None:
        by_name = {column.name: column for column in prepared}
        self.name = name
        self.columns = tuple(column.name for column in relation.columns)
        self.keys = [i for i, column in enumerate(self.columns) if column in by_name and by_name[column].key]
        self.arrays = [
            (i, column.name, _array_loader(column.oid))
            for i, column in enumerate(relation.columns)
            if column.name in by_name and by_name[column.name].array
        ]

    def row(self, values: Values, old: Values | None = None) -> tuple[dict[str, str | None], tuple[str, ...]]:
        """Return the row by name and the names of the values that were not sent; a whole old row supplies those."""
        if UNCHANGED in values and old is not None:
            values = tuple(o if v is UNCHANGED else v for v, o in zip(values, old, strict=True))
        missing: tuple[str, ...] = ()
        if UNCHANGED in values:
            missing = tuple(n for n, v in zip(self.columns, values, strict=True) if v is UNCHANGED)
        row: dict[str, str | None] = dict(zip(self.columns, values, strict=True))  # type: ignore[arg-type]
        for name in missing:
            del row[name]
        for index, name, load_array in self.arrays:
            if isinstance(text := values[index], str):
                row[name] = self._array(name, text, load_array)
        return row, missing

    def key(self, values: Values) -> dict[str, str | None]:
        """Return the key columns of an old row."""
        row, _ = self.row(values)
        return {self.columns[i]: row.get(self.columns[i]) for i in self.keys}

    def key_moved(self, old: Values, new: Values) -> bool:
        """Return whether an update gave its row another key; that an old image was sent does not yet say so."""
        return any(old[i] != new[i] and new[i] is not UNCHANGED for i in self.keys)

    def _array(self, name: str, text: str, load_array: Callable[[bytes], object]) -> str:
        if text.startswith("["):  # bounds of its own, which the loader would lose: marked as the snapshot's reader marks them
            return f"[[{text}"
        try:
            return json.dumps(load_array(text.encode()), ensure_ascii=False)
        except psycopg.DataError as error:
            raise RowRefused(self.name, f"column {name}", f"its value is no array literal: {error}") from error


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


class Transaction:
    """One transaction while its messages arrive; `marker` when it carries one of ours."""

    def __init__(self, begin: pgoutput.Begin) -> None:
        self.begin = begin
        self.index = 0
        self.marker = False
        self.parts: list[Part] = []

    def events(self, end_lsn: int) -> list[Event]:
        """Return the events, now that the commit's end is known."""
        lsn, committed_at, xid = self.begin
        return [
            Event(relation, lsn, ordinal, op, row, key, missing, xid, end_lsn, committed_at, note)
            for relation, ordinal, op, row, key, missing, note in self.parts
        ]


@dataclass
class Assembler:
    """Turns the messages of one connection into whole transactions; table shapes last as long as the connection.

    The ordinal of a change is twice its index among all data messages of its transaction, whatever comes of them;
    that a table looks different stands one below the first change in the new shape.
    """

    tables: Mapping[str, Sequence[SourceColumn]]
    generated: Mapping[str, frozenset[str]] = field(default_factory=dict)
    shapes: dict[int, Shape] = field(default_factory=dict)
    open: Transaction | None = None

    def feed(self, message: pgoutput.Decoded) -> tuple[list[Event], int, bool] | None:
        """Take a message; at a commit return (events, commit end LSN, whether a marker is among them)."""
        match message:
            case pgoutput.Insert(relation, new):
                self._change(relation, INSERT, new)
            case pgoutput.Update(relation, kind, old, new):
                self._change(relation, UPDATE, new, kind, old)
            case pgoutput.Delete(relation, kind, old):
                self._change(relation, DELETE, None, kind, old)
            case pgoutput.Begin():
                self.open = Transaction(message)
            case pgoutput.Commit():
                whole, self.open = self._now(), None
                return whole.events(message.end_lsn), message.end_lsn, whole.marker
            case pgoutput.Relation():
                self._relation(message)
            case pgoutput.Truncate(relations):
                self._note(TRUNCATE, [self._shape(relation).name for relation in relations])
            case pgoutput.Message(transactional=True):
                self._message(message)
        return None

    def _now(self) -> Transaction:
        if self.open is None:
            raise pgoutput.MalformedMessage("a change outside of a transaction")
        return self.open

    def _shape(self, relation: int) -> Shape:
        if relation not in self.shapes:
            raise pgoutput.MalformedMessage(f"a change of the relation {relation}, which was not described")
        return self.shapes[relation]

    def _change(self, relation: int, op: str, new: Values | None, kind: str = "", old: Values | None = None) -> None:
        shape, now = self._shape(relation), self._now()
        row: dict[str, str | None] | None = None
        key: dict[str, str | None] | None = None
        missing: tuple[str, ...] = ()
        if new is not None:
            row, missing = shape.row(new, old if kind == "O" else None)
        if old is not None and (new is None or shape.key_moved(old, new)):
            key = shape.key(old)
        now.parts.append((shape.name, 2 * now.index, op, row, key, missing, None))
        now.index += 1

    def _note(self, op: str, relations: Sequence[str], note: str | None = None) -> None:
        now = self._now()
        now.parts.extend((relation, 2 * now.index, op, None, None, (), note) for relation in relations)
        now.index += 1

    def _message(self, message: pgoutput.Message) -> None:
        ours = message.prefix == MARKER_PREFIX
        self._note(MARKER, [""] if ours else [], message.content.decode(errors="backslashreplace"))
        self._now().marker |= ours

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
        note = "; ".join(filter(None, (additions(relation, self.tables[source]), found)))
        if note:
            now = self._now()
            now.parts.append((source, 2 * now.index - 1, RELATION if found else ADDED, None, None, (), note))
