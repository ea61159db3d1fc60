"""The small PostgreSQL against a real one: random transactions of two sessions on one row, statement by statement.

Both must agree on which statement waits, on what a SELECT shows, and on the row that is there at the end. Scripts in which both
sessions wait for each other are left out: there the real server picks a victim.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import pytest

from changeover.session import Connection, connect
from tests.model.server import NO_LOCK, SHARE, UPDATE, Moment, Row, Session, Turn, Waits

STATEMENTS = {
    "read": "SELECT v FROM t WHERE k = 1",
    "insert": "INSERT INTO t VALUES (1, '{}') ON CONFLICT DO NOTHING",
    "upsert": "INSERT INTO t VALUES (1, '{}') ON CONFLICT (k) DO UPDATE SET v = excluded.v",
    "delete": "DELETE FROM t WHERE k = 1",
    "share": "SELECT FROM t WHERE k = 1 FOR SHARE",
    "update": "SELECT FROM t WHERE k = 1 FOR UPDATE",
    "COMMIT": "COMMIT",
    "ROLLBACK": "ROLLBACK",
}
SCRIPTS = 300


class Done(NamedTuple):
    """What a statement came to: whether it waited when it was sent, and what it read."""

    waited: bool
    read: str | None


Call = tuple[int, str]
"""A session's next statement."""


def scripts() -> Iterator[list[Call]]:
    """Yield interleavings of two transactions, each of up to three statements and an end, after a row that is there or not."""
    random = Random(18)
    kinds = [name for name in STATEMENTS if name.islower()]
    for _ in range(SCRIPTS):
        calls = [
            [*random.choices(kinds, k=random.randint(1, 3)), random.choice(("COMMIT", "COMMIT", "ROLLBACK"))] for _ in range(2)
        ]
        order = [0] * len(calls[0]) + [1] * len(calls[1])
        random.shuffle(order)
        yield [(session, calls[session].pop(0)) for session in order]


@dataclass
class Small:
    """The small server behind the same two calls as the real one."""

    moment: Moment
    waiting: dict[int, str] = field(default_factory=dict)
    read: dict[int, str | None] = field(default_factory=dict)
    snapshots: dict[int, tuple[tuple[int, Row], ...]] = field(default_factory=dict)

    def send(self, session: int, statement: str) -> bool:
        """Run a statement, or leave it waiting; return whether it waits."""
        turn = Turn(self.moment, session)
        turn.see((0,))
        self.snapshots[session] = turn.snapshot
        return not self._try(session, statement)

    def _try(self, session: int, statement: str) -> bool:
        turn = Turn(self.moment, session)
        turn.snapshot = self.snapshots[session]
        try:
            self.read[session] = _run(turn, session, statement)
        except Waits:
            self.waiting[session] = statement
            return False
        turn.snapshot = ()
        self.moment = turn.done()
        self.waiting.pop(session, None)
        for other, left in [*self.waiting.items()]:
            self._try(other, left)
        return True

    def end(self) -> object:
        """Return the committed row."""
        return self.moment.rows[0].value


def _run(turn: Turn, session: int, statement: str) -> str | None:
    seen = turn.seen(0)
    if statement == "read":
        return str(seen.value) if seen.value is not None else None
    if statement == "insert" and turn.wait_for(0, NO_LOCK).value is None:
        turn.write(0, f"s{session}")
    elif statement == "upsert":
        turn.wait_for(0)
        turn.write(0, f"s{session}")
    elif statement == "delete" and seen.value is not None:
        turn.delete_seen(0)
    elif statement in (SHARE, UPDATE) and seen.value is not None:
        now = turn.wait_for(0, statement)
        if now.value is not None and now.inserted == seen.inserted:
            turn.lock(0, statement)
    elif statement == "COMMIT":
        turn.commit()
    elif statement == "ROLLBACK":
        turn.roll_back(0)
    return None


@dataclass
class Real:
    """Two sessions of a real server, and a third that looks whom they wait for."""

    sessions: Sequence[Connection]
    watcher: Connection
    read: dict[int, str | None] = field(default_factory=dict)

    def send(self, session: int, statement: str) -> bool:
        """Send a statement and wait until it is done or waits; return whether it waits."""
        self.sessions[session].pgconn.send_query(STATEMENTS[statement].format(f"s{session}").encode())
        return not self.finished(session, until_it_waits=True)

    def finished(self, session: int, *, until_it_waits: bool) -> bool:
        """Return whether a session's statement has ended."""
        wire = self.sessions[session].pgconn
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            wire.consume_input()
            if not wire.is_busy():
                result = wire.get_result()
                assert result is not None
                while wire.get_result() is not None:
                    pass
                assert not result.error_message, result.error_message
                value = result.get_value(0, 0) if result.ntuples and result.nfields else None
                self.read[session] = None if value is None else value.decode()
                return True
            blocked = self.watcher.execute("SELECT cardinality(pg_blocking_pids(%s)) > 0", [wire.backend_pid]).fetchone()
            if until_it_waits and blocked == (True,):
                return False
        raise AssertionError("a statement neither ended nor waited")

    def end(self) -> object:
        """Return the committed row."""
        row = self.watcher.execute("SELECT v FROM t").fetchone()
        return row[0] if row else None


def play(server: Small | Real, script: Sequence[Call]) -> tuple[list[Done], object] | None:
    """Play a script; a session that waits sends nothing until it is let go. None where both wait."""
    done: list[Done] = []
    left = list(script)
    waiting: set[int] = set()
    while left:
        if len(waiting) == 2:
            return None
        call = next(call for call in left if call[0] not in waiting)
        left.remove(call)
        session, statement = call
        waits = server.send(session, statement)
        done.append(Done(waits, None if waits else server.read[session]))
        if waits:
            waiting.add(session)
        elif statement.isupper() and waiting:
            (other,) = waiting
            if isinstance(server, Real):
                server.finished(other, until_it_waits=False)
            waiting.clear()
    return done, server.end()


@pytest.fixture
def real(old_dsn: str) -> Iterator[Real]:
    with connect(old_dsn, "watcher") as watcher, connect(old_dsn, "s0") as first, connect(old_dsn, "s1") as second:
        watcher.execute("CREATE TABLE t (k integer PRIMARY KEY, v text)")
        yield Real((first, second), watcher)


def test_the_small_server_does_what_postgresql_does(real: Real) -> None:
    waited = 0
    for number, script in enumerate(scripts()):
        before = "before" if number % 2 else None
        expected = play(Small(Moment((Row(number % 2, before),), (Session(), Session()))), script)
        if expected is None:
            continue
        real.watcher.execute("DELETE FROM t")
        if before:
            real.watcher.execute("INSERT INTO t VALUES (1, 'before')")
        for session in real.sessions:
            session.execute("BEGIN")
        assert play(real, script) == expected, (before, script)
        waited += any(one.waited for one in expected[0])
    assert waited > SCRIPTS / 5, "few statements waited"
