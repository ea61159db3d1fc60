"""Transactions: the stream's messages put together as spool events, each at its place on the version axis.

Events come out in stream order, with their commit LSN, which the stream tells before the first of
them; so a transaction of any size passes through. The ordinal of a change is twice its index among
all data messages of the transaction, counted before anything is left out. So another connection
that reads the same log gives the same positions, and what is held already is known by its position.
What follows the mark of our own writes in its transaction has that mark as its note. A table that
differs from the prepared one gets an event that says how, at its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from changeover.errors import SourceChanged
from changeover.jobs.decode import columns as rows
from changeover.jobs.decode import pgoutput
from changeover.jobs.decode.columns import Mask, Places, Wire
from changeover.jobs.decode.relations import Shape, Stamps
from changeover.jobs.ledger.records import SourceColumn
from changeover.jobs.spool.events import ADDED, MARKER, NOWHERE, RELATION, TRUNCATE, Event, Position, arrow_table
from changeover.names import MARKER_PREFIX, joined
from changeover.stores.postgres.gate import OURS

log = logging.getLogger(__name__)

ADDED_ANEW = "a column was dropped and added anew"


def difference(relation: pgoutput.Relation, prepared: Sequence[SourceColumn], generated: frozenset[str]) -> str:
    """Return what a table in the stream lacks of the prepared one (pure).

    Stored generated columns are not part of the stream: their absence is no difference.

    Args:
        relation: The table as the stream describes it.
        prepared: The columns that prepare recorded.
        generated: Its stored generated columns.

    Returns:
        A phrase that names each column; empty when it has all of it.
    """
    now = {column.name: column for column in relation.columns}
    before = {column.name: column for column in prepared}
    differences = [f"column {name} was dropped" for name in before if name not in now and name not in generated]
    for name in now.keys() & before.keys():
        if now[name].oid != before[name].oid:
            differences.append(f"column {name} has another type (oid {now[name].oid}, was {before[name].type})")
        elif before[name].typmod is not None and now[name].typmod != before[name].typmod:
            differences.append(f"column {name} has another type (modifier {now[name].typmod}, was {before[name].type})")
        if relation.identity != "f" and now[name].key != before[name].key:
            differences.append(f"column {name} {'became' if now[name].key else 'is no longer'} part of the replica identity")
    return "; ".join(sorted(differences))


def _reordered(relation: pgoutput.Relation, prepared: Sequence[SourceColumn]) -> bool:
    """Return whether the prepared columns come in another order: one was dropped and added anew, and no event tells of old rows."""
    there = [column.name for column in relation.columns]
    before = [column.name for column in prepared if column.name in there]
    return before != [name for name in there if name in before]


def added_anew(prepared: Sequence[SourceColumn], numbers: Mapping[str, int]) -> bool:
    """Return whether a prepared column has another number by now (pure).

    Then another column has its name, and no event tells of old rows.

    Args:
        prepared: The columns that prepare recorded.
        numbers: The columns' present numbers, by name.

    Returns:
        Whether one has.
    """
    return any(column.number not in (None, numbers.get(column.name, column.number)) for column in prepared)


def additions(relation: pgoutput.Relation, prepared: Sequence[SourceColumn]) -> str:
    """Return the columns that a table has beyond the prepared ones (pure).

    Args:
        relation: The table as the stream describes it.
        prepared: The columns that prepare recorded.

    Returns:
        A phrase that names each column, or an empty text.
    """
    before = {column.name for column in prepared}
    return "; ".join(f"column {c.name} was added (type oid {c.oid})" for c in relation.columns if c.name not in before)


class Partitions(Protocol):
    """What the stream's partitions belong to (`partitions.Roots`)."""

    @property
    def names(self) -> Sequence[str]:
        """Return the partitioned tables, as the stream names them."""
        ...

    def of(self, oid: int) -> str | None:
        """Return the table of which a relation is or was a partition.

        Args:
            oid: The relation's OID.

        Returns:
            The table as the spec names it, None for any other relation.
        """
        ...

    def leaves(self, name: str) -> frozenset[int]:
        """Return the partitions of a table that hold rows.

        Args:
            name: The table, as the spec names it.

        Returns:
            The partitions' OIDs, none for a table that is not partitioned.
        """
        ...

    def called(self, oids: Collection[int]) -> Sequence[str]:
        """Return the names of some partitions.

        Args:
            oids: The partitions' OIDs.

        Returns:
            The names of those that are known.
        """
        ...


