"""The writer benchmark's application: a process of its own that writes to both stores at a fixed rate, and times what is asked.

A process of its own keeps what else the benchmark does (waiting, sampling memory) out of its times. It is told when to begin and
when to end, and answers with the seconds of each statement that it timed.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from types import TracebackType
from typing import Self

from psycopg import sql

from changeover.flags.mirror.change import Change, returned
from changeover.flags.mirror.gatecall import GateCall
from changeover.flags.mirror.written import POSITION
from changeover.flags.router.endpoint import PgEndpoint, transaction
from changeover.position import DUAL_WRITE_ORDINAL, Version, parse_lsn
from changeover.session import Connection, one_row

APPLICATION = "changeover:benchmark:writer"
RATE = 250
"""Transactions of the application in a second; every other one is mirrored through the gate."""

NEW_ROWS = 1_000_000
"""The first channel of the application's own rows; they lie among the snapshot's in the key's order, user by user."""

USERS = 5_000
AGAIN = 0.5
"""How many writes are updates of a row that the application has written."""

PUT = """
INSERT INTO follows (from_user, to_channel, notify, note, created_at) VALUES (%s, %s, true, %s, now())
ON CONFLICT (from_user, to_channel) DO UPDATE SET note = excluded.note RETURNING *
"""


@dataclass(frozen=True)
class Timed:
    """Seconds of each statement: through the gate, and plain."""

    gated: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.gated)} gated and {len(self.plain)} plain writes"


class Writing:
    """The application in a process of its own, for as long as the context is open."""

    def __init__(self, old: str, new: str, table: str) -> None:
        self._pipe, self._far = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=serve, args=(old, new, table, self._far), name="benchmark-writer", daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        self._far.close()  # the process alone holds its end, so its death is seen
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()

    def until(self, over: Callable[[], bool]) -> Timed:
        """Let it write until something is over; raises EOFError where it died."""
        self._pipe.send(True)
        while not over() and self._process.is_alive():
            time.sleep(0.02)
        self._pipe.send(False)
        timed: Timed = self._pipe.recv()
        return timed


def serve(old: str, new: str, table: str, pipe: Pipe) -> None:
    """Write whenever told to, until told to end; the other end gone ends it all (the writer's process)."""
    here, there = PgEndpoint(old), PgEndpoint(new)
    with here.open(APPLICATION) as source, there.open(APPLICATION) as target:
        application = Application(source, target, GateCall.of(target, f"public.{table}"))
        try:
            while pipe.recv():
                pipe.send(application.write(pipe))
        except EOFError:
            return


@dataclass
class Application:
    """Its two sessions, the gate's call, and the rows that it has written, each always the same way."""

    source: Connection
    target: Connection
    call: GateCall
    written: tuple[list[tuple[int, int]], list[tuple[int, int]]] = field(default_factory=lambda: ([], []))
    count: int = 0

    def write(self, pipe: Pipe) -> Timed:
        """Write at the rate until something comes through the pipe, and take that."""
        timed = Timed()
        upsert = self._upsert()
        begun = time.monotonic()
        first = self.count
        while not pipe.poll():
            self.count += 1
            time.sleep(max(0.0, begun + (self.count - first) / RATE - time.monotonic()))
            gated = self.count % 2 == 0
            version, change = self._own_write(gated)
            if gated:
                parameters = self.call.parameters(version, change)
                started = time.perf_counter()
                row = self.target.execute(self.call.statement, parameters).fetchone()
                timed.gated.append(time.perf_counter() - started)
                assert row == (True,), "the gate refused a row that nobody else writes"
            else:
                values = self.call.parameters(version, change)[4:]
                started = time.perf_counter()
                self.target.execute(upsert, values)
                timed.plain.append(time.perf_counter() - started)
        pipe.recv()
        return timed

    def _own_write(self, gated: bool) -> tuple[Version, Change]:
        """Write in the old store, in a transaction of its own; return the row and its version."""
        before = self.written[gated]
        key = random.choice(before) if before and random.random() < AGAIN else (random.randint(1, USERS), NEW_ROWS + self.count)
        if key[1] == NEW_ROWS + self.count:
            before.append(key)
        with transaction(self.source) as cursor:
            cursor.execute(PUT, [*key, f"write {self.count}"])
            [change] = returned(cursor)
            at = parse_lsn(one_row(cursor.execute(f"SELECT {POSITION}".encode()))[0])
        return Version(0, at, DUAL_WRITE_ORDINAL), change

    def _upsert(self) -> sql.Composed:
        """Return the plain statement for a whole row."""
        rest = [name for name in self.call.columns if name not in self.call.key]
        return sql.SQL("INSERT INTO {} ({}) VALUES ({}) ON CONFLICT ({}) DO UPDATE SET {}").format(
            sql.Identifier(*self.call.table.split(".")),
            sql.SQL(", ").join(map(sql.Identifier, self.call.columns)),
            sql.SQL(", ").join(sql.Placeholder() for _ in self.call.columns),
            sql.SQL(", ").join(map(sql.Identifier, self.call.key)),
            sql.SQL(", ").join(sql.SQL("{0} = excluded.{0}").format(sql.Identifier(name)) for name in rest),
        )
