"""Events: what a stream says, one row of the spool for each, and their form in Arrow.

An event is one change of one row, a TRUNCATE, a marker, or that a table looks different. Its
position is its commit LSN and its ordinal, by which events are in stream order. Everything here is
pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

INSERT, UPDATE, DELETE, TRUNCATE, MARKER, RELATION, ADDED = "I", "U", "D", "T", "M", "R", "A"
"""Kinds of event; MARKER, RELATION and ADDED speak in `note`, MARKER and only it without a relation.

A row's change or a TRUNCATE has a note only where its transaction bears the mark of our own writes: what of ours made it.
RELATION says that a table is not as it was prepared, ADDED that it only has more columns, which nothing of the spec needs.
"""


NO_TEXT = "held bytes that are no UTF-8"
"""What a RELATION says in the place of a row that no spool and no target can hold."""

TEXTS = pa.map_(pa.string(), pa.string())
SCHEMA = pa.schema(
    [
        pa.field("relation", pa.string(), nullable=False),
        pa.field("lsn", pa.int64(), nullable=False),
        pa.field("ordinal", pa.int64(), nullable=False),
        pa.field("op", pa.string(), nullable=False),
        pa.field("row", TEXTS),
        pa.field("key", TEXTS),
        pa.field("missing", pa.list_(pa.string()), nullable=False),
        pa.field("xid", pa.int64(), nullable=False),
        pa.field("committed_at", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("note", pa.string()),
    ]
)

Image = tuple[tuple[str, ...], tuple[str | None, ...]]
"""Column names and, place by place, their values; events of one table share the names, so that a row costs no dict."""

Position = tuple[int, int]
"""Commit LSN and ordinal, by which events are in stream order."""

NOWHERE: Position = (0, -2)
"""Before every event: the first ordinal of a transaction is 0, or -1 for what is told of a table before it."""


class Event(NamedTuple):
    """One change of one row, a TRUNCATE, a marker or a changed relation, and its position.

    `lsn` is the commit LSN (start of the commit record), `ordinal` twice the index of the change inside its transaction,
    `committed_at` microseconds since 1970. Values are PostgreSQL's text; those of array columns are JSON arrays of element
    texts. `key` is the old key: always on a delete, on an update only when the key changed. `missing` names columns whose
    large value was unchanged and so not sent: they are absent from `row`, which is not the same as NULL.
    """

    relation: str
    lsn: int
    ordinal: int
    op: str
    row: Image | None
    key: Image | None
    missing: tuple[str, ...]
    xid: int
    committed_at: int
    note: str | None = None


def arrow_table(batch: Sequence[Event]) -> pa.Table:
    """Return the events as Arrow, in the spool's schema (pure).

    Args:
        batch: The events, in any order.

    Returns:
        A table with the columns of `SCHEMA`, a row an event.
    """
    if not batch:
        return SCHEMA.empty_table()
    relation, lsn, ordinal, op, row, key, missing, xid, committed_at, note = zip(*batch, strict=True)
    simple = {"relation": relation, "lsn": lsn, "ordinal": ordinal, "op": op, "missing": missing, "xid": xid,
              "committed_at": committed_at, "note": note}  # fmt: skip
    columns = {name: pa.array(values, SCHEMA.field(name).type) for name, values in simple.items()}
    columns |= {"row": _maps(row), "key": _maps(key)}
    return pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def kept(events: pa.Table, mask: pa.ChunkedArray) -> pa.Table:
    """Return the events of a mask, the very table where that is all of them (pure).

    To copy the rows' maps costs more than all else.

    Args:
        events: Events, in the spool's schema.
        mask: A boolean for each.

    Returns:
        Those of which the mask is true.
    """
    return events if pc.all(mask).as_py() else events.filter(mask)


def last_position(events: pa.Table) -> Position:
    """Return the position of the last event in stream order; NOWHERE without any event (pure).

    Args:
        events: Events with `lsn` and `ordinal`, in any order.

    Returns:
        Commit LSN and ordinal.
    """
    if not len(events):
        return NOWHERE
    lsn = pc.max(events["lsn"])
    return lsn.as_py(), pc.max(events.filter(pc.equal(events["lsn"], lsn))["ordinal"]).as_py()


def _maps(images: Iterable[Image | None]) -> pa.Array:
    """Build a map column from its flat parts, many times faster than from pairs."""
    offsets: list[int | None] = []
    names: list[str] = []
    values: list[str | None] = []
    for image in images:
        if image is None:
            offsets.append(None)
        else:
            offsets.append(len(names))
            names += image[0]
            values += image[1]
    offsets.append(len(names))
    return pa.MapArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(names, pa.string()), pa.array(values, pa.string()))
