"""Columns: the row changes of many messages read at once, a column at a time, without a Python object for a value.

Each read checks what it reads: a value of an unknown kind, another number of columns, and a row that ends anywhere but where its
message ends raise MalformedMessage. Positions only ever go forward, so a row whose end is right has every value inside its
message. Values stay where they arrived until Arrow gathers them, once, into the spool's columns. The format is that of
TupleData in "Logical Replication Message Formats" of the PostgreSQL documentation. Pure; runs where capture runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from changeover.jobs.decode.pgoutput import EPOCH_MICROS, XLOG_HEADER, MalformedMessage

Places = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.uint8]

TEXT, NULL, UNCHANGED = ord("t"), ord("n"), ord("u")
BEGIN, COMMIT, INSERT, UPDATE, DELETE, TRUNCATE, MESSAGE = (ord(kind) for kind in "BCIUDTM")
NEW, OLD_KEY, OLD_ROW = ord("N"), ord("K"), ord("O")

BEGIN_BYTES, COMMIT_BYTES = 21, 26
TRANSACTIONAL = 1


class NotText(MalformedMessage):
    """A value that is no UTF-8: what the row is of stops there."""


class Wire:
    """The messages of many frames in one run of bytes, read at many places at once; `start` and `end` bound each message.

    Before its message each frame has a header of that many bytes.
    """

    def __init__(self, frames: Sequence[bytes], header: int = XLOG_HEADER) -> None:
        self.bytes = b"".join(frames)
        ends = np.cumsum(np.fromiter(map(len, frames), np.int64, len(frames)))
        self.end: Places = ends
        self.start: Places = np.concatenate(([0], ends[:-1])).astype(np.int64) + header
        if np.any(self.start >= self.end):
            raise MalformedMessage("a frame without a message")
        # what is read beyond the last message is zeros, and then the ends do not meet
        self._padded = self.bytes + bytes(8)
        self.codes: Codes = np.frombuffer(self._padded, np.uint8)
        self.kind: Codes = self.codes[self.start]

    def unsigned(self, size: int, at: Places) -> Places:
        """Return the big-endian numbers of that many bytes at each place; those of 8 bytes as int64.

        Args:
            size: How many bytes a number has: 1, 2, 4 or 8.
            at: The places, in bytes from the begin of the run.

        Returns:
            The numbers, as many as the places.
        """
        kind = f">i{size}" if size == 8 else f">u{size}"
        # a view that begins at every byte
        view = np.ndarray((len(self._padded) - size + 1,), kind, self._padded, strides=(1,))
        return view[np.minimum(at, len(view) - 1)].astype(np.int64)

    def message(self, number: int) -> bytes:
        """Return one message.

        Args:
            number: The message's number, from 0.

        Returns:
            Its bytes.
        """
        return self.bytes[int(self.start[number]) : int(self.end[number])]


@dataclass(frozen=True)
class Transactions:
    """Begins or commits, an entry each: what the stream tells of a transaction before its first change."""

    lsn: Places
    committed_at: Places
    xid: Places


def begins(wire: Wire, numbers: Places) -> Transactions:
    """Return what the Begin messages of those numbers say: commit LSN, microseconds since 1970, transaction id."""
    at = wire.start[numbers]
    _require(wire.end[numbers] - at == BEGIN_BYTES, "a Begin of another length")
    return Transactions(wire.unsigned(8, at + 1), wire.unsigned(8, at + 9) + EPOCH_MICROS, wire.unsigned(4, at + 17))


def commit_ends(wire: Wire, numbers: Places) -> Places:
    """Return the end LSN of the Commit messages of those numbers."""
    at = wire.start[numbers]
    _require(wire.end[numbers] - at == COMMIT_BYTES, "a Commit of another length")
    return wire.unsigned(8, at + 10)


@dataclass(frozen=True)
class Tuples:
    """Values of rows, one row a line and one column a column: where each lies, and of which kind it is."""

    wire: Wire
    begin: Places
    end: Places
    kind: Codes
    after: Places
    """The first byte behind each row."""

    def __getitem__(self, lines: Mask | Places) -> Tuples:
        return Tuples(self.wire, self.begin[lines], self.end[lines], self.kind[lines], self.after[lines])

    def columns(self, chosen: Sequence[int]) -> Tuples:
        """Return some of the columns."""
        return Tuples(self.wire, self.begin[:, chosen], self.end[:, chosen], self.kind[:, chosen], self.after)

    def texts(self, column: int) -> pa.Array:
        """Return one column's values, NULL where there is none."""
        return gathered(self.wire, self.begin[:, column], self.end[:, column], self.kind[:, column])


