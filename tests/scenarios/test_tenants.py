"""Tenants that move one by one under live writers: each row is written where its own tenant's authority is, and nothing is lost.

The application here writes by plain SQL and has no mirror, so whatever arrives elsewhere was brought by one of the two streams. It
knows what it has written, and the stores are held against that.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ldclient.migrations.types import Origin, Stage
from psycopg import sql

from changeover import failpoints
from changeover.errors import Refused
from changeover.flags import flagfile
from changeover.flags.fence.fence import fence, settle
from changeover.jobs.ledger.epochs import NEW, shares
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.spool.table import spool_of
from changeover.session import connect
from changeover.stores.postgres.gate import FENCED, ours
from tests.support.fix_accounts import following
from tests.support.fix_flags import wait_until
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration, lake_rows
from tests.support.fix_migration import rows as comparable

FOLLOWS = """
CREATE TABLE friends (from_user bigint, to_user bigint, note text, weight numeric(12,2) NOT NULL DEFAULT 0,
    PRIMARY KEY (from_user, to_user))
"""
FLAG = "friends-store"
SPEC = f"""
[[table]]
source = "public.friends"
target = "links"
key = ["member", "to_user"]
[table.columns]
member = "from_user"
[flag]
key = "{FLAG}"
target = "store"
context = "from_user"
"""
TENANTS = range(1, 7)
PATIENT = 120.0
"""Seconds that a fence may take here: the pause itself is measured elsewhere."""

Row = tuple[int, int, str | None, str]


def loaded(make_migration: MakeMigration, *targets: str) -> Migration:
    made = make_migration(SPEC, FOLLOWS, targets=targets)
    made.old.execute("INSERT INTO friends SELECT u, t, 'n' || t, u FROM generate_series(1, 6) u, generate_series(1, 30) t")
    made.prepare()
    made.backfill()
    flagfile.write_stage(made.spec.work / "flags.json", FLAG, Stage.SHADOW)
    return made


@pytest.fixture
def friends(make_migration: MakeMigration) -> Migration:
    return loaded(make_migration, STORE, LAKE)


@pytest.fixture
def friends_without_lake(make_migration: MakeMigration) -> Migration:
    """Make the same without a lake, whose batches every fence waits for."""
    return loaded(make_migration, STORE)


class Writer(threading.Thread):
    """Writes rows of all tenants, each where it was last let in, and remembers what was committed."""

    def __init__(self, migration: Migration, number: int) -> None:
        super().__init__(name=f"writer {number}")
        flag = migration.spec.flag
        assert flag is not None
        self.dsns = {"old": migration.spec.source.dsn.resolve(), "new": migration.spec.targets[flag.target].dsn_value}
        self.random = random.Random(number)
        self.channels = range(100 * number, 100 * number + 40)
        self.places = dict.fromkeys(TENANTS, "old")
        self.rows: dict[tuple[int, int], Row] = {}
        self.done = threading.Event()
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            with connect(self.dsns["old"], "writer") as old, connect(self.dsns["new"], "writer") as new:
                stores = {"old": (old, "friends", "from_user"), "new": (new, "links", "member")}
                while not self.done.wait(0.008):
                    self._write(stores)
        except BaseException as error:
            self.failed = error

    def _write(self, stores: dict[str, Any]) -> None:
        whose, channel = self.random.choice(TENANTS), self.random.choice(self.channels)
        gone = self.random.random() < 0.3
        row: Row = (
            whose,
            channel,
            self.random.choice([None, "", f"é{self.random.random()}"]),
            f"{self.random.randrange(10**6)}.25",
        )
        while not self.done.is_set():
            connection, table, column = stores[self.places[whose]]
            try:
                connection.execute("SELECT set_config('changeover.tenant', %s, false)", [str(whose)])
                if gone:
                    connection.execute(f"DELETE FROM {table} WHERE {column} = %s AND to_user = %s", [whose, channel])
                else:
                    connection.execute(
                        f"INSERT INTO {table} ({column}, to_user, note, weight) VALUES (%s, %s, %s, %s)"
                        f" ON CONFLICT ({column}, to_user) DO UPDATE SET note = excluded.note, weight = excluded.weight", row,
                    )  # fmt: skip
            except psycopg.Error as error:
                if error.sqlstate != FENCED:
                    raise
                self.places[whose] = "new" if self.places[whose] == "old" else "old"
                time.sleep(0.005)
                continue
            self.rows.pop((whose, channel), None)
            if not gone:
                self.rows[whose, channel] = row
            return


@contextmanager
def writing(migration: Migration, before: Sequence[Writer] = ()) -> Iterator[list[Writer]]:
    """Write until the block ends, on what others have left; a writer's failure is the test's."""
    writers = [Writer(migration, one) for one in (1, 2)]
    for writer, earlier in zip(writers, before, strict=False):
        writer.rows, writer.places = dict(earlier.rows), dict(earlier.places)
    for writer in writers:
        writer.start()
    try:
        yield writers
    finally:
        for writer in writers:
            writer.done.set()
            writer.join()
    assert [writer.failed for writer in writers if writer.failed] == []


def settled(migration: Migration, seconds: float = 600.0) -> None:
    """Wait until everything that either store has committed, as far as it has authority, was offered to all the others."""
    places = []
    for connection in (migration.old, migration.new):
        row = connection.execute("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint").fetchone()
        assert row is not None
        places.append(int(row[0]))
        emit_marker(connection, "settled")
    with Ledger.open(migration.spec, "test") as ledger:
        holding = {held.store for held in shares(ledger.authorities())}
        deadline = time.monotonic() + seconds
        while late := [
            one
            for store, loads, place in (("old", ledger.loads(), places[0]), ("new", ledger.loads(NEW), places[1]))
            for one in loads
            if store in holding and one.applied < place
        ]:
            assert time.monotonic() < deadline, late
            time.sleep(0.05)


def everywhere(migration: Migration) -> dict[str, list[str]]:
    """Return what each store holds of the writers' rows and the others; the lake, where there is one."""
    old = migration.old.execute("SELECT from_user, to_user, note, weight FROM friends").fetchall()
    new = migration.new.execute("SELECT member, to_user, note, weight FROM links").fetchall()
    held = {"old": comparable(old), "new": comparable(new)}
    if LAKE in migration.spec.targets:
        held["lake"] = lake_rows(migration.lake("links").select("member", "to_user", "note", "weight"))
    return held


