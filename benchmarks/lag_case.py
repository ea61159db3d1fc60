"""The lag benchmark: how long a change takes to be seen in the new store, while an application writes at a steady rate.

The same table as in `catchup`, followed by capture and replay as two services, and by PostgreSQL's own logical replication. Some of
each writer's updates bear a number; a reader looks for the numbers in the target all the time, and a number that a later one has
overtaken counts as seen with it. At the end both stores must hold the same rows, or there is no result.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from threading import Event, Thread

from benchmarks import backlog
from benchmarks.catchup_case import PARTIES, accounts
from benchmarks.followers import Backlog
from benchmarks.parties import APPLICATION
from benchmarks.result import CaseResult, Result
from benchmarks.worker import PartyFailed, Worker
from changeover.position import parse_lsn
from changeover.session import Connection, connect

WRITERS = 4
NUMBERED = 0.05
"""Seconds between two numbered updates of a writer."""

LOOK = 0.002
SETTLE = 3.0
"""Seconds after the first number was seen that do not count."""

FIRST = 60.0
"""How long the first number may take: a service starts."""

PERCENTILES = {"p50": 0.5, "p99": 0.99}
CHANGE = "UPDATE accounts SET note = %s, updated_at = clock_timestamp() WHERE id = ANY (%s)"
NUMBER = "UPDATE accounts SET amount = %s WHERE id = %s"


class Writing:
    """Writers at a rate together, each with a row of its own for its numbers; `written` has when each number was committed."""

    def __init__(self, dsn: str, rate: int, rows: int) -> None:
        self.dsn, self.rate, self.rows = dsn, rate, rows
        self.written: dict[tuple[int, int], float] = {}
        self.changes = 0
        self._end = Event()
        self._threads = [Thread(target=self._write, args=(one,), name=f"writer-{one}") for one in range(1, WRITERS + 1)]

    def __enter__(self) -> Writing:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _write(self, one: int) -> None:
        """Write transactions of so many rows at this writer's share of the rate, and its numbers beside them."""
        number, done, started = 0, 0, time.monotonic()
        numbered = started
        with connect(self.dsn, APPLICATION) as session:
            session.execute("SET synchronous_commit = off")
            while not self._end.is_set():
                now = time.monotonic()
                if now >= numbered:
                    number, numbered = number + 1, now + NUMBERED
                    session.execute(NUMBER, [number, one])
                    self.written[one, number] = time.monotonic()
                if (ahead := done * WRITERS / self.rate - (now - started)) > 0:
                    time.sleep(min(ahead, NUMBERED))
                    continue
                # each writer has rows of its own, so that none waits for another
                first = WRITERS + 1 + (one - 1) * backlog.ROWS // (2 * WRITERS)
                keys = [first + (done + k) * 7919 % (backlog.ROWS // (2 * WRITERS)) for k in range(self.rows)]
                session.execute(CHANGE, [f"{one}.{done}", keys])
                done += self.rows
                self.changes += self.rows


def measure(rate: int, seconds: float, rows: int) -> Result:
    """Let each party follow for so many seconds; raises PartyFailed."""
    with ExitStack() as stack:
        job, old = stack.enter_context(accounts())
        workers = {name: stack.enter_context(Worker(PARTIES[name])) for name in PARTIES}
        found: dict[str, list[float]] = {}
        changes = 0
        for name, worker in workers.items():
            worker.call("set_up", job)
            worker.call("start", job)
            with worker.watched():
                found[name], changes = _follow(job, old, name, rate, seconds, rows)
                worker.call("stop", job._replace(end=_end(old)))
            _require_equal(job, old, name)
            worker.call("tear_down", job)
            old.execute("UPDATE accounts SET amount = 0 WHERE id <= %s", [WRITERS])
        cases = [
            CaseResult(
                f"{rate}/s {name}", _at(found["ours"], place), {p: _at(lags, place) for p, lags in found.items() if p != "ours"}
            )
            for name, place in PERCENTILES.items()
        ]
        return Result("lag", changes, cases, {name: round(worker.peak / 2**20) for name, worker in workers.items()})


def _follow(job: Backlog, old: Connection, name: str, rate: int, seconds: float, rows: int) -> tuple[list[float], int]:
    """Write, look, and return the lags, and the changes written."""
    dsn, table = (job.new, "accounts_new") if name == "ours" else (job.native, "accounts")
    old.execute("UPDATE accounts SET amount = 0 WHERE id <= %s", [WRITERS])
    seen: dict[int, int] = dict.fromkeys(range(1, WRITERS + 1), 0)
    lags = []
    with connect(dsn, APPLICATION) as target, Writing(job.old, rate, rows) as writing:
        began = started = time.monotonic()
        while (now := time.monotonic()) - started < seconds + SETTLE:
            if not any(seen.values()) and now - began < FIRST:
                started = now  # it has not begun to follow
            for one, amount in target.execute(LOOK_FOR[table], [WRITERS]).fetchall():
                for number in range(seen[one] + 1, int(amount) + 1):
                    at = writing.written.get((one, number))
                    if at is not None and at - started > SETTLE:
                        lags.append(now - at)
                seen[one] = max(seen[one], int(amount))
            time.sleep(LOOK)
    told = f"{name}: {writing.changes / (now - began):,.0f} changes a second written"
    print(f"{told}, {len(lags)} lags seen", file=sys.stderr, flush=True)
    if not lags:
        raise PartyFailed(f"{name}: nothing was seen in {seconds:g} s")
    return lags, writing.changes


LOOK_FOR = {name: f"SELECT id, amount FROM {name} WHERE id <= %s" for name in ("accounts", "accounts_new")}


def _at(lags: Sequence[float], place: float) -> float:
    return sorted(lags)[min(len(lags) - 1, int(len(lags) * place))]


def _end(old: Connection) -> int:
    row = old.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    old.execute("SELECT pg_logical_emit_message(true, 'benchmark', 'end')")
    return parse_lsn(row[0])


def _require_equal(job: Backlog, old: Connection, name: str) -> None:
    dsn, table = (job.new, "accounts_new") if name == "ours" else (job.native, "accounts")
    with connect(dsn, APPLICATION) as target:
        if (there := backlog.fingerprint(target, table)) != (here := backlog.fingerprint(old, "accounts")):
            raise PartyFailed(f"{name}: the stores hold different rows: {here} and {there}")
