"""The world of offers: source, capture, replay, loader, direct writes and maintenance on a PostgreSQL target, by transactions.

A step is one transaction of one process; what statements inside of them can do to each other is `table_worlds`' matter. Every
process may be killed between any two steps. The source follows its script; capture, replay, an attempt at the chunks and the
application's direct writes interleave in every way, and each direct write may come at any time or never.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, cast

from changeover.position import Version
from tests.model.carried import Held
from tests.model.gate import UNSENT, Cell, Chunk, Image, Key, KeyChange
from tests.model.rules import RULES, Rules
from tests.model.script import TRUNCATE, Script, shown_as, told

Step = tuple[str, "State"]


class Stored(NamedTuple):
    """What the target holds for one key: its row with the version that gave it, and the row version's version."""

    row: Cell | None = None
    row_versions: Version | None = None
    peak: Version | None = None
    buried: Version | None = None
    """The highest version that the cell ever had, and the highest delete ever applied: the judge's, no rule sees them."""


class State(NamedTuple):
    """A moment; positions are numbers of transactions."""

    source: int
    received: int
    durable: int
    confirmed: int
    offered: int
    applied: int
    floor: Version
    stored: tuple[Stored, ...]
    chunks: tuple[Chunk, ...]
    attempts: tuple[tuple[int, int], ...] = ()
    """Attempts at the chunks: token, and the number of transactions that the snapshot has."""
    closed: bool = False
    truncating: tuple[int, bool] = (0, False)
    """A batch with a TRUNCATE under way, by its end: the floor is raised; the older rows are deleted."""
    collected: int = 0
    direct: int = 0
    kills: int = 0
    stopped: str = ""