def written(writers: Collection[Writer]) -> set[tuple[int, int, str | None, str]]:
    return {row for writer in writers for row in writer.rows.values()}


def of_writers(migration: Migration) -> set[tuple[Any, ...]]:
    found = migration.old.execute("SELECT from_user, to_user, note, weight::text FROM friends WHERE to_user >= 100").fetchall()
    return set(found)


def authorities(migration: Migration) -> list[tuple[int, str, frozenset[str] | None]]:
    with Ledger.open(migration.spec, "test") as ledger:
        return [(one.epoch, one.store, one.tenants) for one in ledger.authorities()]


def test_tenants_move_there_and_back_under_live_writers(friends: Migration) -> None:
    with following(friends):
        with writing(friends) as writers:
            time.sleep(0.5)
            first = fence(friends.spec, Origin.NEW, tenants=["1", "2"], max_pause=PATIENT)
            time.sleep(0.5)
            fence(friends.spec, Origin.NEW, tenants=["3", "1"], max_pause=PATIENT)
            time.sleep(0.5)
            back = fence(friends.spec, Origin.OLD, tenants=["1"], max_pause=PATIENT)
            time.sleep(0.5)
            assert fence(friends.spec, Origin.NEW, tenants=["2"]).epoch == 2, "there already: nothing moves"
            wait_until(lambda: all(w.places == {**dict.fromkeys(TENANTS, "old"), 2: "new", 3: "new"} for w in writers), PATIENT)
        assert (first.epoch, back.epoch, back.lacking) == (1, 3, None)
        settled(friends)
        held = everywhere(friends)
        assert held["old"] == held["new"] == held["lake"]
        assert of_writers(friends) == written(writers)
        for statement, connection in (("TRUNCATE friends", friends.old), ("TRUNCATE links", friends.new)):
            with pytest.raises(psycopg.Error) as caught:
                connection.execute(statement)
            assert caught.value.sqlstate == FENCED

        with writing(friends, writers) as writers:
            time.sleep(0.3)
            fence(friends.spec, Origin.NEW, max_pause=PATIENT)
            wait_until(lambda: all(set(writer.places.values()) == {"new"} for writer in writers), PATIENT)
        settled(friends)
        held = everywhere(friends)
        assert held["old"] == held["new"] == held["lake"]
        assert of_writers(friends) == written(writers)

        with writing(friends, writers) as writers:
            time.sleep(0.3)
            fence(friends.spec, Origin.OLD, max_pause=PATIENT)
            wait_until(lambda: all(set(writer.places.values()) == {"old"} for writer in writers), PATIENT)
        settled(friends)
        held = everywhere(friends)
        assert held["old"] == held["new"] == held["lake"]
        assert of_writers(friends) == written(writers)
    assert authorities(friends) == [
        (1, "new", frozenset({"1", "2"})), (2, "new", frozenset({"1", "3"})), (3, "old", frozenset({"1"})), (4, "new", None),
        (5, "old", None),
    ]  # fmt: skip