class Unpartitioned:
    """No table of the stream is partitioned."""

    names: Sequence[str] = ()

    def of(self, oid: int) -> str | None:
        """No relation is a partition."""
        return None

    def leaves(self, name: str) -> frozenset[int]:
        """No table has partitions."""
        return frozenset()

    def called(self, oids: Collection[int]) -> Sequence[str]:
        """None has a name."""
        return ()


class Open(NamedTuple):
    """The transaction that the messages so far leave open, and how many of its data messages there were."""

    lsn: int
    xid: int
    committed_at: int
    data: int


ROWS = (rows.INSERT, rows.UPDATE, rows.DELETE)
BETWEEN = tuple(map(ord, "BCOY"))
"""Begin and commit; where a transaction came from, and types, which say nothing to us."""

DESCRIPTION = ord("R")


@dataclass
class Assembler:
    """Turns the messages of one connection into events, which gather in `events`; table shapes last as long as the connection.

    What lies at or below `held` is left out. The ordinal of a change is twice its index among all
    data messages of its transaction, whatever comes of them. An event that a table looks different
    stands one below the first change in the new shape, and comes with that change. `count` is the
    number of events that gather.
    """

    tables: Mapping[str, Sequence[SourceColumn]]
    generated: Mapping[str, frozenset[str]] = field(default_factory=dict)
    held: Position = NOWHERE
    events: list[pa.Table] = field(default_factory=list)
    count: int = 0
    marker: bool = False
    shapes: dict[int, Shape] = field(default_factory=dict)
    noted: set[tuple[str, str]] = field(default_factory=set)
    open: Open | None = None
    roots: Partitions = field(default_factory=Unpartitioned)
    numbers: Callable[[], Mapping[str, Mapping[str, int]]] = dict
    """Looks up the numbers of each table's columns, of which the stream says nothing."""
    _numbers: Mapping[str, Mapping[str, int]] | None = None
    _notes: list[Event] = field(default_factory=list)
    _mark: tuple[int, str] = (-1, "")
    """The last mark of our own writes: its transaction's commit LSN, and what it says."""

    def take(self, frames: Sequence[bytes]) -> list[int]:
        """Take the messages of some frames of the stream; return the end LSNs of the commits among them.

        Args:
            frames: The frames' bytes, each with one message of the stream.

        Returns:
            The end LSNs in bytes, in the stream's order.

        Raises:
            RowRefused: A value can't be carried.
            MalformedMessage: A message can't be read, or stands where none may.
        """
        return self.read(Wire(frames)) if frames else []

    def read(self, wire: Wire) -> list[int]:
        """Take messages of the stream (capture).

        Args:
            wire: The messages, in the stream's order.

        Returns:
            The end LSNs of the commits among them.

        Raises:
            MalformedMessage: A message can't be read, or stands where none may.
        """
        self._numbers = None  # what was looked up before these messages came may be older than they are
        ends: list[int] = []
        begin = 0
        # a table's new shape holds for what comes behind it, so the messages are taken run by run
        for described in np.flatnonzero(wire.kind == DESCRIPTION).tolist():
            ends += self._run(wire, np.arange(begin, described))
            self._relation(pgoutput.relation(wire.message(described)))
            begin = described + 1
        return ends + self._run(wire, np.arange(begin, len(wire.start)))

    def taken(self) -> list[pa.Table]:
        """Return the events so far and begin anew.

        Returns:
            Tables of the spool's schema.
        """
        events, self.events, self.count, self.marker = self.events, [], 0, False
        return events

    def _run(self, wire: Wire, numbers: Places) -> list[int]:
        """Take messages between which no table changes its shape."""
        kind = wire.kind[numbers]
        row = np.isin(kind, ROWS)
        message = kind == rows.MESSAGE
        transactional = (wire.codes[wire.start[numbers] + 1] & rows.TRANSACTIONAL).astype(np.bool_)
        data = row | (kind == rows.TRUNCATE) | (message & transactional)
        if not np.all(data | message | np.isin(kind, BETWEEN)):
            unknown = chr(kind[~(data | message | np.isin(kind, BETWEEN))][0])
            raise pgoutput.MalformedMessage(f"a message of unknown kind {unknown!r}")
        stamps = self._stamps(wire, numbers, kind, data)
        self._tell(wire, numbers[data], row[data], stamps)
        return rows.commit_ends(wire, numbers[kind == rows.COMMIT]).tolist()  # type: ignore[no-any-return]

    def _stamps(self, wire: Wire, numbers: Places, kind: rows.Codes, data: Mask) -> Stamps:
        """Return where the data messages stand, and note the transaction that is left open."""
        begin = kind == rows.BEGIN
        begins = rows.begins(wire, numbers[begin])
        before = self.open or Open(0, 0, 0, 0)
        lsn, xid, at = (
            np.concatenate(([carried], new))
            for carried, new in zip(before[:3], (begins.lsn, begins.xid, begins.committed_at), strict=True)
        )
        inside = int(self.open is not None) + np.cumsum(begin) - np.cumsum(kind == rows.COMMIT)
        if np.any((inside < 0) | (inside > 1)) or np.any(inside[data] != 1):
            raise pgoutput.MalformedMessage("a change, a begin or a commit that is not where a transaction has it")
        transaction, data_so_far = np.cumsum(begin), np.cumsum(data)
        first = np.concatenate(([-before.data], data_so_far[begin]))
        if len(numbers):
            last = transaction[-1]
            left = Open(int(lsn[last]), int(xid[last]), int(at[last]), int(data_so_far[-1] - first[last]))
            self.open = left if inside[-1] else None
        of = transaction[data]
        return Stamps(lsn[of], 2 * (data_so_far[data] - 1 - first[of]), xid[of], at[of])

    def _tell(self, wire: Wire, numbers: Places, row: Mask, stamps: Stamps) -> None:
        """Gather the events of data messages, as far as they are not held."""
        if not len(numbers):
            return
        new = (stamps.lsn > self.held[0]) | ((stamps.lsn == self.held[0]) & (stamps.ordinal > self.held[1]))
        self._gather_events(self._notes if new[0] else [])
        self._notes = []
        marks = self._marks(wire, numbers, ~row, stamps)
        relation = wire.unsigned(4, wire.start[numbers] + 1)
        for oid in np.unique(relation[row]).tolist():
            shape = self._shape(oid)
            ours = np.flatnonzero(row & new & (relation == oid))
            for group in rows.changes(wire, numbers[ours], len(shape.columns)):
                indexes = ours[np.searchsorted(numbers[ours], group.numbers)]
                self._changed(shape, group, Stamps(*(part[indexes] for part in stamps)), marks.take(pa.array(indexes)))
        for index in np.flatnonzero(~row & new).tolist():
            at = Stamps(*(part[index : index + 1] for part in stamps))
            self._other(wire.message(int(numbers[index])), at, marks[index].as_py())

    def _changed(self, shape: Shape, group: rows.Changes, stamps: Stamps, notes: pa.Array) -> None:
        """Gather the events of changes; in the place of a row that is no text the table is said to have one."""
        try:
            self._gather(shape.events(group, stamps, notes))
        except rows.NotText:
            for index in range(len(group.numbers)):
                one, at = group.one(index), Stamps(*(part[index : index + 1] for part in stamps))
                try:
                    self._gather(shape.events(one, at, notes[index : index + 1]))
                except rows.NotText:
                    lsn, ordinal, xid, committed_at = (int(part[0]) for part in at)
                    note = shape.not_text(one)
                    log.warning("%s: %s", shape.name, note)
                    self._gather_events([Event(shape.name, lsn, ordinal, RELATION, None, None, (), xid, committed_at, note)])

    def _marks(self, wire: Wire, numbers: Places, other: Mask, stamps: Stamps) -> pa.Array:
        """Return for each data message what the mark of our own writes before it in its transaction says, or NULL."""
        indexes, lsns, says = [-1], [self._mark[0]], [self._mark[1]]
        for index in np.flatnonzero(other & (wire.kind[numbers] == rows.MESSAGE)).tolist():
            emitted = pgoutput.message(wire.message(int(numbers[index])))
            if emitted.prefix == OURS:
                indexes.append(index)
                lsns.append(int(stamps.lsn[index]))
                says.append(emitted.content.decode(errors="backslashreplace"))
        self._mark = lsns[-1], says[-1]
        last = np.searchsorted(np.array(indexes), np.arange(len(numbers)), side="left") - 1
        return pa.array(says, pa.string()).take(pa.array(last, mask=np.array(lsns)[last] != stamps.lsn))

    def _gather(self, events: pa.Table) -> None:
        self.events.append(events)
        self.count += len(events)

    def _gather_events(self, events: Sequence[Event]) -> None:
        if events:
            self._gather(arrow_table(events))

    def _other(self, message: bytes, stamps: Stamps, note: str | None) -> None:
        """Take a TRUNCATE or a message of pg_logical_emit_message."""
        lsn, ordinal, xid, committed_at = (int(part[0]) for part in stamps)
        events: list[tuple[str, str, str | None]] = []
        if message[0] == rows.TRUNCATE:
            events = self._truncated(pgoutput.truncate(message).relations, note)
        else:
            emitted = pgoutput.message(message)
            if emitted.prefix == MARKER_PREFIX:
                self.marker = True
                events = [("", MARKER, emitted.content.decode(errors="backslashreplace"))]
        self._gather_events([Event(name, lsn, ordinal, op, None, None, (), xid, committed_at, note) for name, op, note in events])

    def _truncated(self, relations: Sequence[int], mark: str | None) -> list[tuple[str, str, str | None]]:
        """Return name, kind and note of what a TRUNCATE tells; a partitioned table is truncated where each of its partitions is."""
        emptied: dict[str, set[int]] = {}
        for oid in relations:
            emptied.setdefault(self._shape(oid).name, set()).add(oid)
        events: list[tuple[str, str, str | None]] = []
        for name, oids in emptied.items():
            if self.roots.leaves(name) <= oids:
                events.append((name, TRUNCATE, mark))
            else:
                note = f"the rows of {', '.join(self.roots.called(oids))} alone were truncated: none can tell which"
                log.warning("%s: %s", name, note)
                events.append((name, RELATION, note))
        return events

    def _shape(self, relation: int) -> Shape:
        if relation not in self.shapes:
            raise pgoutput.MalformedMessage(f"a change of the relation {relation}, which was not described")
        return self.shapes[relation]

    def _relation(self, relation: pgoutput.Relation) -> None:
        name = joined(relation.schema, relation.name)
        known = self.shapes.get(relation.oid)
        source = name if name in self.tables else known.name if known is not None else self.roots.of(relation.oid)
        if source is None:
            source = self._lost_partition(name)
        self.shapes[relation.oid] = Shape(source, relation, self.tables[source])
        problem = difference(relation, self.tables[source], self.generated.get(source, frozenset()))
        if not problem and ((name == source and _reordered(relation, self.tables[source])) or self._added_anew(source)):
            problem = ADDED_ANEW
        if name != source and source not in self.roots.names:
            problem = f"the table was renamed to {name}" + (f"; {problem}" if problem else "")
        # a renamed column is one that was dropped and one that was added
        note = "; ".join(filter(None, (problem, additions(relation, self.tables[source]))))
        if note:
            self._note(source, RELATION if problem else ADDED, note)

    def _added_anew(self, source: str) -> bool:
        if self._numbers is None:
            self._numbers = self.numbers()
        return added_anew(self.tables[source], self._numbers.get(source, {}))

    def _lost_partition(self, name: str) -> str:
        """Tell that a partition of which nothing is known is gone already, and return the table that its changes count to.

        It came and went between two looks, so only its name is left; whichever table it was of stops there.
        """
        if not self.roots.names:
            raise SourceChanged("publication", ", ".join(sorted(self.tables)), f"one with {name}")
        for root in self.roots.names:
            self._note(root, RELATION, f"{name}, a partition that came since prepare, was detached or dropped")
        return self.roots.names[0]

    def _note(self, source: str, op: str, note: str) -> None:
        """Have an event say how a table changed, at the place of the change that follows."""
        if self.open is None:
            raise pgoutput.MalformedMessage("a table's description outside of a transaction")
        lsn, xid, committed_at, data = self.open
        if (source, note) not in self.noted:
            self.noted.add((source, note))
            log.warning("%s: %s", source, note)
        self._notes.append(Event(source, lsn, 2 * data - 1, op, None, None, (), xid, committed_at, note))
