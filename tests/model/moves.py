"""The world of moving authority: two stores and a lake, there and back, all rows or tenant by tenant, with replay both ways.

The application writes where its tenant's authority is. Each store has a log on an axis of its own, which holds the application's
writes and, marked, what came through its gate. Replay carries either log to the other store and to the lake, in order, by the
sections that the product makes of the moves on record. Direct writes to the other store come at any time or never. A move is the
product's hand-over, step by step, of all rows or of the tenants that it names, and has an epoch of the one count that there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from typing import Any, NamedTuple, cast

from changeover.jobs.ledger.epochs import AuthorityEpoch, Section, authority_epochs, moving
from changeover.jobs.ledger.records import Authority
from changeover.position import DUAL_WRITE_ORDINAL, Version, epoch_floor
from changeover.stores.base.statements import Move
from changeover.tenants import EVERY
from tests.model.gate import Cell
from tests.model.rules import RULES, Rules

OLD, NEW, LAKE = 0, 1, 2
STORES = ("old", "new", "lake")
AXIS = (1000, 10)
"""Where the logs of old and new begin: the new store's positions are the lower ones, which only the epoch puts in order."""

ROUTES = ((OLD, NEW), (NEW, OLD), (OLD, LAKE), (NEW, LAKE))


Names = tuple[str, ...] | None
"""The tenants that a move names, None for all rows."""


class Entry(NamedTuple):
    """One committed write in a store's log; a mark says that it came through the gate."""

    key: str
    image: str | None
    marked: bool


class Made(NamedTuple):
    """A move on record, its epoch being its place: to which store, and where the logs of old and new were."""

    store: str
    old: int
    new: int
    names: Names


class Place(NamedTuple):
    """What a store holds for a key: the row, and the version of the last gated write."""

    row: str | None = None
    row_versions: Version | None = None