KILLED = """
import sys
from ldclient.migrations.types import Origin
from changeover.flags.fence.fence import fence
from changeover.flags.fence.fence import settle
from changeover.spec import load
fence(load(sys.argv[1]), Origin(sys.argv[2]), tenants=["1", "2"], max_pause=60)
"""


def killed_at(migration: Migration, to: Origin, point: str, file: Path) -> None:
    """Begin a fence of two tenants in a process of its own, and kill -9 it at a point."""
    environment = {**os.environ, failpoints.VARIABLE: f"{point}:{file}"}
    child = subprocess.Popen([sys.executable, "-c", KILLED, migration.spec.path, to.value], env=environment)
    deadline = time.monotonic() + PATIENT
    while not file.exists():
        assert child.poll() is None, "the fence has ended"
        assert time.monotonic() < deadline, f"{point} was never reached"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()


def takes(migration: Migration, whose: int) -> list[str]:
    """Return the stores that take a write to a tenant's rows."""
    found = []
    for store, connection, table, column in (
        ("old", migration.old, "friends", "from_user"),
        ("new", migration.new, "links", "member"),
    ):
        try:
            with connection.transaction(force_rollback=True):
                connection.execute(f"INSERT INTO {table} ({column}, to_user) VALUES (%s, 99)".encode(), [whose])
        except psycopg.Error as error:
            if error.sqlstate != FENCED:
                raise
        else:
            found.append(store)
    return found


def test_a_fence_of_tenants_that_is_killed_between_two_moves_is_settled(friends_without_lake: Migration, tmp_path: Path) -> None:
    friends, at = friends_without_lake, "old"
    with following(friends):
        with writing(friends) as writers:
            for number, (to, point, after) in enumerate((
                (Origin.NEW, "fence-freeze", "old"), (Origin.NEW, "fence-final", "old"), (Origin.NEW, "fence-record", "new"),
                (Origin.OLD, "fence-await", "new"), (Origin.OLD, "fence-final", "new"), (Origin.OLD, "fence-record", "old"),
            )):  # fmt: skip
                assert not number or takes(friends, 1) == [at]
                killed_at(friends, to, point, tmp_path / f"{number}")
                settle(friends.spec)
                at = after
                assert (takes(friends, 1), takes(friends, 2), takes(friends, 3)) == ([at], [at], ["old"]), point
        settled(friends)
        held = everywhere(friends)
        assert held["old"] == held["new"]
        assert of_writers(friends) == written(writers)


def test_a_lake_learns_of_a_tenant_that_came_back_by_the_mirror_alone(friends: Migration) -> None:
    with following(friends):
        epoch = fence(friends.spec, Origin.NEW, tenants=["1"], max_pause=PATIENT).epoch
        with Ledger.open(friends.spec, "test") as ledger:
            reverse.break_off(ledger, "its slot is gone")
        friends.new.execute("UPDATE links SET note = 'by the mirror' WHERE member = 1 AND to_user = 5")
        mirrored = sql.SQL("SELECT {}(%s, pg_current_wal_insert_lsn(), -1, false, ROW(1, 5, 'by the mirror', 1)::friends)")
        friends.old.execute(mirrored.format(ours("gate", "public", "friends")), [epoch])
        friends.old.execute("UPDATE friends SET note = 'of another' WHERE from_user = 2")  # with which the lake goes on
        emit_marker(friends.old, "on")
        with Ledger.open(friends.spec, "test") as ledger:
            wanted = spool_of(friends.spec, 0).end()
            deadline = time.monotonic() + PATIENT
            while min(load.applied for load in ledger.loads()) <= wanted:
                assert time.monotonic() < deadline
                emit_marker(friends.old, "on")
                time.sleep(0.2)
        back = fence(friends.spec, Origin.OLD, tenants=["1"], max_pause=PATIENT)
        assert back.lacking is not None
        friends.old.execute("UPDATE friends SET note = 'at home' WHERE from_user = 1 AND to_user = 6")
        settled(friends)
        held = everywhere(friends)
        assert held["old"] == held["new"] == held["lake"]
        assert any("by the mirror" in row for row in held["lake"])


def test_what_can_not_move_alone_is_said(make_migration: MakeMigration) -> None:
    friends = make_migration(SPEC, FOLLOWS, targets=(STORE,))
    friends.prepare()
    for names, told in (([], "empty"), ([""], "empty"), ([str(n) for n in range(10_001)], "10,001 tenants are more than 10,000")):
        with pytest.raises(Refused, match=told):
            fence(friends.spec, Origin.NEW, tenants=names)
    assert authorities(friends) == []
