"""Worlds at statement level on the source's side: the fence against writers, and the trigger log against concurrent writers.

A fence creates a refusing trigger, or replaces the list of tenants in its function, under a lock that waits for the writers before
it. The trigger log's worlds write one key from two transactions, and the log, read in the order of its versions, must end at the
row that the table has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from changeover.stores.base.statements import Move
from tests.model.rules import Rules
from tests.model.server import Moment, Operation, Process, ServerWorld, Turn, Waits

AUTHORITY, LOG, APPLIED, FENCE = range(4)
"""Places: the store that has authority; who committed, in order; how much of that replay has offered; the fence's position."""


def tenant_fence(rules: Rules) -> ServerWorld:
    """Writers of one tenant, one of them with an old snapshot, while the list in the refusing trigger's function is replaced."""
    writers = [
        Process("writer", (*_asks(rules, first=False), *_writes("writer"))),
        Process("writer with an old snapshot", (*_asks(rules, first=True), *_writes("old"))),
        Process("third writer", (*_asks(rules, first=False), *_writes("third"))),
    ]
    return _fence_world("fence of a tenant", rules, writers)


def whole_fence(rules: Rules) -> ServerWorld:
    """Writers of a table while the refusing trigger is created, whose lock they hold off until they commit."""
    writers = [Process(name, (*_meets_trigger(), *_writes(name))) for name in ("writer", "second writer", "third writer")]
    return _fence_world("fence of all rows", rules, writers)


def _asks(rules: Rules, *, first: bool) -> Iterator[Operation]:
    """The refusing trigger asks whether the row's tenant is in its list, in a statement that has locked its table.

    In the catalogue there is one list, today's; from a table a statement reads that of its snapshot, which in a transaction that
    has one already is taken before the lock.
    """

    def see(turn: Turn) -> None:
        turn.see((AUTHORITY,))

    def ask(turn: Turn) -> None:
        turn.lock_table("shared")
        if not first:
            see(turn)
        found = turn.rows[AUTHORITY] if rules.authority_read == "catalogue" else turn.seen(AUTHORITY)
        if found.value != "old":
            turn.roll_back(LAST)

    if first:
        yield Operation("begins, with a snapshot", see)
        yield Operation("computes for a while", lambda turn: None)
    yield Operation(f"locks the table and looks for its tenant ({rules.authority_read})", ask)


def _meets_trigger() -> Iterator[Operation]:
    """A statement locks its table first and then sees the triggers that are on it."""

    def lock(turn: Turn) -> None:
        turn.lock_table("shared")
        if turn.rows[AUTHORITY].value != "old":
            turn.roll_back(LAST)

    yield Operation("locks the table and looks for triggers", lock)


LAST = 1 << 30
"""Past the end of every program."""


def _writes(name: str) -> Iterator[Operation]:
    def commit(turn: Turn) -> None:
        rows = list(turn.rows)
        rows[LOG] = rows[LOG]._replace(value=(*cast("tuple[str, ...]", rows[LOG].value), name))
        turn.rows = tuple(rows)
        turn.commit()

    yield Operation("writes its row", lambda turn: None)
    yield Operation("commits", commit)


def _take_table() -> Iterator[Operation]:
    def create(turn: Turn) -> None:
        turn.lock_table("exclusive")
        turn.write(AUTHORITY, "new")

    yield Operation("creates or replaces the refusing trigger", create)
    yield Operation("commits that", lambda turn: turn.commit())


