"""Reverse replication: what is written to the new store after the hand-over comes to the old one and to the lake, without an echo.

The application here writes by plain SQL to the store that has authority: it has no mirror at all, so whatever arrives elsewhere
was brought by the stream.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover import failpoints
from changeover.errors import CouldNotCheck, NotReady
from changeover.flags import flagfile
from changeover.flags.cutover import commands as cutover
from changeover.flags.fence.fence import fence
from changeover.jobs.install.leftovers import leftovers
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import NEW, OLD, OLD_STORE, Load
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.spool.table import spool_of
from changeover.jobs.status import status
from changeover.position import parse_lsn
from changeover.session import connect
from changeover.verifiers.explain import explain
from changeover.verifiers.verification import verify
from tests.support import fix_accounts as accounts
from tests.support.fix_accounts import following
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration, lake_rows, unrefused
from tests.support.fix_migration import rows as comparable

MEMBERS = """
CREATE TABLE members (id bigint PRIMARY KEY, name text, kind text NOT NULL DEFAULT 'person', joined text, paid numeric(12,2),
    tags text[], note text, active boolean NOT NULL DEFAULT true)
"""
FLAG = "people-store"
SPEC = f"""
[[table]]
source = "public.members"
target = "people"
key = ["person"]
where = "kind = 'person'"
drop = ["kind"]
[table.columns]
person = "id"
joined = "to_timestamp(joined)"
[table.reverse]
kind = "'person'"
joined = "date_format(joined, 'yyyy-MM-dd HH:mm:ss')"
[flag]
key = "{FLAG}"
target = "store"
"""
SEEN = "id, name, to_timestamp(joined, 'YYYY-MM-DD HH24:MI:SS'), paid, tags, note, active"
COLUMNS = ("person", "name", "joined", "paid", "tags", "note", "active")
LARGE = "SELECT string_agg(md5(i::text || %s), '') FROM generate_series(1, 400) i"
"""A text that is kept out of line, so that an UPDATE of another column does not send it."""


@pytest.fixture
def people(make_migration: MakeMigration) -> Migration:
    made = make_migration(SPEC, MEMBERS, targets=(STORE, LAKE))
    made.old.execute(
        "INSERT INTO members (id, name, joined, paid, tags) SELECT i, 'n' || i, '2020-01-01 00:00:00', i * 1.5, ARRAY['a', NULL]"
        " FROM generate_series(1, 200) i"
    )
    made.old.execute("INSERT INTO members (id, name, kind) VALUES (9001, 'r2', 'robot'), (9002, 'c3', 'robot')")
    made.old.execute("ALTER TABLE members ALTER note SET STORAGE EXTERNAL")
    made.prepare()
    made.new.execute("ALTER TABLE people ALTER note SET STORAGE EXTERNAL")
    made.backfill()
    switch(made, Stage.SHADOW)
    return made


def switch(migration: Migration, stage: Stage) -> None:
    flagfile.write_stage(migration.spec.work / "flags.json", FLAG, stage)


def old_rows(migration: Migration) -> list[str]:
    return comparable(migration.old.execute(f"SELECT {SEEN} FROM members WHERE kind = 'person'").fetchall())


def new_rows(migration: Migration) -> list[str]:
    return comparable(migration.new.execute(f"SELECT {', '.join(COLUMNS)} FROM people").fetchall())


def lake(migration: Migration) -> list[str]:
    return lake_rows(migration.lake("people").select(*COLUMNS))


def robots(migration: Migration) -> list[tuple[Any, ...]]:
    return migration.old.execute("SELECT id, name FROM members WHERE kind = 'robot' ORDER BY id").fetchall()


def position(connection: Any) -> int:
    """Return a store's position, and have its stream pass it."""
    row = connection.execute("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint").fetchone()
    emit_marker(connection, "test")
    return int(row[0])


def settled(migration: Migration, seconds: float = 300.0) -> None:
    """Wait until everything that the store with authority has committed was offered to all the others."""
    with Ledger.open(migration.spec, "test") as ledger:
        new = ledger.authority().store == "new"
        wanted = position(migration.new if new else migration.old)
        deadline = time.monotonic() + seconds
        while late := [one for one in ledger.loads(NEW if new else OLD) if one.applied < wanted]:
            assert time.monotonic() < deadline, late
            time.sleep(0.05)


