"""What each part of `changeover.stores.base.statements` does on the small PostgreSQL, one operation a row.

The sequences are the product's, and so are the rules that decide here (`gate.applies` and its siblings); this module says
which rows a part reads in its statement's snapshot, and which it waits for and looks at anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from changeover.position import Version
from changeover.stores.base.statements import Part, Procedure, Statement, Transaction
from tests.model.gate import Cell, Chunk
from tests.model.rules import Rules
from tests.model.server import NO_LOCK, Operation, Row, Turn

Key = str
Touched = tuple[Version, bool]
"""A row of the table of row versions: version, and whether it is a tombstone."""


@dataclass(frozen=True)
class GatedRows:
    """Where a gated table's rows stand in the small server, for some keys and one chunk."""

    keys: tuple[Key, ...]
    v0: Version

    @cached_property
    def row(self) -> Mapping[Key, int]:
        """Return the places of the user's rows."""
        return {key: place for place, key in enumerate(self.keys)}

    @cached_property
    def row_versions(self) -> Mapping[Key, int]:
        """Return the places of the row versions."""
        return {key: len(self.keys) + place for place, key in enumerate(self.keys)}

    @cached_property
    def floor(self) -> int:
        """Return the place of the floor."""
        return 2 * len(self.keys)

    @cached_property
    def chunk(self) -> int:
        """Return the place of the ledger's chunk."""
        return 2 * len(self.keys) + 1

    def before(self, rows: Mapping[Key, str], row_versions: Mapping[Key, Touched], chunk: Chunk) -> tuple[Hashable, ...]:
        """Return the first values, the floor at v0."""
        return (*(rows.get(k) for k in self.keys), *(row_versions.get(k) for k in self.keys), self.v0, chunk)


@dataclass(frozen=True)
class Work:
    """What one run of a procedure is about: the offers by key, and the floor that it raises."""

    offers: Mapping[Key, Cell]
    floor: Version | None = None

    @property
    def keys(self) -> tuple[Key, ...]:
        """Return the keys in the order in which rows are locked."""
        return tuple(sorted(self.offers))


