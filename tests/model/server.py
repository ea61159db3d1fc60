"""A small PostgreSQL: rows with snapshots per statement, row locks held to the commit, and one advisory lock.

What it keeps of the real one, under READ COMMITTED: a statement sees what was committed when its snapshot was taken, and its
own transaction's writes; a row that another transaction has written or locked is waited for, and then looked at anew; a row
that was deleted and inserted again is another row, which an older snapshot does not lead to; a unique conflict waits for the
transaction that is in the way and then sees its row, whatever the snapshot says. Every operation on one row is a step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SHARE, UPDATE, NO_LOCK = "share", "update", ""


class Row(NamedTuple):
    """A place for a row: how many rows have stood here, and the present one's value, or None."""

    inserted: int
    value: Hashable


class Session(NamedTuple):
    """One process: its place in its program, and its open transaction's snapshot, writes and locks."""

    at: int = 0
    lives: int = 0
    token: int = 0
    batch: tuple[Hashable, ...] = ()
    snapshot: tuple[tuple[int, Row], ...] = ()
    writes: tuple[tuple[int, Row], ...] = ()
    locks: tuple[tuple[int, str], ...] = ()
    table_lock: str = ""


class Moment(NamedTuple):
    """Everything that is committed, and every session."""

    rows: tuple[Row, ...]
    sessions: tuple[Session, ...]


class Waits(Exception):
    """The operation waits for another transaction."""


class Turn:
    """One session's operation on a moment; `done` gives the moment after it."""

    def __init__(self, moment: Moment, me: int) -> None:
        self.rows = moment.rows
        self.sessions = moment.sessions
        self.me = me
        own = moment.sessions[me]
        self.at, self.lives, self.token, self.batch, self.snapshot, self.writes, self.locks, self.table_lock = own

    def done(self) -> Moment:
        """Return the moment after this turn."""
        own = Session(self.at, self.lives, self.token, self.batch, self.snapshot, self.writes, self.locks, self.table_lock)
        return Moment(self.rows, (*self.sessions[: self.me], own, *self.sessions[self.me + 1 :]))

    def _others(self) -> Iterator[Session]:
        return (session for place, session in enumerate(self.sessions) if place != self.me)

    def lock_table(self, mode: str) -> None:
        """Take the advisory lock, shared or exclusive, to the end of the transaction."""
        held = {other.table_lock for other in self._others()}
        if "exclusive" in held or (mode == "exclusive" and "shared" in held):
            raise Waits
        self.table_lock = mode

    def see(self, places: Sequence[int]) -> None:
        """Take the statement's snapshot of the rows that it reads; the transaction's own writes are in it."""
        own = dict(self.writes)
        self.snapshot = tuple((place, own.get(place, self.rows[place])) for place in places)

    def seen(self, place: int) -> Row:
        """Return a row as the statement's snapshot has it."""
        return dict(self.snapshot)[place]

    def wait_for(self, place: int, mode: str = UPDATE) -> Row:
        """Wait until nobody else has written the row or holds a conflicting lock on it; return it as it is now.

        With NO_LOCK, as a unique check does, only for writes.
        """
        for other in self._others():
            if any(row == place for row, _ in other.writes):
                raise Waits
            if mode and any(row == place and UPDATE in (mode, held) for row, held in other.locks):
                raise Waits
        return dict(self.writes).get(place, self.rows[place])

    def lock(self, place: int, mode: str = UPDATE) -> Row:
        """Lock a row to the end of the transaction; return it as it is now."""
        row = self.wait_for(place, mode)
        if (place, mode) not in self.locks:
            self.locks = tuple(sorted((*self.locks, (place, mode))))
        return row

    def write(self, place: int, value: Hashable) -> None:
        """Insert, update or (None) delete a row that was waited for."""
        row = dict(self.writes).get(place, self.rows[place])
        fresh = row.value is None and value is not None
        written = dict(self.writes) | {place: Row(row.inserted + fresh, value)}
        self.writes = tuple(sorted(written.items(), key=lambda item: item[0]))

    def delete_seen(self, place: int, still: Callable[[Row], bool] = lambda row: True) -> None:
        """Delete a row that the snapshot shows: wait for it, and look at it anew; a row inserted since is another one."""
        seen = self.seen(place)
        now = self.wait_for(place)
        if now.value is not None and now.inserted == seen.inserted and still(now):
            self.write(place, None)

    def commit(self) -> None:
        """Make the writes everybody's and let go of every lock."""
        rows = list(self.rows)
        for place, row in self.writes:
            rows[place] = row
        self.rows = tuple(rows)
        self._ended()

    def roll_back(self, to: int) -> None:
        """Forget the writes, let go of every lock, and go on at another place of the program."""
        self._ended()
        self.at = to

    def _ended(self) -> None:
        self.snapshot = self.writes = self.locks = ()
        self.table_lock = ""


@dataclass(frozen=True)
class Operation:
    """One step of a program; `idle` tells from snapshot and batch alone that it would do nothing, so it takes no step."""

    label: str
    run: Callable[[Turn], None]
    idle: Callable[[Turn], bool] | None = None


@dataclass(frozen=True)
class Process:
    """A session's program; it may die `lives` times between any two steps and begins again, with the batch that it had."""

    name: str
    program: tuple[Operation, ...]
    batch: tuple[Hashable, ...] = ()
    lives: int = 0


@dataclass(frozen=True)
class ServerWorld:
    """Some processes on one server, and what must hold of what they commit."""

    name: str
    processes: tuple[Process, ...]
    rows: tuple[Hashable, ...]
    judge: Callable[[Moment], str | None]
    judge_end: Callable[[Moment], str | None]

    def start(self) -> Moment:
        """Return the moment before the first step."""
        sessions = tuple(Session(lives=one.lives, batch=one.batch) for one in self.processes)
        return Moment(tuple(Row(int(value is not None), value) for value in self.rows), sessions)

    def steps(self, state: Moment) -> Iterator[tuple[str, Moment]]:
        """Yield each process's next operation where it need not wait, and each death."""
        for me, process in enumerate(self.processes):
            session = state.sessions[me]
            if session.at >= len(process.program):
                continue
            turn = Turn(state, me)
            operation = process.program[session.at]
            turn.at += 1
            try:
                operation.run(turn)
            except Waits:
                pass
            else:
                self._skip_idle(turn, process)
                yield f"{process.name} {operation.label}", turn.done()
            if session.lives:
                dying = Turn(state, me)
                dying.roll_back(0)
                dying.lives, dying.batch = session.lives - 1, process.batch
                yield f"{process.name} dies", dying.done()

    def _skip_idle(self, turn: Turn, process: Process) -> None:
        while turn.at < len(process.program):
            idle = process.program[turn.at].idle
            if idle is None or not idle(turn):
                return
            turn.at += 1

    def wrong(self, state: Moment) -> str | None:
        """Judge what is committed."""
        return self.judge(state)

    def wrong_end(self, state: Moment) -> str | None:
        """Judge the end; that nobody can go on although somebody has work left is a deadlock."""
        stuck = [one.name for one, s in zip(self.processes, state.sessions, strict=True) if s.at < len(one.program)]
        return f"{', '.join(stuck)} wait for ever" if stuck else self.judge_end(state)