def write_to_the_new_store(migration: Migration, mark: str) -> None:
    """Every kind of write: insert, update, delete, another key, a large value left alone, one key many times, rolled back."""
    new = migration.new
    new.execute("INSERT INTO people (person, name, active, tags, note) VALUES (1000, %s, true, '{x}', 'a')"
                " ON CONFLICT (person) DO UPDATE SET name = excluded.name", [mark])  # fmt: skip
    new.execute("UPDATE people SET paid = paid + 1, joined = joined + interval '1 day' WHERE person BETWEEN 10 AND 20")
    new.execute("DELETE FROM people WHERE person = 30")
    new.execute("UPDATE people SET person = person + 500 WHERE person = 41")
    new.execute(f"UPDATE people SET note = ({LARGE}) WHERE person = 50", [mark])
    new.execute("UPDATE people SET name = %s WHERE person = 50", [mark])
    for number in range(5):
        new.execute("UPDATE people SET name = %s WHERE person = 60", [f"{mark} {number}"])
    with new.transaction(force_rollback=True):
        new.execute("DELETE FROM people")


@contextmanager
def writing_there(migration: Migration) -> Iterator[Callable[[int], None]]:
    """Write to the new store again and again; yields what waits until so many writes are made."""
    stop, written = threading.Event(), [0]
    failed: list[BaseException] = []

    def wait(writes: int) -> None:
        wait_for(lambda: failed or written[0] >= writes, "writes to the new store")

    def write() -> None:
        try:
            with connect(migration.spec.targets[STORE].dsn_value, "application") as session:
                number = 0
                while not stop.wait(0.003):
                    written[0] = number
                    number += 1
                    session.execute("UPDATE people SET name = %s WHERE person = %s", [f"live {number}", number % 200 + 1])
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield wait
    finally:
        stop.set()
        writer.join()
    assert not failed, failed


def reverse_loads(migration: Migration) -> dict[str, Load]:
    with Ledger.open(migration.spec, "test") as ledger:
        return {one.target: one for one in ledger.loads(NEW)}


def forward_events(migration: Migration) -> dict[str, int]:
    with Ledger.open(migration.spec, "test") as ledger:
        return {one.target: one.events for one in ledger.loads()}


def test_what_is_written_to_the_new_store_comes_back_and_nothing_echoes(people: Migration) -> None:
    with following(people):
        fence(people.spec, Origin.NEW)
        before = forward_events(people)
        with writing_there(people) as wait:
            write_to_the_new_store(people, "first")
            wait(300)
        settled(people)
        assert old_rows(people) == new_rows(people) == lake(people)
        assert robots(people) == [(9001, "r2"), (9002, "c3")]
        written = spool_events(reverse.spool_of(people.spec), "public.people")
        assert written
        assert not any(event["note"] for event in written), "under its authority the new store's stream has no write of ours"
        echoed = spool_events(spool_of(people.spec), "public.members")
        assert {event["note"] for event in echoed} == {"changes"}, "what replay wrote to the old store is marked as ours"
        assert forward_events(people) == before, "and offered to nobody"
        told = explain(people.spec, ["60"]).parts["spooled events"]
        assert told
        assert {event.get("standing", event.get("version"))[:7] for event in told} == {"an echo"}
        assert {one.events for one in reverse_loads(people).values()} == {len(written)}

        with writing_there(people) as wait:
            wait(150)
        back = fence(people.spec, Origin.OLD)
        assert (back.epoch, back.lacking) == (2, None)
        assert old_rows(people) == new_rows(people), "the fence waited for every write"
        offered = {target: one.events for target, one in reverse_loads(people).items() if target != LAKE}
        people.old.execute("UPDATE members SET name = 'back' WHERE id BETWEEN 1 AND 9")
        people.old.execute("DELETE FROM members WHERE id = 100")
        settled(people)
        assert old_rows(people) == new_rows(people) == lake(people)
        assert offered == {target: one.events for target, one in reverse_loads(people).items() if target != LAKE}, (
            "what replay writes to the new store does not come back"
        )

        again = fence(people.spec, Origin.NEW)
        assert again.epoch == 3
        with writing_there(people):
            write_to_the_new_store(people, "second")
        settled(people)
        assert old_rows(people) == new_rows(people) == lake(people)


