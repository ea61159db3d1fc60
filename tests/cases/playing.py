"""Plays a copy case: the source that is written to, what a chunk read of it, and what a target is told in which order.

Whoever copies may read a chunk in the snapshot of the beginning (SNAPSHOT) or when the case reads it (LATER), as happens here
after a snapshot was lost. At the end all chunks are loaded and all events offered, whatever the steps left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

from changeover.position import Version
from tests.cases.reading import L0, V0, Cells, CopyCase, Event, Image, Key, image
from tests.model.gate import Cell, apart, image_applies, last_of_each_key, merged

SNAPSHOT, LATER = "snapshot", "later"
READS = (SNAPSHOT, LATER)


class Target(Protocol):
    """What a case is played into."""

    def load(self, chunk: int, images: Mapping[Key, Image], dies: bool) -> None:
        """Load a chunk, or die before that is recorded; a chunk that is recorded as loaded is not loaded again."""
        ...

    def offer(self, events: Sequence[Event]) -> None:
        """Offer one batch, in which a key may come more than once and in any order."""
        ...


class Offer(NamedTuple):
    """What one key is offered: an image, or None for a delete."""

    key: Key
    cell: Cell


def offers_of(events: Sequence[Event], one_by_one: bool) -> list[Offer]:
    """Return what events offer: one by one as they come, or one a key, as a batch brings them."""
    changes = [change for one in events for change in apart(one.version, one.key, one.image, one.old_key)]
    taken = changes if one_by_one else last_of_each_key(changes)
    return [Offer(cast(Key, change.key), Cell(change.version, change.image)) for change in taken]


class Rule:
    """A target of the pure rule alone, to which changes come one a key, as a batch brings them, or one by one."""

    def __init__(self, one_by_one: bool = False) -> None:
        self.cells: Cells = {}
        self.loaded: set[int] = set()
        self.one_by_one = one_by_one

    def load(self, chunk: int, images: Mapping[Key, Image], dies: bool) -> None:
        """Put each image where no cell is, once."""
        if dies or chunk in self.loaded:
            return
        self.loaded.add(chunk)
        for key, row in images.items():
            if image_applies(self.cells[key].version if key in self.cells else None, V0, V0):
                self.cells[key] = Cell(V0, row)

    def offer(self, events: Sequence[Event]) -> None:
        """Merge what a batch offers."""
        for key, offer in offers_of(events, self.one_by_one):
            cell = merged(self.cells.get(key), [offer], V0)
            if cell is not None:
                self.cells[key] = cell


class Copy:
    """A copy in progress: the source as it is, the events so far, the images that were read."""

    def __init__(self, case: CopyCase, reads: str, target: Target) -> None:
        self.case = case
        self.target = target
        self.rows = dict(case.rows)
        self.first = dict(case.rows) if reads == SNAPSHOT else None
        self.events: list[Event] = []
        self.offered = 0
        self.transactions = 0
        self.images: dict[int, dict[Key, Image]] = {}
        self.loaded: set[int] = set()

    def play(self) -> dict[Key, Image]:
        """Take every step, then what is left to do; return the rows that the target must hold: those of the source."""
        for step in self.case.steps:
            ((name, what),) = step.items()
            getattr(self, name)(what)
        for chunk in range(len(self.case.chunks)):
            if chunk not in self.loaded:
                self.load(chunk)
        self.stream(True)
        return {self.case.target(key): row for key, row in self.rows.items()}

    def write(self, changes: Sequence[Mapping[str, Any]]) -> None:
        """Write to the source, in one transaction."""
        self.transactions += 1
        for place, change in enumerate(changes):
            self._write(Version(0, L0 + self.transactions, 2 * place), change)

    def _write(self, version: Version, change: Mapping[str, Any]) -> None:
        width = len(next(iter(self.case.chunks))[0])
        if "delete" in change:
            gone = tuple(change["delete"])
            del self.rows[gone]
            self.events.append(Event(version, self.case.target(gone), None))
            return
        row = change.get("insert") or change.get("update") or change["to"]
        key, values = tuple(row[:width]), image(row[width:])
        old = tuple(change["move"]) if "move" in change else None
        assert (key in self.rows) is ("update" in change), f"{change}: the case speaks of another row than is there"
        if old is not None:
            del self.rows[old]
        self.rows[key] = values
        moved = self.case.target(old) if old is not None else None
        self.events.append(Event(version, self.case.target(key), values, moved))

    def read(self, chunk: int) -> None:
        """Read a chunk's images and keep them."""
        low, high = self.case.chunks[chunk]
        rows = self.rows if self.first is None else self.first
        self.images[chunk] = {self.case.target(key): row for key, row in rows.items() if low <= key <= high}

    def load(self, chunk: int, dies: bool = False) -> None:
        """Load a chunk, read now unless it was read before."""
        if chunk not in self.images:
            self.read(chunk)
        self.target.load(chunk, self.images.pop(chunk), dies)
        self.loaded |= set() if dies else {chunk}

    def die(self, chunk: int) -> None:
        """Begin to load a chunk and die before that is recorded."""
        self.load(chunk, dies=True)

    def stream(self, most: int) -> None:
        """Offer what is new, or as many of it as a number says (True is no number)."""
        end = len(self.events) if most is True else min(self.offered + most, len(self.events))
        if end > self.offered:
            self.target.offer(self.events[self.offered : end])
        self.offered = end

    def again(self, _: bool) -> None:
        """Forget the position and offer everything from the beginning."""
        self.offered = 0
        self.stream(True)


def rows_of(cells: Cells) -> dict[Key, Image]:
    """Return the live rows of some cells."""
    return {key: cell.image for key, cell in cells.items() if isinstance(cell.image, tuple)}