class MoveState(NamedTuple):
    """A moment: logs, what each store holds, how far each route has come, and how authority stands."""

    logs: tuple[tuple[Entry, ...], tuple[Entry, ...]]
    places: tuple[tuple[Place, ...], ...]
    routes: tuple[int, ...]
    floors: tuple[tuple[Version, ...], ...]
    changes: tuple[Made, ...]
    authority: tuple[int | None, ...]
    """Per tenant the store that lets the application write; None while nobody does."""
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
    """A world of moves; `writes` are the application's writes per tenant, each of the tenant's one key."""

    name: str
    writes: tuple[tuple[str | None, ...], ...]
    moves: tuple[tuple[int, Names], ...] = ((NEW, None), (OLD, None))
    """Where authority goes, move by move, and whose."""
    rules: Rules = RULES
    direct: bool = True
    rogue: bool = False
    reverse: bool = True
    """Replay from the new store's log; without it direct writes alone bring its writes to the old one, and none is lost."""
    calls_off: int = 0

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Return each tenant's key, which is its name as well."""
        return tuple("abc"[: len(self.writes)])

    def start(self) -> MoveState:
        """Return the state in which the old store has all authority and nothing was written."""
        floors = tuple(tuple(epoch_floor(0) for _ in self.keys) for _ in STORES)
        places = tuple(tuple(Place() for _ in self.keys) for _ in STORES)
        zeros = tuple(0 for _ in self.keys)
        return MoveState(
            ((), ()), places, (0,) * len(ROUTES), floors, (), zeros, zeros, (), 0, 0, 0, int(self.rogue), self.calls_off
        )

    def steps(self, state: MoveState) -> Iterator[tuple[str, MoveState]]:
        """Yield every process's next steps."""
        yield from self._application(state)
        for number, (source, target) in enumerate(ROUTES):
            if state.routes[number] < len(state.logs[source]) and (self.reverse or source == OLD):
                yield from self._replay(state, number, source, target)
        for number, (target, key, offer) in enumerate(state.direct):
            rest = state._replace(direct=(*state.direct[:number], *state.direct[number + 1 :]))
            yield f"a direct write arrives at {STORES[target]}: {key} = {offer.image}", self._offer(rest, target, key, offer)
        yield from self._move(state)

    def _application(self, state: MoveState) -> Iterator[tuple[str, MoveState]]:
        for tenant, key in enumerate(self.keys):
            store, done = state.authority[tenant], state.written[tenant]
            if store is None or done == len(self.writes[tenant]):
                continue
            image = self.writes[tenant][done]
            after = self._write(state, store, tenant, Entry(key, image, False), None)
            after = after._replace(written=_with(state.written, tenant, done + 1))
            if self.direct:
                epoch = _tenure(state.changes, key).epoch
                version = Version(epoch, self._lsn(store, len(state.logs[store])) - 1, DUAL_WRITE_ORDINAL)
                stamped = version._replace(epoch=0) if self.rules.epoch_floor(1).epoch == 0 else version
                after = after._replace(direct=(*after.direct, (1 - store, key, Cell(stamped, image))))
            yield f"the application writes {key} = {image} at {STORES[store]}", after
        if state.rogues and state.authority[0] == NEW:
            after = self._write(state, OLD, 0, Entry(self.keys[0], "rogue", False), None)
            yield "somebody writes a = rogue at old, past the refusal", after._replace(rogues=0)

    def _lsn(self, store: int, position: int) -> int:
        return AXIS[store] + 10 * position

    def _write(self, state: MoveState, store: int, tenant: int, entry: Entry, row_versions: Version | None) -> MoveState:
        """Write a row and its log entry; a write that is not gated leaves the row version alone."""
        old = state.places[store][tenant]
        places = _with(
            state.places, store, _with(state.places[store], tenant, Place(entry.image, row_versions or old.row_versions))
        )
        logs = _with(state.logs, store, (*state.logs[store], entry)) if store != LAKE else state.logs
        return state._replace(places=places, logs=logs)

    def _sections(self, state: MoveState, source: int, target: int) -> list[Section]:
        return _sections(self.rules, state.changes, self.reverse, STORES[source], target == NEW)

    def _replay(self, state: MoveState, number: int, source: int, target: int) -> Iterator[tuple[str, MoveState]]:
        """Offer a log's next entry to a target, if it is to be offered at all; behind the last section a route waits."""
        position = state.routes[number]
        entry, lsn = state.logs[source][position], self._lsn(source, position)
        sections = self._sections(state, source, target)
        if all(section[0].until <= lsn for section in sections):
            return
        after = state._replace(routes=_with(state.routes, number, position + 1))
        told = f"replay from {STORES[source]} to {STORES[target]}: {entry.key} = {entry.image}"
        here = [one for section in sections for one in section if one.since <= lsn < one.until and entry.key in one.tenants]
        mine = [one for one in here if one.echo or not entry.marked]
        if not mine:
            yield f"{told} is not offered", after
        for one in mine:
            yield told, self._offer(after, target, entry.key, Cell(Version(one.epoch, lsn, 0), entry.image))

    def _offer(self, state: MoveState, target: int, key: str, offer: Cell) -> MoveState:
        tenant = self.keys.index(key)
        row_versions = state.places[target][tenant].row_versions
        if not self.rules.applies(offer.version, row_versions, state.floors[target][tenant]):
            return state
        entry = Entry(key, cast("str | None", offer.image), True)
        return self._write(state, target, tenant, entry, offer.version)

    # -- the fences, one at a time

    @cached_property
    def hand_over(self) -> tuple[Move, ...]:
        """Return the moves of a fence, without the comparison that is `environment`'s matter."""
        return tuple(move for move in self.rules.hand_over if move is not Move.COMPARE)

    def _move(self, state: MoveState) -> Iterator[tuple[str, MoveState]]:
        if state.moves == len(self.moves):
            return
        gaining, names = self.moves[state.moves]
        losing = 1 - gaining
        move = self.hand_over[state.step]
        recorded = Move.RECORD in self.hand_over[: state.step]
        made = self._made(state, gaining, names)
        if state.calls_off and state.step and not recorded:
            back = tuple(self._holder(state.changes, key) for key in self.keys)
            yield "the fence is called off", state._replace(authority=back, step=0, calls_off=state.calls_off - 1)
        over = state.step + 1 == len(self.hand_over)
        after = state._replace(step=0, moves=state.moves + 1) if over else state._replace(step=state.step + 1)
        if move is Move.FREEZE:
            whose = moving(_recorded(state.changes), STORES[gaining], names)
            assert whose is not None
            held = zip(self.keys, after.authority, strict=True)
            after = after._replace(authority=tuple(None if key in whose else store for key, store in held))
        elif move is Move.POSITION:
            after = after._replace(fence=len(state.logs[losing]))
        elif move is Move.AWAIT:
            carried = state.routes[ROUTES.index((losing, gaining))] >= state.fence
            mirrored = all(target != OLD for target, _, _ in state.direct)
            if not (carried if self.reverse or gaining == NEW else mirrored):
                return
        elif move is Move.RAISE_FLOOR:
            after = self._raise_floors(after, gaining, state.changes if recorded else (*state.changes, made))
        else:
            changes = (*state.changes, made)
            after = after._replace(changes=changes, authority=tuple(self._holder(changes, key) for key in self.keys))
        yield f"the fence of {'all rows' if names is None else ' '.join(names)} to {STORES[gaining]} {move.value}", after

    def _made(self, state: MoveState, gaining: int, names: Names) -> Made:
        """Return the move as the ledger records it, with the position that was read in the losing log."""
        ends = {1 - gaining: state.fence, gaining: len(state.logs[gaining])}
        places = {store: self._lsn(store, end) for store, end in ends.items()}
        return Made(STORES[gaining], places[OLD], places[NEW], names)

    def _holder(self, changes: tuple[Made, ...], key: str) -> int:
        return STORES.index(_tenure(changes, key).store)

    def _raise_floors(self, state: MoveState, gaining: int, changes: tuple[Made, ...]) -> MoveState:
        """Raise the floors: of all rows in the gaining store, or where tenants move apart in both, each tenant's."""
        apart = any(names is not None for _, names in self.moves)
        floors = self.rules.floors(_recorded(changes)) if apart else [(len(changes), EVERY)]
        for store in (OLD, NEW) if apart else (gaining,):
            raised = tuple(
                max([floor, *(self.rules.epoch_floor(epoch) for epoch, whose in floors if key in whose)])
                for key, floor in zip(self.keys, state.floors[store], strict=True)
            )
            state = state._replace(floors=_with(state.floors, store, raised))
        return state

    # -- the judge

    def wrong(self, state: MoveState) -> str | None:
        """Judge a state: the store with authority has the application's last write; at rest every store has it."""
        for tenant, key in enumerate(self.keys):
            wanted = self.writes[tenant][state.written[tenant] - 1] if state.written[tenant] else None
            store = state.authority[tenant]
            if store is not None and state.places[store][tenant].row != wanted:
                return (
                    f"I9: {key} is {state.places[store][tenant].row} at {STORES[store]}, which has authority, and was last {wanted}"
                )
            if self._rests(state):
                for name, places in zip(STORES, state.places, strict=True):
                    found = places[tenant].row
                    if found != wanted and not (found == "rogue" and name == "old"):
                        return f"I1: {key} is {found} at {name} and was last written {wanted}"
        return None

    def _rests(self, state: MoveState) -> bool:
        idle = state.step == 0 and state.moves == len(self.moves)
        routes = [(n, source) for n, (source, _) in enumerate(ROUTES) if self.reverse or source == OLD]
        carried = all(self._is_carried(state, n, source) for n, source in routes)
        return idle and carried and all(done == len(w) for done, w in zip(state.written, self.writes, strict=True))

    def _is_carried(self, state: MoveState, number: int, source: int) -> bool:
        """Return whether a route has nothing to offer any more: what it has not come to lies behind its last section."""
        end = max((section[0].until for section in self._sections(state, source, ROUTES[number][1])), default=0)
        return state.routes[number] == len(state.logs[source]) or self._lsn(source, state.routes[number]) >= end

    def wrong_end(self, state: MoveState) -> str | None:
        """Judge an end: all must be done."""
        return None if self._rests(state) else "nothing can happen, and work is left"


@cache
def _recorded(changes: tuple[Made, ...]) -> tuple[Authority, ...]:
    """Return the moves as the ledger has them."""
    return tuple(
        Authority(epoch, made.store, made.old, datetime.min, 0.0, made.new, None if made.names is None else frozenset(made.names))
        for epoch, made in enumerate(changes, 1)
    )


@cache
def _tenure(changes: tuple[Made, ...], key: str) -> AuthorityEpoch:
    """Return a tenant's present tenure."""
    return authority_epochs(_recorded(changes), key)[-1]


@cache
def _sections(rules: Rules, changes: tuple[Made, ...], reverse: bool, store: str, takes_over: bool) -> list[Section]:
    """Return the parts of a store's log that a target is offered, as replay asks for them."""
    carried = frozenset(change.epoch for change in _recorded(changes) if reverse and change.store == STORES[NEW])
    found = rules.sections(_recorded(changes), takes_over=takes_over, carried=carried)
    return [section for section in found if section[0].store == store]


def _with(values: tuple[Any, ...], place: int, value: object) -> Any:
    """Return a tuple with one value replaced."""
    return (*values[:place], value, *values[place + 1 :])