class Compiler:
    """Turns the product's sequences into programs of the small server."""

    def __init__(self, rows: GatedRows, rules: Rules) -> None:
        self.rows = rows
        self.rules = rules

    def procedure(self, procedure: Procedure, work: Work) -> tuple[Operation, ...]:
        """Return the operations of several transactions."""
        return tuple(one for transaction in procedure for one in self.transaction(transaction, work))

    def transaction(self, transaction: Transaction, work: Work) -> tuple[Operation, ...]:
        """Return the operations of one transaction, its commit last."""
        whole = [one for statement in transaction for one in self._statement(statement, work)]

        def commit(turn: Turn) -> None:
            turn.commit()
            turn.batch = work.keys

        return (*whole, Operation("commits", commit))

    def _statement(self, statement: Statement, work: Work) -> Iterator[Operation]:
        """A snapshot of what the parts read, then the parts; those of one statement share it."""
        reads = tuple(sorted({place for part in statement for place in READS[part](self.rows, work)}))
        choices = [CHOICES[part] for part in statement if part in CHOICES]

        def see(turn: Turn) -> None:
            turn.see(reads)
            for choose in choices:
                turn.batch = tuple(k for k in turn.batch if choose(self, turn, work, cast(Key, k)))

        if reads:
            yield Operation(f"begins: {', '.join(part.value for part in statement)}", see, lambda turn: not turn.batch)
        for part in statement:
            yield from ROWS[part](self, part, work)

    def version(self, row: Row) -> Version | None:
        """Return a row version's version."""
        return None if row.value is None else cast(Touched, row.value)[0]

    def wins(self, turn: Turn, offer: Cell, row_versions: Row | None) -> bool:
        """Ask the gate's rule: the floor from the snapshot, the cell as it is given."""
        floor = cast(Version, turn.seen(self.rows.floor).value)
        return self.rules.applies(offer.version, self.version(row_versions) if row_versions else None, floor)

    # -- the parts, one operation a row

    def lock(self, part: Part, work: Work) -> Iterator[Operation]:
        mode = "shared" if part is Part.LOCK_SHARED else "exclusive"
        yield Operation(part.value, lambda turn: turn.lock_table(mode))

    def touch(self, part: Part, work: Work) -> Iterator[Operation]:
        for key in work.keys:
            offer, place = work.offers[key], self.rows.row_versions[key]

            def run(turn: Turn, key: Key = key, offer: Cell = offer, place: int = place) -> None:
                if key in turn.batch and self.wins(turn, offer, None) and self.wins(turn, offer, turn.lock(place)):
                    turn.write(place, (offer.version, offer.image is None))
                    return
                turn.batch = tuple(k for k in turn.batch if k != key)

            yield Operation(f"{part.value} {key} ({_told(offer)})", run, _dropped(key))

    def delete(self, part: Part, work: Work) -> Iterator[Operation]:
        for key in (k for k in work.keys if work.offers[k].image is None):
            place = self.rows.row[key]
            yield Operation(
                f"{part.value} {key}",
                _deletes(place),
                _unseen(key, place),
            )

    def upsert(self, part: Part, work: Work) -> Iterator[Operation]:
        for key in (k for k in work.keys if work.offers[k].image is not None):
            place, image = self.rows.row[key], work.offers[key].image

            def run(turn: Turn, place: int = place, image: Hashable = image) -> None:
                turn.wait_for(place)
                turn.write(place, image)
                turn.snapshot = ()

            yield Operation(f"{part.value} {key} = {image}", run, _dropped(key))

    def insert(self, part: Part, work: Work) -> Iterator[Operation]:
        for key in work.keys:
            place, image = self.rows.row[key], work.offers[key].image

            def run(turn: Turn, place: int = place, image: Hashable = image) -> None:
                if turn.wait_for(place, NO_LOCK).value is None:
                    turn.write(place, image)

            yield Operation(f"{part.value} {key} = {image}", run, _dropped(key))

    def mark(self, part: Part, work: Work) -> Iterator[Operation]:
        def run(turn: Turn) -> None:
            chunk = cast(Chunk, turn.lock(self.rows.chunk).value)
            if self.rules.markable(chunk, turn.token):
                turn.write(self.rows.chunk, chunk._replace(loaded=True))
            else:
                turn.roll_back(turn.at + 1)  # past the commit

        yield Operation(part.value, run)

    def sweep(self, part: Part, work: Work) -> Iterator[Operation]:
        for key in work.keys:
            row_versions, row = self.rows.row_versions[key], self.rows.row[key]

            def lock(turn: Turn, key: Key = key, row_versions: int = row_versions) -> None:
                value = turn.lock(row_versions).value
                if value is None or not cast(Touched, value)[1]:
                    turn.batch = tuple(k for k in turn.batch if k != key)

            yield Operation(f"{part.value} {key}: locks", lock, _dropped(key))
            yield Operation(
                f"{part.value} {key}: deletes",
                _deletes(row),
                _unseen(key, row),
            )

    def raise_floor(self, part: Part, work: Work) -> Iterator[Operation]:
        def run(turn: Turn) -> None:
            now = cast(Version, turn.wait_for(self.rows.floor).value)
            assert work.floor is not None
            turn.write(self.rows.floor, max(now, work.floor))

        yield Operation(f"{part.value} to {_short(work.floor)}", run)

    def purge(self, part: Part, work: Work) -> Iterator[Operation]:
        for key in work.keys:
            place = self.rows.row_versions[key]
            goes = self._goes(work)
            yield Operation(
                f"{part.value} {key}",
                _deletes(place, goes),
                _stays(place, goes),
            )

    def _goes(self, work: Work) -> Callable[[Row], bool]:
        upto = cast(Version, work.floor)
        return lambda row: row.value is not None and self.rules.collected(cast(Touched, row.value)[0], upto)

    def nothing(self, part: Part, work: Work) -> Iterator[Operation]:
        return iter(())

    # -- what a statement's snapshot alone decides about its batch

    def untouched(self, turn: Turn, work: Work, key: Key) -> bool:
        return turn.seen(self.rows.row_versions[key]).value is None

    def image_wins(self, turn: Turn, work: Work, key: Key) -> bool:
        floor = cast(Version, turn.seen(self.rows.floor).value)
        return self.rules.image_applies(self.version(turn.seen(self.rows.row_versions[key])), floor, work.offers[key].version)

    def older(self, turn: Turn, work: Work, key: Key) -> bool:
        row_versions = self.version(turn.seen(self.rows.row_versions[key]))
        newer = row_versions is not None and row_versions >= work.offers[key].version
        return turn.seen(self.rows.row[key]).value is not None and not newer

    def tombstone(self, turn: Turn, work: Work, key: Key) -> bool:
        value = turn.seen(self.rows.row_versions[key]).value
        return value is not None and cast(Touched, value)[1]

    def newer(self, turn: Turn, work: Work, key: Key) -> bool:
        return self.wins(turn, work.offers[key], turn.seen(self.rows.row_versions[key]))


