"""The world of moving authority: two stores and a lake, per cohort, there and back, with replay both ways and no echo.

The application writes where its cohort's authority is. Each store has a log on an axis of its own, which holds the application's
writes and, marked, what came through its gate. Replay carries either log to the other store and to the lake, in order, stamped by
the authority log. Direct writes to the other store come at any time or never. A move is the product's hand-over, step by step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple, cast

from changeover.jobs.entries import Authority
from changeover.jobs.merge import Cell
from changeover.jobs.tenure import Standing, Tenure, moved
from changeover.position import DUAL_WRITE_ORDINAL, Version, epoch_floor
from changeover.stores.statements import Move
from tests.model.rules import RULES, Rules

OLD, NEW, LAKE = 0, 1, 2
STORES = ("old", "new", "lake")
AXIS = (1000, 10)
"""Where the logs of old and new begin: the new store's positions are the lower ones, which only the epoch puts in order."""

ROUTES = ((OLD, NEW), (NEW, OLD), (OLD, LAKE), (NEW, LAKE))


class Entry(NamedTuple):
    """One committed write in a store's log; a mark says that it came through the gate."""

    key: str
    image: str | None
    marked: bool


class Place(NamedTuple):
    """What a store holds for a key: the row, and the version of the last gated write."""

    row: str | None = None
    touched: Version | None = None


class MoveState(NamedTuple):
    """A moment: logs, what each store holds, how far each route has come, and how authority stands."""

    logs: tuple[tuple[Entry, ...], tuple[Entry, ...]]
    places: tuple[tuple[Place, ...], ...]
    routes: tuple[int, ...]
    floors: tuple[tuple[Version, ...], ...]
    tenures: tuple[Tenure, ...]
    authority: tuple[int | None, ...]
    """Per cohort the store that lets the application write; None while nobody does."""
    written: tuple[int, ...]
    direct: tuple[tuple[int, str, Cell], ...]
    """Direct writes under way: target store, key, offer."""
    moves: int
    step: int
    fence: int
    rogues: int
    calls_off: int
    """How many more hand-overs are called off, or killed, before they are on record."""


