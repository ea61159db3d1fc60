"""The world of the environment: what others do to stores and sessions at any time, while a table is loaded, verified and fenced.

Somebody takes the table out of the stream's definition and puts it back, so that the writes meanwhile are in no event. Somebody
switches on a filter, after which a session that may be filtered reads fewer rows, or gives the target a narrower type. A timeout
may end any statement with its transaction, and the step is done again. The judge knows what the application wrote, and no rule of
the product: an "equal" must be true of the moment that it names, and a fence may leave nothing behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from typing import NamedTuple, cast

from changeover.jobs.guarantee.definition import MEMBER, Piece
from changeover.stores.base.statements import Move
from tests.model.rules import PLANNED_TYPE, RULES, Rules
from tests.model.script import Script, told

Rows = tuple[str | None, ...]
"""What each key's row holds, in the keys' order; None where there is none."""

WIDE, NARROW = PLANNED_TYPE, "numeric(10,2)"
"""The target's column: as planned, and as somebody may make it."""

STORES = OLD, NEW = "old", "new"


class Definition(NamedTuple):
    """The stream's definition: how often it was changed, and whether the table's writes are in it."""

    changes: int = 0
    whole: bool = True

    @property
    def row(self) -> Piece | None:
        """Return the table's row in the publication, of the transaction that put it there; None while it is taken out."""
        return Piece(MEMBER, "t", "t", 1, str(self.changes), {"prqual": None}) if self.whole else None


PREPARED = cast(Piece, Definition().row)
"""The row on record."""


class Surroundings(NamedTuple):
    """What others may still do: change the definition, switch the filter, narrow the type, end a statement."""

    definition: int = 0
    filter: int = 0
    type: int = 0
    timeout: int = 0


class Look(NamedTuple):
    """A verification under way: its moment, the frozen target, and of each range what the old store and the new one gave."""

    moment: int
    target: Rows
    column: str
    read: tuple[bool, ...]
    found: Rows
    shown: Rows


class State(NamedTuple):
    """A moment; positions are numbers of transactions."""

    rows: Rows
    loaded: tuple[bool, ...]
    left: Surroundings
    source: int = 1
    lost: frozenset[int] = frozenset()
    """Transactions that are in no event."""
    definition: Definition = Definition()
    filtered: frozenset[str] = frozenset()
    """The stores in which a session of ours may be filtered."""
    column: str = WIDE
    image: tuple[int, str | None] | None = None
    """A chunk that was read and not written yet."""
    applied: int = 1
    look: Look | None = None
    verdict: str = ""
    true: bool = True
    """Whether the verdict is: the judge's, no rule sees it."""
    step: int = 0
    frozen: bool = False
    over: bool = False
    stopped: str = ""


Step = tuple[str, State]