def _dropped(key: Key) -> Callable[[Turn], bool]:
    return lambda turn: key not in turn.batch


def _unseen(key: Key, place: int) -> Callable[[Turn], bool]:
    return lambda turn: key not in turn.batch or turn.seen(place).value is None


def _stays(place: int, goes: Callable[[Row], bool]) -> Callable[[Turn], bool]:
    return lambda turn: not goes(turn.seen(place))


def _deletes(place: int, goes: Callable[[Row], bool] = lambda row: True) -> Callable[[Turn], None]:
    return lambda turn: turn.delete_seen(place, goes)


def _short(version: Version | None) -> str:
    return "?" if version is None else f"{version.epoch}:{version.lsn}:{version.ordinal}"


def _told(offer: Cell) -> str:
    return f"{'delete' if offer.image is None else f'put {offer.image}'} at {_short(offer.version)}"


def _none(rows: GatedRows, work: Work) -> tuple[int, ...]:
    return ()


def _rows(rows: GatedRows, work: Work) -> tuple[int, ...]:
    return tuple(rows.row[k] for k in work.keys)


def _row_versions(rows: GatedRows, work: Work) -> tuple[int, ...]:
    return tuple(rows.row_versions[k] for k in work.keys)


def _floor(rows: GatedRows, work: Work) -> tuple[int, ...]:
    return (rows.floor,)


READS: dict[Part, Callable[[GatedRows, Work], tuple[int, ...]]] = {
    Part.LOCK_SHARED: _none,
    Part.LOCK_EXCLUSIVE: _none,
    Part.TOUCH: _floor,
    Part.DELETE: lambda rows, work: tuple(rows.row[k] for k in work.keys if work.offers[k].image is None),
    Part.UPSERT: _none,
    Part.REFUSE: _row_versions,
    Part.INSERT: lambda rows, work: (*_row_versions(rows, work), rows.floor),
    Part.MARK: _none,
    Part.SWEEP: lambda rows, work: (*_row_versions(rows, work), *_rows(rows, work)),
    Part.RAISE_FLOOR: _none,
    Part.PURGE: _row_versions,
    Part.LIST: lambda rows, work: (*_row_versions(rows, work), *_rows(rows, work)),
    Part.DROP_OLDER: lambda rows, work: (*_row_versions(rows, work), rows.floor),
}
"""What a part reads in its statement's snapshot; the rest it reads as it is, under a lock."""

CHOICES: dict[Part, Callable[[Compiler, Turn, Work, Key], bool]] = {
    Part.REFUSE: Compiler.untouched,
    Part.INSERT: Compiler.image_wins,
    Part.LIST: Compiler.older,
    Part.SWEEP: Compiler.tombstone,
    Part.DROP_OLDER: Compiler.newer,
}
"""Which keys of the batch a part leaves in it, by the snapshot alone."""

ROWS: dict[Part, Callable[[Compiler, Part, Work], Iterator[Operation]]] = {
    Part.LOCK_SHARED: Compiler.lock,
    Part.LOCK_EXCLUSIVE: Compiler.lock,
    Part.TOUCH: Compiler.touch,
    Part.DELETE: Compiler.delete,
    Part.UPSERT: Compiler.upsert,
    Part.REFUSE: Compiler.nothing,
    Part.INSERT: Compiler.insert,
    Part.MARK: Compiler.mark,
    Part.SWEEP: Compiler.sweep,
    Part.RAISE_FLOOR: Compiler.raise_floor,
    Part.PURGE: Compiler.purge,
    Part.LIST: Compiler.nothing,
    Part.DROP_OLDER: Compiler.nothing,
}
"""What a part does, row by row."""