def read(wire: Wire, at: Places, columns: int) -> Tuples:
    """Read a row of that many columns at each place."""
    _require(wire.unsigned(2, at) == columns, "a row of another number of values than its table has columns")
    shape = (columns, len(at))
    begin, end, kind = np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.uint8)
    last = len(wire.codes) - 1
    at = at + 2
    for column in range(columns):
        code = wire.codes[np.minimum(at, last)]
        text = code == TEXT
        _require(text | (code == NULL) | (code == UNCHANGED), "a value of unknown kind")
        begin[column] = at + np.where(text, 5, 1)
        at = begin[column] + np.where(text, wire.unsigned(4, at + 1), 0)
        end[column], kind[column] = at, code
    return Tuples(wire, begin.T, end.T, kind.T, at)


def gathered(wire: Wire, begin: Places, end: Places, kind: Codes) -> pa.Array:
    """Return values as texts, in the order given, NULL where the kind is not TEXT."""
    count = len(begin)
    if np.any(begin[1:] < end[:-1]):
        order = np.argsort(begin, kind="stable")
        back = np.empty(count, np.int64)
        back[order] = np.arange(count)
        return gathered(wire, begin[order], end[order], kind[order]).take(pa.array(back))
    # every second text is a value, the others are what lies between two of them
    offsets = np.empty(2 * count + 1, np.int32)
    offsets[0 : 2 * count : 2] = begin
    offsets[1 : 2 * count : 2] = end
    offsets[2 * count] = end[-1] if count else 0
    runs = pa.StringArray.from_buffers(2 * count, pa.py_buffer(offsets), pa.py_buffer(wire.bytes))
    texts = runs.take(pa.array(np.arange(0, 2 * count, 2), mask=kind != TEXT))
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        raise NotText(f"a value that is no UTF-8: {error}") from error
    return texts


@dataclass(frozen=True)
class Changes:
    """Changes of one table that are laid out alike: which messages they are, and their rows as far as they were sent."""

    op: int
    numbers: Places
    old_kind: int
    old: Tuples | None
    new: Tuples | None

    def one(self, index: int) -> Changes:
        """Return one of the changes."""
        old, new = (part[np.array([index])] if part is not None else None for part in (self.old, self.new))
        return Changes(self.op, self.numbers[index : index + 1], self.old_kind, old, new)


def changes(wire: Wire, numbers: Places, columns: int) -> list[Changes]:
    """Return the inserts, updates and deletes among the messages of those numbers, all of one table, group by group."""
    kind, first = wire.kind[numbers], wire.codes[wire.start[numbers] + 5]
    groups = []
    for op, old_kind in LAYOUTS:
        chosen = numbers[(kind == op) & (first == (old_kind or NEW))]
        if len(chosen):
            groups.append(_group(wire, chosen, columns, op, old_kind))
    if sum(len(group.numbers) for group in groups) != len(numbers):
        raise MalformedMessage("a change that is neither of a new nor of an old row")
    return groups


LAYOUTS = ((INSERT, 0), (UPDATE, 0), (UPDATE, OLD_KEY), (UPDATE, OLD_ROW), (DELETE, OLD_KEY), (DELETE, OLD_ROW))
"""What a change consists of: its kind, and what is sent of the old row: nothing, its key, all of it."""


def _group(wire: Wire, numbers: Places, columns: int, op: int, old_kind: int) -> Changes:
    at = wire.start[numbers] + 5
    old = new = None
    if old_kind:
        old = read(wire, at + 1, columns)
        at = old.after
    if op != DELETE:
        _require(wire.codes[np.minimum(at, len(wire.codes) - 1)] == NEW, "an old row without its new one")
        new = read(wire, at + 1, columns)
        at = new.after
    _require(at == wire.end[numbers], "a row that does not end with its message")
    return Changes(op, numbers, old_kind, old, new)


def _require(held: npt.NDArray[Any], problem: str) -> None:
    if not np.all(held):
        raise MalformedMessage(problem)