@dataclass(frozen=True)
class Offers:
    """A world of offers."""

    name: str
    script: Script
    rules: Rules = RULES
    chunks: tuple[tuple[str, ...], ...] = ()
    """The source keys of each chunk; by default one chunk has them all."""
    attempts: int = 1
    fuzzy: bool = False
    """The snapshot is lost: attempts read under snapshots of their own."""
    direct: bool = True
    capture: bool = False
    """Capture's own steps; otherwise what is committed is durable at once."""
    kills: int = 0
    collect: tuple[Version, ...] = ()
    loaded: bool = False
    """Begin with a table that is loaded and closed."""

    @cached_property
    def ranges(self) -> tuple[tuple[str, ...], ...]:
        """Return the source keys of each chunk."""
        writes = [write for one in self.script.transactions for write in one.writes]
        named = {key for write in writes for key in (write.key, write.old_key) if key is not None}
        return self.chunks or (tuple(sorted(named)),)

    @cached_property
    def places(self) -> dict[str, int]:
        """Return the place of each target key."""
        return {key: place for place, key in enumerate(self.script.keys)}

    @cached_property
    def units(self) -> tuple[tuple[int, str, Image | None], ...]:
        """Return every direct write: transaction, target key, image."""
        if not self.direct:
            return ()
        numbers = range(1, len(self.script.transactions) + 1)
        return tuple(
            (n, key, image)
            for n in numbers
            if not self.script.transactions[n - 1].aborted or not self.rules.waits_for_commit
            for key, image in self.script.direct_writes(n).items()
        )

    def start(self) -> State:
        """Return the state right after prepare."""
        n, script = self.script.prepared, self.script
        stored = [Stored() for _ in script.keys]
        if self.loaded:
            for key, image in script.target(n).items():
                stored[self.places[key]] = Stored(Cell(script.v0, image))
        chunks = tuple(Chunk(1, True) if self.loaded else Chunk() for _ in self.ranges)
        return State(n, n, n, n, n, n, script.v0, tuple(stored), chunks, closed=self.loaded, kills=self.kills)

    def steps(self, state: State) -> Iterator[Step]:
        """Yield every process's next steps."""
        if state.stopped:
            return
        yield from self._source(state)
        yield from self._capture(state)
        yield from self._replay(state)
        yield from self._load(state)
        yield from self._directly(state)
        yield from self._maintain(state)

    # -- source and capture

    def _source(self, state: State) -> Iterator[Step]:
        if state.source == len(self.script.transactions):
            return
        number = state.source + 1
        after = state._replace(source=number)
        if not self.capture:
            after = after._replace(received=number, durable=number, confirmed=number)
        one = self.script.transactions[number - 1]
        yield f"source {'aborts' if one.aborted else 'commits'} {number}: {told(one.writes) or 'rewrites the table'}", after

    def _capture(self, state: State) -> Iterator[Step]:
        if not self.capture:
            return
        if state.received < state.source:
            yield f"capture receives {state.received + 1}", state._replace(received=state.received + 1)
        if state.durable < state.received:
            yield f"capture makes all up to {state.received} durable", state._replace(durable=state.received)
        answer = self.rules.acknowledged(state.durable, state.received)
        if answer > state.confirmed:
            yield f"capture acknowledges {answer}", state._replace(confirmed=answer)
        if state.kills and state.received > state.durable:
            # the server sends again from what was acknowledged; whatever lies below is gone
            yield "capture dies", state._replace(received=max(state.durable, state.confirmed), kills=state.kills - 1)

    # -- replay

    def _replay(self, state: State) -> Iterator[Step]:
        if state.offered > state.applied:
            yield f"replay records {state.offered}", state._replace(applied=state.offered)
            if state.kills:
                yield "replay dies", state._replace(offered=state.applied, kills=state.kills - 1)
            return
        if not self.rules.mergeable(True, state.closed):
            return
        if state.truncating[0]:
            yield from self._truncate(state, *state.truncating)
            if state.kills:
                yield "replay dies", state._replace(truncating=(0, False), kills=state.kills - 1)
            return
        for until in range(state.applied + 1, state.durable + 1):
            at = self._truncate_at(state.applied + 1, until)
            if at is not None:
                floor = max(state.floor, self.rules.truncated_floor(at))
                after = state._replace(floor=floor, truncating=(until, state.floor > self.rules.truncated_floor(at)))
                yield f"replay takes {state.applied + 1} to {until} and raises the floor to its last TRUNCATE", after
            else:
                yield from self._offer_batch(state, until)

    def _truncate_at(self, first: int, last: int) -> Version | None:
        """Return the version of the last TRUNCATE among some transactions."""
        found = (
            self.script.version(number, index)
            for number in range(first, last + 1)
            for index, write in enumerate(self.script.transactions[number - 1].writes)
            if write.key is None and self.rules.truncates
        )
        return max(found, default=None)

    def _truncate(self, state: State, until: int, deleted: bool) -> Iterator[Step]:
        """Delete every older row through the gate; the batch's own changes follow, those after its last TRUNCATE."""
        at = self._truncate_at(state.applied + 1, until)
        assert at is not None
        if deleted:
            yield from self._offer_batch(state._replace(truncating=(0, False)), until)
            return
        stored = state.stored
        for key in self.script.keys:
            row = stored[self.places[key]].row
            if row is not None and row.version < at:
                stored = self._offer(stored, key, Cell(at, None), state.floor)
        yield "replay deletes what was truncated", state._replace(stored=stored, truncating=(until, True))

    def _offer_batch(self, state: State, until: int) -> Iterator[Step]:
        """Offer a batch, its unsent values read in any one snapshot of the source that shows it."""
        numbers = range(state.applied + 1, until + 1)
        found = [change for number in numbers for change in self.changes(number)]
        changes = self.rules.after_truncate(found, self._truncate_at(state.applied + 1, until))
        partial = {change.version.lsn // 10 for change in changes if change.image is not None and UNSENT in change.image}
        shown = [n for n in range(self.script.prepared, state.source + 1) if self._shows(n, partial)] if partial else [state.source]
        for stored in dict.fromkeys(self._apply(state, changes, self.script.target(n)) for n in shown):
            yield f"replay offers {state.applied + 1} to {until}", state._replace(stored=stored, offered=until)

    def _shows(self, snapshot: int, transactions: Collection[int]) -> bool:
        """Ask the product's rule, in PostgreSQL's text for a snapshot."""
        return all(self.rules.visible(xid, shown_as(snapshot)) for xid in transactions)

    def changes(self, number: int) -> list[KeyChange]:
        """Return what a transaction of the stream offers."""
        one, script = self.script.transactions[number - 1], self.script
        found: list[KeyChange] = []
        for index, write in enumerate(() if one.aborted else one.writes):
            if write.key is not None:
                old = None if write.old_key is None else script.key(write.old_key)
                found += self.rules.apart(script.version(number, index), script.key(write.key), write.image, old)
        return found

    def _apply(self, state: State, changes: list[KeyChange], read: dict[str, Image]) -> tuple[Stored, ...]:
        """Offer a batch's changes, one a key."""
        held: dict[Key, Held] = {
            key: Held(cast(Image, stored.row.image), stored.row_versions)
            for key, stored in zip(self.script.keys, state.stored, strict=True)
            if stored.row is not None
        }
        stored = state.stored
        for change in self.rules.batch(changes, held, not self.fuzzy, dict(read.items())):
            stored = self._offer(stored, change.key, Cell(change.version, change.image), state.floor)
        return stored

    def _offer(self, all_stored: tuple[Stored, ...], key: object, offer: Cell, floor: Version) -> tuple[Stored, ...]:
        """Offer to a key through the gate."""
        place = self.places[cast(str, key)]
        old = all_stored[place]
        cell = None if old.row_versions is None else Cell(old.row_versions, None)
        if self.rules.merged(cell, [offer], floor) is not offer:
            return all_stored
        version = offer.version
        peak = version if old.peak is None else max(old.peak, version)
        if offer.image is None:
            row_versions = version if self.rules.tombstones else None
            buried = version if old.buried is None else max(old.buried, version)
            new = Stored(None, row_versions, peak, buried)
        else:
            new = Stored(offer, version, peak, old.buried)
        return (*all_stored[:place], new, *all_stored[place + 1 :])

    # -- the loader

    def _load(self, state: State) -> Iterator[Step]:
        if len(state.attempts) < self.attempts and not all(chunk.loaded for chunk in state.chunks):
            token, chunks = self.rules.claimed(state.chunks)
            for snapshot in self._snapshots(state):
                attempts = (*state.attempts, (token, snapshot))
                yield f"attempt {token} claims the chunks, as of {snapshot}", state._replace(chunks=chunks, attempts=attempts)
        for token, snapshot in state.attempts:
            for number, chunk in enumerate(state.chunks):
                if self.rules.markable(chunk, token):
                    stored = self._insert(state, number, snapshot)
                    marked = (*state.chunks[:number], chunk._replace(loaded=True), *state.chunks[number + 1 :])
                    yield f"attempt {token} loads chunk {number} as of {snapshot}", state._replace(chunks=marked, stored=stored)

    def _snapshots(self, state: State) -> list[int]:
        """Return the snapshots under which an attempt may read: the exported one, or any that shows as much as it did."""
        if not self.fuzzy:
            return [self.script.prepared]
        exported = shown_as(self.script.prepared)
        return [n for n in range(state.source + 1) if self.rules.contains(shown_as(n), exported)]

    def _insert(self, state: State, number: int, snapshot: int) -> tuple[Stored, ...]:
        """Insert a chunk's images; the file may have been rewritten under the snapshot, which then shows no row."""
        script, rules = self.script, self.rules
        rewritten = any(one.new_file for one in script.transactions[snapshot : state.source])
        rows = {} if rewritten else script.tables[snapshot]
        version = rules.stamp(script.l0, 10 * state.source + 5)
        stored = list(state.stored)
        for key in self.ranges[number]:
            place = self.places[script.key(key)]
            old = stored[place]
            if key in rows and old.row is None and rules.image_applies(old.row_versions, state.floor, script.v0):
                # as long as the image is stamped v0 the absent row version says so
                row_versions = None if version == script.v0 else version
                stored[place] = old._replace(row=Cell(version, rows[key]), row_versions=row_versions)
        return tuple(stored)

    # -- direct writes and maintenance

    def _directly(self, state: State) -> Iterator[Step]:
        for unit, (number, key, image) in enumerate(self.units):
            if state.direct >> unit & 1 or number > state.source + (not self.rules.waits_for_commit):
                continue
            stored = self._offer(state.stored, key, Cell(self.script.direct(number), image), state.floor)
            yield (
                f"direct write of {number} arrives: {key} = {image}",
                state._replace(stored=stored, direct=state.direct | 1 << unit),
            )

    def _maintain(self, state: State) -> Iterator[Step]:
        since = self.script.transactions[self.script.prepared : state.source]
        file, truncated = sum(one.new_file for one in since), any(TRUNCATE in one.writes for one in since)
        if not state.closed and all(chunk.loaded for chunk in state.chunks):
            if self.rules.closable(state.chunks, 0, file, truncated):
                yield "the table is closed", state._replace(closed=True)
            else:
                yield "the table is stopped", state._replace(stopped="rewritten")
        if state.collected < len(self.collect):
            upto = self.collect[state.collected]
            if self.rules.collectable(state.closed, 10 * (state.applied + 1), upto):
                stored = tuple(
                    one._replace(row_versions=None)
                    if one.row_versions is not None and self.rules.collected(one.row_versions, upto)
                    else one
                    for one in state.stored
                )
                floor = max(state.floor, upto) if self.rules.collection_floor else state.floor
                after = state._replace(stored=stored, floor=floor, collected=state.collected + 1)
                yield f"everything up to {upto.lsn} is collected", after

    # -- the judge

    def wrong(self, state: State) -> str | None:
        """Judge a state: I8, I2, I7, I3 always, I1 at rest."""
        if state.confirmed > state.durable:
            return f"I8: {state.confirmed} was acknowledged and only {state.durable} is durable"
        for key, one in zip(self.script.keys, state.stored, strict=True):
            if one.row_versions is not None and one.peak is not None and one.row_versions < one.peak:
                return f"I2, I7: the cell of {key} went back"
            if state.closed and one.row is not None and one.buried is not None and one.row.version < one.buried:
                return f"I3: {key} lives below a delete that was applied"
        return self._wrong_at_rest(state) if self._rests(state) else None

    def wrong_end(self, state: State) -> str | None:
        """Judge an end: it must be at rest, or stopped with its reason."""
        return None if state.stopped or self._rests(state) else "nothing can happen, and work is left"

    def _rests(self, state: State) -> bool:
        """Everything is committed, offered and closed; direct writes may still come, which must change nothing."""
        return state.closed and state.applied == len(self.script.transactions) and not state.stopped

    def _wrong_at_rest(self, state: State) -> str | None:
        wanted = self.script.target(len(self.script.transactions))
        for key, one in zip(self.script.keys, state.stored, strict=True):
            found = None if one.row is None else one.row.image
            if found != wanted.get(key):
                return f"I1: {key} is {found or 'absent'} and {wanted.get(key) or 'absent'} in the source"
        return None
