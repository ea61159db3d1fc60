"""A state machine over the real parts: random writes, chunks, batches, repetitions and crashes; both stores must end equal.

The source, both targets, the slot and Spark are real. What Hypothesis chooses is a schedule: which writes are made, how far capture
and replay come, which chunks are loaded when, and where a step dies. A failing schedule shrinks to the fewest steps that fail, and
is printed as the calls that make it. `pytest tests/scenarios/test_machine.py --hypothesis-profile=long` runs a hundred.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from pyspark.sql import DataFrame

from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.load.copier import LedgerMark
from changeover.stores.base.interface import Store, TargetTable
from changeover.stores.delta.store import DeltaStore
from changeover.stores.postgres.store import PostgresStore
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration, rows

TARGETS = (STORE, LAKE)
KINDS = {STORE: PostgresStore, LAKE: DeltaStore}
KEYS = range(1, 9)
APART = (1001, 1002)
"""Rows that no write chooses: they are there until a TRUNCATE, and after it nowhere."""
TABLE = '[[table]]\nsource = "public.{0}"\ntarget = "{0}_new"\nkey = ["a", "b"]\n[table.columns]\na = "id"\nb = "\'k\' || id % 2"\n'
NUMBERS = itertools.count(1)

Read = Callable[[Sequence[int]], DataFrame]


class Crash(Exception):
    """A step dies here."""


def statements(table: str, live: list[int], kind: str, one: int, other: int, value: int) -> list[str]:
    """Return a write that meets what is there: `one` and `other` choose among live rows, free keys, or all keys (for a put).

    A large value is stored out of line, and not sent when unchanged.
    """
    if not live:
        kind = "put"
    key, free = KEYS[one % len(KEYS)], [key for key in KEYS if key not in live] or [KEYS[-1] + value]
    row, second, unused = (live[one % len(live)], live[other % len(live)], free[other % len(free)]) if live else (key, key, key)
    move = f"UPDATE {table} SET id = {unused} WHERE id = {row}"
    insert = f"INSERT INTO {table} VALUES ({{}}, 'n{value}', repeat('{value}', 5000))"
    return {
        "move": [move],
        "touch": [f"UPDATE {table} SET note = 'n{value}' WHERE id = {row}"],
        "put": [f"{insert.format(key)} ON CONFLICT (id) DO UPDATE SET note = excluded.note, large = excluded.large"],
        "follow": [move, insert.format(row)],
        "delete": [f"DELETE FROM {table} WHERE id = {row}"],
        "swap": [f"UPDATE {table} SET id = -id WHERE id IN ({row}, {second})"]
        + [f"UPDATE {table} SET id = {new} WHERE id = -{old}" for old, new in {row: second, second: row}.items()],
        "rollback": ["SAVEPOINT s", f"DELETE FROM {table}", f"TRUNCATE {table}", "ROLLBACK TO s"],
        "truncate": [f"TRUNCATE {table}", insert.format(unused)],
    }[kind]


KINDS_OF_WRITE = [
    "move", "touch", "put", "follow", "delete", "swap", "touch", "move", "put", "follow", "touch", "delete", "swap", "move", "put",
    "touch", "rollback", "follow", "move", "truncate",
]  # fmt: skip
"""By weight, the simplest first. A TRUNCATE is rare, since it wipes what came before."""

PLACES = st.integers(0, len(KEYS) - 1)
WRITES = st.lists(st.tuples(st.sampled_from(KINDS_OF_WRITE), PLACES, PLACES), min_size=3, max_size=8)
"""Each step begins with some, and each of them changes a row: a schedule without a write proves nothing."""


class Machine(RuleBasedStateMachine):
    """One migration of one small table into both kinds of target."""

    make: MakeMigration

    def __init__(self) -> None:
        super().__init__()
        self.values = itertools.count(1)
        self.table = f"machine{next(NUMBERS)}"

    @initialize(seed=st.sets(st.sampled_from(KEYS), min_size=3, max_size=6))
    def prepare(self, seed: set[int]) -> None:
        """Make the source and prepare."""
        create = f"CREATE TABLE {self.table} (id integer PRIMARY KEY, note text, large text)"
        self.made: Migration = type(self).make(TABLE.format(self.table), create)
        self.made.old.execute(f"ALTER TABLE {self.table} ALTER large SET STORAGE EXTERNAL".encode())
        for key in (*sorted(seed), *APART):
            self.made.old.execute(f"INSERT INTO {self.table} VALUES ({key}, 'seed', repeat('s', 5000))".encode())
        self.made.prepare()

    def write(self, writes: list[tuple[str, int, int]], whole: bool) -> None:
        """The application writes, in one transaction or in several."""
        with self.made.old.transaction() if whole else nothing():
            for kind, one, other in writes:
                with self.made.old.transaction():
                    for statement in statements(self.table, self.live(), kind, one, other, next(self.values)):
                        self.made.old.execute(statement.encode())

    def live(self) -> list[int]:
        """Return the keys that are there for a write to choose from."""
        found = self.made.old.execute(f"SELECT id FROM {self.table} WHERE id < {APART[0]} ORDER BY id".encode()).fetchall()
        return [row[0] for row in found]

    @rule(writes=WRITES, whole=st.booleans(), into=st.sampled_from(TARGETS), dies=st.booleans())
    def follow(self, writes: list[tuple[str, int, int]], whole: bool, into: str, dies: bool) -> None:
        """What is written is spooled and offered to a target; that may die after the commit, before the position is recorded."""
        self.write(writes, whole)
        self.made.capture()
        with dying(Ledger, "advance") if dies else nothing():
            self.made.replay(into)

    @rule(writes=WRITES, whole=st.booleans(), into=st.sampled_from(TARGETS), chunks=st.integers(1, 3), marked=st.booleans())
    def load(self, writes: list[tuple[str, int, int]], whole: bool, into: str, chunks: int, marked: bool) -> None:
        """A backfill loads some chunks and dies, the last one recorded or not; what is written is spooled, not offered."""
        self.write(writes, whole)
        self.made.capture()  # before a table that was truncated is closed, the spool has to tell of it
        with some_chunks(KINDS[into], chunks, marked):
            self.made.backfill(into)

    @rule(writes=WRITES, into=st.sampled_from(TARGETS))
    def repeat(self, writes: list[tuple[str, int, int]], into: str) -> None:
        """A target's position is lost, so that everything is offered to it again."""
        self.write(writes, whole=False)
        self.made.new.execute(
            "UPDATE changeover.load SET applied = l0 FROM changeover.stream AS s"
            " WHERE (s.migration, s.store) = (load.migration, load.store) AND load.migration = %s AND target = %s",
            [self.made.spec.name, into],
        )

    def teardown(self) -> None:
        """Whatever happened: once everything ran to its end, both stores hold what the source holds."""
        if not hasattr(self, "made"):
            return
        self.made.capture()
        self.made.backfill()
        self.made.replay()
        wanted = self.made.old.execute(f"SELECT id, 'k' || id % 2, note, large FROM {self.table}".encode()).fetchall()
        found = self.made.new.execute(f"SELECT a, b, note, large FROM {self.table}_new".encode()).fetchall()
        lake = [
            tuple(row.values())
            for row in self.made.lake(f"{self.table}_new").select("a", "b", "note", "large").toArrow().to_pylist()
        ]
        short = [[(*row[:-1], row[-1] and row[-1][:3]) for row in one] for one in (found, lake, wanted)]
        self.made.abort()
        assert rows(short[0]) == rows(short[2])
        assert rows(short[1]) == rows(short[2])