@dataclass(frozen=True)
class Environment:
    """A world of some moves of the environment."""

    name: str
    script: Script
    moves: Surroundings
    rules: Rules = RULES
    fences: bool = True

    def start(self) -> State:
        """Return the state right after prepare."""
        none = tuple(None for _ in self.script.keys)
        return State(none, tuple(False for _ in none), self.moves)

    def steps(self, state: State) -> Iterator[Step]:
        """Yield every next step; a table that is stopped takes none."""
        if state.stopped or state.over:
            return
        yield from self._application(state)
        yield from self._others(state)
        yield from self._watch(state)
        yield from self._load(state)
        yield from self._replay(state)
        yield from self._verify(state)
        yield from self._fence(state)

    def _source(self, number: int) -> Rows:
        table = self.script.tables[number]
        return tuple(str(table[key][0]) if key in table else None for key in self.script.keys)

    # -- what is not ours

    def _application(self, state: State) -> Iterator[Step]:
        if state.frozen or state.source == len(self.script.transactions):
            return
        number = state.source + 1
        lost = state.lost if state.definition.whole else state.lost | {number}
        writes = told(self.script.transactions[number - 1].writes)
        yield f"source commits {number}: {writes}", state._replace(source=number, lost=lost)

    def _others(self, state: State) -> Iterator[Step]:
        left, definition = state.left, state.definition
        if left.definition:
            other = Definition(definition.changes + 1, not definition.whole)
            what = "put back into" if other.whole else "taken out of"
            fewer = left._replace(definition=left.definition - 1)
            yield f"the table is {what} the publication", state._replace(definition=other, left=fewer)
        for store in STORES if left.filter else ():
            fewer = left._replace(filter=left.filter - 1)
            switched = "off" if store in state.filtered else "on"
            after = state._replace(filtered=state.filtered ^ {store}, left=fewer)
            yield f"row security is switched {switched} in the {store} store", after
        if left.type and state.column == WIDE:
            rows = tuple(cast_to(NARROW, value) for value in state.rows)
            after = state._replace(column=NARROW, rows=rows, left=left._replace(type=left.type - 1))
            yield "the target's column gets a narrower type", after

    def _ends(self, state: State, what: str, after: State) -> Iterator[Step]:
        """A timeout ends a statement, and its transaction with it."""
        if state.left.timeout:
            yield f"a timeout ends {what}", after._replace(left=state.left._replace(timeout=state.left.timeout - 1))

    # -- load and replay

    def _load(self, state: State) -> Iterator[Step]:
        if state.image is not None:
            chunk, value = state.image
            marked = state._replace(image=None, loaded=_put(state.loaded, chunk, True))
            rows = _put(state.rows, chunk, cast_to(state.column, value))
            yield f"chunk {chunk} is written and marked", marked._replace(rows=rows)
            yield from self._ends(state, f"the load of chunk {chunk}", self._done(state._replace(image=None), marked))
            return
        for chunk, loaded in enumerate(state.loaded):
            if not loaded:
                for value in self._read(state, OLD, self._source(1)[chunk]):
                    yield f"chunk {chunk} is read: {value}", state._replace(image=(chunk, value))

    def _read(self, state: State, store: str, row: str | None) -> tuple[str | None, ...]:
        """Return what a session gets of a row: all of it, or where it is filtered a refusal, or no row."""
        if store not in state.filtered:
            return (row,)
        return () if self.rules.filtered_read == "refused" else (None,)

    def _done(self, undone: State, taken_for_done: State) -> State:
        """Return what is taken to be after a statement that a timeout ended."""
        return undone if self.rules.ended_statement == "repeated" else taken_for_done

    def _replay(self, state: State) -> Iterator[Step]:
        if not all(state.loaded) or state.applied == state.source:
            return
        rows, after = state.rows, state._replace(applied=state.source)
        for number in range(state.applied + 1, state.source + 1):
            for write in () if number in state.lost else self.script.transactions[number - 1].writes:
                value = None if write.image is None else cast_to(state.column, str(write.image[0]))
                rows = _put(rows, self.script.keys.index(str(write.key)), value)
        yield f"replay offers up to {state.source}", after._replace(rows=rows)
        yield from self._ends(state, "replay's batch", self._done(state, after))

    # -- the looks at the definition

    def _changed(self, state: State) -> bool:
        return self.rules.definition_changed(PREPARED, state.definition.row)

    def _watch(self, state: State) -> Iterator[Step]:
        if self._changed(state):
            yield "capture looks, and stops the table", state._replace(stopped="the stream's definition was changed")

    # -- the verdict

    def _verify(self, state: State) -> Iterator[Step]:
        if state.frozen or state.verdict or not all(state.loaded) or state.image is not None:
            return
        look = state.look
        if look is None:
            if state.applied == state.source:
                unread, none = tuple(False for _ in state.rows), tuple(None for _ in state.rows)
                begun = Look(state.source, state.rows, state.column, unread, none, none)
                yield f"verify takes its moment, {state.source}", state._replace(look=begun)
            return
        for place, read in enumerate(look.read):
            if not read:
                olds = self._read(state, OLD, self._source(look.moment)[place])
                news = self._read(state, NEW, look.target[place])
                for found, shown in product(olds, news):
                    done = _put(look.read, place, True)
                    after = look._replace(read=done, found=_put(look.found, place, found), shown=_put(look.shown, place, shown))
                    yield f"verify reads range {place}: {found} and {shown}", state._replace(look=after)
                yield from self._ends(state, f"verify's reading of range {place}", state._replace(look=None))
        if self.rules.covered(look.read):
            yield from self._say(state, look)

    def _say(self, state: State, look: Look) -> Iterator[Step]:
        pairs = zip(look.read, look.found, look.shown, strict=True)
        equal = all(self.rules.compared(look.column, found, there) for read, found, there in pairs if read)
        word = "equal" if equal else "different"
        true = look.target == self._source(look.moment)
        yield f"verify says {word} at {look.moment}", state._replace(look=None, verdict=word, true=true)

    # -- the fence

    def _fence(self, state: State) -> Iterator[Step]:
        if state.verdict != "equal" or not self.fences:
            return
        moves = self.rules.hand_over
        move = moves[state.step]
        after = state._replace(step=state.step + 1, over=state.step + 1 == len(moves))
        if move is Move.FREEZE:
            after = after._replace(frozen=True)
        elif move is Move.COMPARE and self._changed(state):
            after = state._replace(frozen=False, stopped="the fence found another definition")
        elif move is Move.AWAIT and state.applied < state.source:
            return
        yield f"the fence {move.value}", after
        if state.step and Move.RECORD not in moves[: state.step]:
            yield from self._ends(state, "the fence's session, and it is called off", state._replace(step=0, frozen=False))

    # -- the judge

    def wrong(self, state: State) -> str | None:
        """Judge a state: an "equal" is true, and what the fence hands over is all there is."""
        if state.verdict == "equal" and not state.true:
            return f"I1: equal was said of {self._source(state.source)} and {state.rows}"
        if state.over and state.rows != self._source(state.source):
            return f"I9: authority moved to {state.rows} and the old store has {self._source(state.source)}"
        return None

    def wrong_end(self, state: State) -> str | None:
        """Judge an end: where nobody but a timeout interfered all is done."""
        untouched = state.left._replace(timeout=0) == self.moves._replace(timeout=0)
        done = state.over if self.fences else state.verdict == "equal"
        return "nothing can happen, and work is left" if untouched and not done else None


def _put(values: tuple[object, ...], place: int, value: object) -> tuple:  # type: ignore[type-arg]
    return (*values[:place], value, *values[place + 1 :])


def cast_to(column_type: str, value: str | None) -> str | None:
    """Return a value as a column of that type holds it: a server casts by itself."""
    return str(Decimal(value).quantize(Decimal("0.01"))) if value is not None and column_type == NARROW else value