def _fence_world(name: str, rules: Rules, writers: list[Process]) -> ServerWorld:
    def set_value(turn: Turn, place: int, value: int) -> None:
        turn.write(place, value)
        turn.commit()

    def length(turn: Turn) -> int:
        return len(cast("tuple[str, ...]", turn.rows[LOG].value))

    def read_position(turn: Turn) -> None:
        set_value(turn, FENCE, length(turn))

    def await_applied(turn: Turn) -> None:
        if cast(int, turn.rows[APPLIED].value) < cast(int, turn.rows[FENCE].value):
            raise Waits

    def replay(turn: Turn) -> None:
        """Offer what is there; what lies above the fence's position is outside of the old store's interval."""
        fence = turn.rows[FENCE].value
        end = length(turn) if fence is None else min(length(turn), cast(int, fence))
        set_value(turn, APPLIED, max(end, cast(int, turn.rows[APPLIED].value)))

    moves: Mapping[Move, Callable[[], Iterator[Operation]]] = {
        Move.FREEZE: _take_table,
        Move.POSITION: lambda: iter([Operation(Move.POSITION.value, read_position)]),
        Move.AWAIT: lambda: iter([Operation(Move.AWAIT.value, await_applied)]),
        Move.RAISE_FLOOR: lambda: iter([Operation(Move.RAISE_FLOOR.value, lambda turn: None)]),
        Move.RECORD: lambda: iter([Operation(Move.RECORD.value, lambda turn: None)]),
    }
    made = [move for move in rules.hand_over if move is not Move.COMPARE]  # which is the matter of `environment`
    fence = Process("fence", tuple(operation for move in made for operation in moves[move]()))
    applier = Process("replay", tuple(Operation("offers what was committed", replay) for _ in range(len(writers) + 1)))

    def judge(state: Moment) -> str | None:
        position, log = state.rows[FENCE].value, cast("tuple[str, ...]", state.rows[LOG].value)
        if position is not None and state.rows[AUTHORITY].value == "new" and len(log) > cast(int, position):
            return f"I9: {log[-1]} wrote under the old authority after the fence"
        return None

    def judge_end(state: Moment) -> str | None:
        return None if state.rows[APPLIED].value == state.rows[FENCE].value else "I1: a write below the fence was not applied"

    # replay goes on for as long as it takes: its last offer waits for the fence's position
    last = Operation("offers the rest", lambda turn: _after_position(turn, replay))
    applier = Process(applier.name, (*applier.program, last))
    return ServerWorld(name, (*writers, fence, applier), ("old", (), 0, None), judge, judge_end)


def _after_position(turn: Turn, replay: Callable[[Turn], None]) -> None:
    if turn.rows[FENCE].value is None:
        raise Waits
    replay(turn)


# -- the trigger log

ROW, DRAWN, LOGGED = 0, 1, 2
"""Places: the user's row; the sequence, which no rollback takes back; then each transaction's entry of the log."""


@dataclass(frozen=True)
class LoggedWrite:
    """One transaction that writes the key: an insert, an update or (None) a delete."""

    name: str
    image: str | None
    inserts: bool = False


def trigger_log(rules: Rules) -> ServerWorld:
    """A delete, an insert of the same key that waits for it, and an update, each logged by a row trigger."""
    writes = (LoggedWrite("delete", None), LoggedWrite("insert", "new row", inserts=True), LoggedWrite("update", "updated"))
    rows = ("old row", 0, *(None for _ in writes))
    processes = tuple(_logged(rules, write, LOGGED + place) for place, write in enumerate(writes))

    def judge_end(state: Moment) -> str | None:
        entries = sorted(cast("tuple[int, str | None]", row.value) for row in state.rows[LOGGED:] if row.value is not None)
        last = entries[-1][1] if entries else "old row"
        now = state.rows[ROW].value
        return None if last == now else f"I1: the log ends with {last} and the table has {now}"

    return ServerWorld("trigger log", processes, rows, lambda state: None, judge_end)


def _logged(rules: Rules, write: LoggedWrite, entry: int) -> Process:
    def draw(turn: Turn) -> None:
        rows = list(turn.rows)
        number = cast(int, rows[DRAWN].value) + 1
        rows[DRAWN] = rows[DRAWN]._replace(value=number)
        turn.rows = tuple(rows)
        turn.write(entry, (number, write.image))

    def place(turn: Turn) -> None:
        now = turn.wait_for(ROW)
        if write.inserts is (now.value is None):
            turn.write(ROW, write.image)
        else:
            turn.roll_back(LAST)  # a unique violation, or no row to change

    draws, places = Operation("draws its version", draw), Operation(f"{write.name}s the row", place)
    before = rules.trigger_timing == "BEFORE" and write.inserts  # an existing row is locked before its BEFORE trigger fires
    return Process(write.name, (*((draws, places) if before else (places, draws)), Operation("commits", lambda t: t.commit())))


SOURCES: Mapping[str, Callable[[Rules], ServerWorld]] = {make.__name__: make for make in (tenant_fence, whole_fence, trigger_log)}
"""Every world of the source's side, by name."""