@contextmanager
def nothing() -> Iterator[None]:
    """Let a step live."""
    yield


@contextmanager
def dying(kind: type[Any], method: str) -> Iterator[None]:
    """Let a step die where it would call a method."""

    def die(*arguments: object, **named: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch, suppress(Crash):
        patch.setattr(kind, method, die)
        yield


@contextmanager
def some_chunks(kind: type[Any], most: int, marked: bool) -> Iterator[None]:
    """Let a backfill die after some chunks; unless `marked` the last one was overtaken, and is not recorded."""
    load = kind.load

    def some(store: Store, table: TargetTable, chunks: Sequence[int], read: Read, mark: LedgerMark) -> None:
        for number, chunk in enumerate(chunks[:most], 1):
            overtaken = number == min(most, len(chunks)) and not marked
            load(store, table, [chunk], read, replace(mark, token=mark.token - 1) if overtaken else mark)
        raise Crash

    with pytest.MonkeyPatch.context() as patch, suppress(Crash):
        patch.setattr(kind, "load", some)
        yield


def test_any_schedule_ends_equal(make_migration: MakeMigration) -> None:
    Machine.make = staticmethod(make_migration)
    long = settings.default is settings.get_profile("long")
    run_state_machine_as_test(
        Machine,
        settings=settings(
            # the short form is the same each time, the long one never is
            max_examples=settings.get_profile("long").max_examples if long else 5, stateful_step_count=8, deadline=None,
            derandomize=not long, database=None, print_blob=True, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