def spool_events(spool: Any, relation: str) -> list[dict[str, Any]]:
    return [event for event in spool.events().to_pylist() if event["relation"] == relation]


def shown(migration: Migration) -> cutover.Shown:
    return cutover.show(migration.spec)


def wait_for(condition: Any, what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.1)


CHILD = """
import sys
from changeover.jobs.apply.rounds import replay
from changeover.spark.launch import spark_session
from changeover.spec import load
replay(load(sys.argv[1]), spark_session("killed", cores=1, memory="1g", shuffle_partitions=1), follow=True)
"""


@contextmanager
def stopped_after_a_batch(migration: Migration, file: Path) -> Iterator[None]:
    """Run replay in a child until it has offered a batch to the old store and not written down so; kill it when the block ends."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, migration.spec.path], env={**os.environ, failpoints.VARIABLE: f"batch-offered:{file}"},
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: file.exists() and OLD_STORE in file.read_text(), "the batch", 300)
        yield
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def test_rogue_writes_and_a_killed_replay(people: Migration, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with following(people):
        before = shown(people).reverse_path
        assert before is not None
        assert before.line == "opened by the fence"
        fence(people.spec, Origin.NEW)
        switch(people, Stage.LIVE)
        people.new.execute("UPDATE people SET name = 'of the application' WHERE person = 1")
        settled(people)
        assert shown(people).rogue == []

        with unrefused(people.old, "members"):
            people.old.execute("UPDATE members SET note = 'rogue' WHERE id IN (7, 8)")
        wait_for(lambda: shown(people).rogue, "the rogue write")
        [rogue] = shown(people).rogue
        assert (rogue.store, rogue.table, rogue.changes, rogue.transactions) == ("old", "public.members", 2, 1)
        assert any("which had no authority: 2 changes of 1 transaction" in reason for reason in shown(people).reasons)
        assert any("which had no authority" in line for line in status(people.spec).lines())
        with pytest.raises(NotReady, match="had no authority"):
            cutover.advance(people.spec)
        wait_for(lambda: "which had no authority" in caplog.text, "the alarm in capture's log")
        settled(people)
        kept = [event for event in spool_events(spool_of(people.spec), "public.members") if event["note"] is None]
        assert [dict(event["row"])["note"] for event in kept if event["lsn"] >= parse_lsn(rogue.first)] == ["rogue"] * 2
        [told] = explain(people.spec, ["7"]).parts["spooled events"]
        assert (told["at"][: len(rogue.first)], told["standing"][:5], told["row"]["note"]) == (rogue.first, "rogue", "rogue")
        assert "rogue" not in {row[0] for row in people.new.execute("SELECT note FROM people").fetchall()}, "offered to nobody"
        different = {verdict.target: verdict.equal for verdict in verify(people.spec, people.spark)}
        assert different[STORE] is False
        people.new.execute("UPDATE people SET note = 'settled' WHERE person IN (7, 8)")
        settled(people)
        assert all(verdict.equal for verdict in verify(people.spec, people.spark))
        assert shown(people).rogue == [], "a verdict from behind it settles it"

    with people.capturing():
        people.new.execute("UPDATE people SET paid = paid + 1 WHERE person < 50")
        people.new.execute("DELETE FROM people WHERE person = 60")
        with stopped_after_a_batch(people, tmp_path / "reached"):
            pass
        assert old_rows(people) == new_rows(people), "the batch was committed"
        people.new.execute("INSERT INTO people (person, name, active) VALUES (60, 'again', true)")
    with following(people):
        settled(people)
        assert old_rows(people) == new_rows(people)
        switch(people, Stage.SHADOW)
        fence(people.spec, Origin.OLD)
        with unrefused(people.new, "people"):
            people.new.execute("DELETE FROM people WHERE person = 70")
        wait_for(lambda: shown(people).rogue, "the rogue write to the new store")
        assert [(one.store, one.changes) for one in shown(people).rogue] == [("new", 1)]
        assert old_rows(people) != new_rows(people)
    people.abort()
    assert leftovers(people.spec) == []
    assert not reverse.spool_of(people.spec).path.exists()


def test_a_truncate_comes_back_and_with_where_it_is_told(people: Migration) -> None:
    with following(people):
        fence(people.spec, Origin.NEW)
        switch(people, Stage.LIVE)
        people.new.execute("TRUNCATE people")
        people.new.execute("INSERT INTO people (person, name, active) VALUES (1, 'since', true)")
        wait_for(lambda: "TRUNCATE" in (((way := shown(people).reverse_path) and way.lacking) or ""), "what stands in the way")
        assert any("a TRUNCATE of the new table" in reason for reason in shown(people).reasons)
        assert robots(people) == [(9001, "r2"), (9002, "c3")]
        with pytest.raises(CouldNotCheck, match=r"held against it, does not follow: .*TRUNCATE"):
            verify(people.spec, people.spark, targets=[LAKE])
        switch(people, Stage.SHADOW)
        back = fence(people.spec, Origin.OLD)
        assert back.lacking is not None
        assert "TRUNCATE" in back.lacking
        assert len(old_rows(people)) == 200, "which nobody has taken away"
        fence(people.spec, Origin.NEW)
        people.new.execute("UPDATE people SET name = 'by another path' WHERE person = 1")
        settled(people)
        assert people.old.execute("SELECT name FROM members WHERE id = 1").fetchall() == [("by another path",)]


def test_a_truncate_of_a_whole_table_comes_back(moved: Migration) -> None:
    with following(moved):
        fence(moved.spec, Origin.NEW)
        moved.new.execute("INSERT INTO ledgers VALUES (5000, 1, 'before')")
        moved.new.execute("TRUNCATE ledgers")
        moved.new.execute("INSERT INTO ledgers VALUES (5001, 1, 'since')")
        settled(moved)
        assert moved.old.execute("SELECT id, balance, note FROM accounts").fetchall() == [(5001, 1, "since")]


def test_a_partitioned_new_table_comes_back(make_migration: MakeMigration) -> None:
    made = make_migration(accounts.SPEC, accounts.ACCOUNTS, targets=(STORE,))
    made.old.execute("INSERT INTO accounts SELECT i, i * 1.5, 'n' || i FROM generate_series(1, %s) i", [accounts.ROWS])
    made.new.execute(
        "CREATE TABLE ledgers (id bigint PRIMARY KEY, balance numeric(12,2) NOT NULL, note text) PARTITION BY RANGE (id);"
        " CREATE TABLE ledgers_low PARTITION OF ledgers FOR VALUES FROM (0) TO (100);"
        " CREATE TABLE ledgers_high PARTITION OF ledgers FOR VALUES FROM (100) TO (1000)"
    )
    made.prepare()
    made.backfill()
    accounts.switch(made, Stage.SHADOW)
    with following(made):
        with accounts.unmirrored(made) as taken:
            fence(made.spec, Origin.NEW)
            made.new.execute("UPDATE ledgers SET id = id + 500 WHERE id = 50")  # from one partition to the other
            made.new.execute("CREATE TABLE ledgers_more PARTITION OF ledgers FOR VALUES FROM (1000) TO (2000)")
            made.new.execute("INSERT INTO ledgers VALUES (1500, 0, 'in a partition of now')")
            time.sleep(1)
            back = fence(made.spec, Origin.OLD)
            assert (back.store, back.lacking) == ("old", None)
            time.sleep(0.5)
        assert taken["ledgers"] > 20, taken
        accounts.assert_nothing_lost(made, taken)
        assert made.old.execute("SELECT id FROM accounts WHERE id IN (50, 550, 1500) ORDER BY 1").fetchall() == [(550,), (1500,)]