@dataclass(frozen=True)
class Moving:
    """A world of moves; `writes` are the application's writes per cohort, each of the cohort's one key."""

    name: str
    writes: tuple[tuple[str | None, ...], ...]
    moves: tuple[int, ...] = (NEW, OLD)
    """Where the first cohort's authority goes, move by move; the others stay at the old store."""
    rules: Rules = RULES
    direct: bool = True
    rogue: bool = False
    reverse: bool = True
    """Replay from the new store's log; without it direct writes alone bring its writes to the old one, and none is lost."""
    calls_off: int = 0

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return each cohort's key, which is its name as well."""
        return tuple("abc"[: len(self.writes)])

    def start(self) -> MoveState:
        """Return the state in which the old store has all authority and nothing was written."""
        floors = tuple(tuple(epoch_floor(0) for _ in self.keys) for _ in STORES)
        places = tuple(tuple(Place() for _ in self.keys) for _ in STORES)
        tenures = tuple(Tenure(key, 0, "old", 0) for key in self.keys)
        zeros = tuple(0 for _ in self.keys)
        return MoveState(
            ((), ()), places, (0,) * len(ROUTES), floors, tenures, zeros, zeros, (), 0, 0, 0, int(self.rogue), self.calls_off
        )

    def steps(self, state: MoveState) -> Iterator[tuple[str, MoveState]]:
        """Yield every process's next steps."""
        yield from self._application(state)
        for number, (source, target) in enumerate(ROUTES):
            if state.routes[number] < len(state.logs[source]):
                if self.reverse:
                    yield self._replay(state, number, source, target)
                elif source == OLD:
                    yield from self._replay_interval(state, number, target)
        for number, (target, key, offer) in enumerate(state.direct):
            rest = state._replace(direct=(*state.direct[:number], *state.direct[number + 1 :]))
            yield f"a direct write arrives at {STORES[target]}: {key} = {offer.image}", self._offer(rest, target, key, offer)
        yield from self._move(state)

    def _application(self, state: MoveState) -> Iterator[tuple[str, MoveState]]:
        for cohort, key in enumerate(self.keys):
            store, done = state.authority[cohort], state.written[cohort]
            if store is None or done == len(self.writes[cohort]):
                continue
            image = self.writes[cohort][done]
            after = self._write(state, store, cohort, Entry(key, image, False), None)
            after = after._replace(written=_with(state.written, cohort, done + 1))
            if self.direct:
                epoch = max(t.epoch for t in state.tenures if t.cohort == key)
                version = Version(epoch, self._lsn(store, len(state.logs[store])) - 1, DUAL_WRITE_ORDINAL)
                stamped = version._replace(epoch=0) if self.rules.epoch_floor(1).epoch == 0 else version
                after = after._replace(direct=(*after.direct, (1 - store, key, Cell(stamped, image))))
            yield f"the application writes {key} = {image} at {STORES[store]}", after
        if state.rogues and state.authority[0] == NEW:
            after = self._write(state, OLD, 0, Entry(self.keys[0], "rogue", False), None)
            yield "somebody writes a = rogue at old, past the refusal", after._replace(rogues=0)

    def _lsn(self, store: int, position: int) -> int:
        return AXIS[store] + 10 * position

    def _write(self, state: MoveState, store: int, cohort: int, entry: Entry, touched: Version | None) -> MoveState:
        """Write a row and its log entry; a write that is not gated leaves the touched row alone."""
        old = state.places[store][cohort]
        places = _with(state.places, store, _with(state.places[store], cohort, Place(entry.image, touched or old.touched)))
        logs = _with(state.logs, store, (*state.logs[store], entry)) if store != LAKE else state.logs
        return state._replace(places=places, logs=logs)

    def _replay(self, state: MoveState, number: int, source: int, target: int) -> tuple[str, MoveState]:
        """Offer a log's next entry to a target, if it is to be offered at all."""
        position = state.routes[number]
        entry = state.logs[source][position]
        after = state._replace(routes=_with(state.routes, number, position + 1))
        lsn = self._lsn(source, position)
        told = f"replay from {STORES[source]} to {STORES[target]}: {entry.key} = {entry.image}"
        standing = self.rules.standing(state.tenures, entry.key, STORES[source], lsn, entry.marked)
        version = self.rules.stamped(state.tenures, entry.key, STORES[source], Version(0, lsn, 0))
        if standing is not Standing.OFFERED or version is None:
            return f"{told} is not offered ({standing.value})", after
        return told, self._offer(after, target, entry.key, Cell(version, entry.image))

    def _replay_interval(self, state: MoveState, number: int, target: int) -> Iterator[tuple[str, MoveState]]:
        """Offer the old store's log by `tenure.offered_intervals`, which lets a target wait, or pass what it is never offered."""
        position = state.routes[number]
        entry, lsn = state.logs[OLD][position], self._lsn(OLD, position)
        intervals = self.rules.offered_intervals(self._authorities(state), takes_over=target == NEW)
        after = state._replace(routes=_with(state.routes, number, position + 1))
        epoch = next((one.epoch for one in intervals if one.since <= lsn < one.until), None)
        told = f"replay from old to {STORES[target]}: {entry.key} = {entry.image}"
        if epoch is not None:
            yield told, self._offer(after, target, entry.key, Cell(Version(epoch, lsn, 0), entry.image))
        elif any(lsn < one.since for one in intervals):
            yield f"{told} is passed over", after

    def _authorities(self, state: MoveState) -> list[Authority]:
        """Return the first cohort's moves as the ledger has them, at positions of the old store's log."""
        found, until = [], 0
        for tenure in (one for one in state.tenures if one.cohort == self.keys[0]):
            if tenure.epoch:
                from_lsn = tenure.since if tenure.store == STORES[OLD] else until
                found.append(Authority(tenure.epoch, tenure.store, from_lsn, datetime.min, None))
            until = tenure.until
        return found

    def _offer(self, state: MoveState, target: int, key: str, offer: Cell) -> MoveState:
        cohort = self.keys.index(key)
        touched = state.places[target][cohort].touched
        if not self.rules.applies(offer.version, touched, state.floors[target][cohort]):
            return state
        entry = Entry(key, cast("str | None", offer.image), True)
        return self._write(state, target, cohort, entry, offer.version)

    # -- the fence of the first cohort

    def _move(self, state: MoveState) -> Iterator[tuple[str, MoveState]]:
        if state.moves == len(self.moves):
            return
        gaining = self.moves[state.moves]
        losing = 1 - gaining
        move = self.rules.hand_over[state.step]
        recorded = Move.RECORD in self.rules.hand_over[: state.step]
        if state.calls_off and state.step and not recorded:
            back = _with(state.authority, 0, losing)
            yield "the fence is called off", state._replace(authority=back, step=0, calls_off=state.calls_off - 1)
        over = state.step + 1 == len(self.rules.hand_over)
        after = state._replace(step=0, moves=state.moves + 1) if over else state._replace(step=state.step + 1)
        if move is Move.FREEZE:
            after = after._replace(authority=_with(after.authority, 0, None))
        elif move is Move.POSITION:
            after = after._replace(fence=len(state.logs[losing]))
        elif move is Move.AWAIT:
            carried = state.routes[ROUTES.index((losing, gaining))] >= state.fence
            mirrored = all(target != OLD for target, _, _ in state.direct)
            if not (carried if self.reverse or gaining == NEW else mirrored):
                return
        elif move is Move.RAISE_FLOOR:
            after = self._raise_floor(after, gaining, recorded)
        else:
            since = self._lsn(gaining, len(state.logs[gaining]))
            epoch = max(t.epoch for t in state.tenures if t.cohort == self.keys[0]) + 1
            tenures = moved(state.tenures, self.keys[0], STORES[gaining], epoch, self._lsn(losing, state.fence), since)
            after = after._replace(tenures=tenures, authority=_with(after.authority, 0, gaining))
        yield f"the fence to {STORES[gaining]} {move.value}", after

    def _raise_floor(self, state: MoveState, gaining: int, recorded: bool) -> MoveState:
        epoch = max(t.epoch for t in state.tenures if t.cohort == self.keys[0]) + (not recorded)
        floor = max(state.floors[gaining][0], self.rules.epoch_floor(epoch))
        return state._replace(floors=_with(state.floors, gaining, _with(state.floors[gaining], 0, floor)))

    # -- the judge

    def wrong(self, state: MoveState) -> str | None:
        """Judge a state: the store with authority has the application's last write; at rest every store has it."""
        for cohort, key in enumerate(self.keys):
            wanted = self.writes[cohort][state.written[cohort] - 1] if state.written[cohort] else None
            store = state.authority[cohort]
            if store is not None and state.places[store][cohort].row != wanted:
                return (
                    f"I9: {key} is {state.places[store][cohort].row} at {STORES[store]}, which has authority, and was last {wanted}"
                )
            if self._rests(state):
                for name, places in zip(STORES, state.places, strict=True):
                    found = places[cohort].row
                    if found != wanted and not (found == "rogue" and name == "old"):
                        return f"I1: {key} is {found} at {name} and was last written {wanted}"
        return None

    def _rests(self, state: MoveState) -> bool:
        idle = state.step == 0 and state.moves == len(self.moves)
        routes = [(n, source) for n, (source, _) in enumerate(ROUTES) if self.reverse or source == OLD]
        carried = all(state.routes[n] == len(state.logs[source]) for n, source in routes)
        return idle and carried and all(done == len(w) for done, w in zip(state.written, self.writes, strict=True))

    def wrong_end(self, state: MoveState) -> str | None:
        """Judge an end: all must be done."""
        return None if self._rests(state) else "nothing can happen, and work is left"


def _with(values: tuple[Any, ...], place: int, value: object) -> Any:
    """Return a tuple with one value replaced."""
    return (*values[:place], value, *values[place + 1 :])
