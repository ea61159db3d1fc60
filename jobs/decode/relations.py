"""Relations: how one table's rows on the wire become the spool's events, for all changes of a message's layout at once.

A shape holds as long as the stream describes the table as it does. Values stay PostgreSQL's text, but for those of array columns,
which become JSON arrays of element texts, each distinct one made once. A value that was not sent is left out of its row and named
in `missing`; where the whole old row came along, it supplies the value. The old key is told on a delete, and on an update that
changed it. Pure; runs where capture runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from json.encoder import encode_basestring
from typing import Any, NamedTuple

import numpy as np
import psycopg
import pyarrow as pa
import pyarrow.compute as pc
from psycopg import pq
from psycopg.adapt import Transformer

from changeover.errors import RowRefused
from changeover.jobs.decode import columns as rows
from changeover.jobs.decode.columns import Changes, Mask, Places, Tuples
from changeover.jobs.decode.pgoutput import Relation
from changeover.jobs.ledger.records import SourceColumn
from changeover.jobs.spool import events

TEXT_ARRAY, BOX_ARRAY = 1009, 1020
VECTORS = (22, 30)
"""int2vector and oidvector, which are arrays to the catalogue but are written as words."""

OPS = {rows.INSERT: events.INSERT, rows.UPDATE: events.UPDATE, rows.DELETE: events.DELETE}


class Stamps(NamedTuple):
    """Where changes stand, an entry each: commit LSN, ordinal, transaction id, and commit time in microseconds since 1970."""

    lsn: Places
    ordinal: Places
    xid: Places
    committed_at: Places


class Shape:
    """How the values of one table's messages become spool events' rows and keys."""

    def __init__(self, name: str, relation: Relation, prepared: Sequence[SourceColumn]) -> None:
        by_name = {column.name: column for column in prepared}
        self.name = name
        self.columns = tuple(column.name for column in relation.columns)
        self.names = pa.array(self.columns, pa.string())
        self.keys = [i for i, column in enumerate(self.columns) if column in by_name and by_name[column].key]
        self.arrays = {
            i: _array_loader(column.oid)
            for i, column in enumerate(relation.columns)
            if column.name in by_name and by_name[column.name].array and by_name[column.name].oid == column.oid
        }

    def events(self, group: Changes, stamps: Stamps, notes: pa.Array) -> pa.Table:
        """Return a group of changes as spool events, in their order.

        Args:
            group: Changes of one kind of this relation.
            stamps: Where each change stands: commit LSN in bytes, ordinal, transaction and time.
            notes: What the mark of our own writes before each change says, or NULL.

        Returns:
            The events, one a change, in the spool's columns.

        Raises:
            RowRefused: A value can't be carried.
            MalformedMessage: A message can't be read.
        """
        count = len(group.numbers)
        new = group.new
        if new is not None and group.old is not None and group.old_kind == rows.OLD_ROW:
            new = _supplied(group.old, new)
        with_key = np.ones(count, np.bool_) if new is None else self._key_moved(group.old, new)
        columns = {
            "relation": pa.repeat(self.name, count),
            "op": pa.repeat(OPS[group.op], count),
            "lsn": pa.array(stamps.lsn),
            "ordinal": pa.array(stamps.ordinal),
            "row": self._images(new, list(range(len(self.columns))), count, np.ones(count, np.bool_)),
            "key": self._images(group.old, self.keys, count, with_key),
            "missing": self._missing(new, count),
            "xid": pa.array(stamps.xid),
            "committed_at": pa.array(stamps.committed_at).cast(events.SCHEMA.field("committed_at").type),
            "note": notes,
        }
        return pa.table([columns[name] for name in events.SCHEMA.names], schema=events.SCHEMA)

    def not_text(self, change: Changes) -> str:
        """Return which columns of a change hold bytes that are no UTF-8, which no target and no file has a place for.

        Args:
            change: One change.

        Returns:
            The sentence that names the columns.
        """
        broken = []
        for index, name in enumerate(self.columns):
            try:
                for part in filter(None, (change.old, change.new)):
                    part.texts(index)
            except rows.NotText:
                broken.append(name)
        return not_utf8(broken)

    def _key_moved(self, old: Tuples | None, new: Tuples) -> Mask:
        """Return which updates gave their row another key; that an old image was sent does not yet say so."""
        moved = np.zeros(len(new.after), np.bool_)
        if old is None:
            return moved
        for column in self.keys:
            differs = pc.not_equal(old.texts(column), new.texts(column)).fill_null(True).to_numpy(zero_copy_only=False)
            both_null = (old.kind[:, column] == rows.NULL) & (new.kind[:, column] == rows.NULL)
            moved |= differs & ~both_null & (new.kind[:, column] != rows.UNCHANGED)
        return moved

    def _images(self, tuples: Tuples | None, columns: list[int], count: int, there: Mask) -> pa.Array:
        """Return a map of column name to text for each row that is there, NULL for the others; what was not sent is left out."""
        if tuples is None:
            return pa.nulls(count, events.TEXTS)
        chosen = tuples.columns(columns)
        sent = (chosen.kind != rows.UNCHANGED) & there[:, None]
        values = self._gathered(chosen, columns, sent)
        names = self.names.take(pa.array(np.broadcast_to(np.array(columns), sent.shape)[sent]))
        offsets = np.concatenate(([0], np.cumsum(sent.sum(axis=1)))).astype(np.int32)
        absent = np.concatenate((~there, [False]))
        return pa.MapArray.from_arrays(pa.array(offsets, mask=absent), names, values)

    def _gathered(self, chosen: Tuples, columns: list[int], sent: Mask) -> pa.Array:
        """Return the values that were sent, row by row, arrays as JSON."""
        kinds = chosen.kind[sent]
        values = rows.gathered(chosen.wire, chosen.begin[sent], chosen.end[sent], kinds)
        value_index = np.broadcast_to(np.arange(len(columns)), sent.shape)[sent]
        for index, column in enumerate(columns):
            if column in self.arrays:
                mask = (value_index == index) & (kinds == rows.TEXT)
                texts = values.filter(pa.array(mask)).dictionary_encode()
                made = [self.as_json(column, text.as_py()) for text in texts.dictionary]
                values = pc.replace_with_mask(values, pa.array(mask), pa.array(made, pa.string()).take(texts.indices))
        return values

    def as_json(self, column: int, text: str) -> str:
        """Return an array's text as JSON.

        Args:
            column: The column's number, from 0.
            text: The array as PostgreSQL prints it.

        Returns:
            The JSON; an array with bounds of its own is only marked.

        Raises:
            RowRefused: The text is no array literal.
        """
        if text.startswith("["):  # bounds of its own, which the loader would lose: marked as the snapshot's reader marks them
            return f"[[{text}"
        try:
            return _json(self.arrays[column](text.encode()))
        except psycopg.DataError as error:
            raise RowRefused(self.name, f"column {self.columns[column]}", f"its value is no array literal: {error}") from error

    def _missing(self, new: Tuples | None, count: int) -> pa.Array:
        if new is None:
            return pa.array([[]], pa.list_(pa.string())).take(pa.array(np.zeros(count, np.int64)))
        unsent = new.kind == rows.UNCHANGED
        offsets = np.concatenate(([0], np.cumsum(unsent.sum(axis=1)))).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), self.names.take(pa.array(np.nonzero(unsent)[1])))


def not_utf8(columns: Sequence[str]) -> str:
    """Return what is said of a row with such bytes.

    Args:
        columns: The columns' names; none where they are not known.

    Returns:
        The sentence.
    """
    return f"a row came whose {', '.join(columns) or 'values'} {events.NO_TEXT}: correct it"


def _supplied(old: Tuples, new: Tuples) -> Tuples:
    """Return the new rows with what was not sent taken from the old ones."""
    unsent = new.kind == rows.UNCHANGED
    begin, end, kind = (np.where(unsent, o, n) for o, n in ((old.begin, new.begin), (old.end, new.end), (old.kind, new.kind)))
    return Tuples(new.wire, begin, end, kind, new.after)


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
