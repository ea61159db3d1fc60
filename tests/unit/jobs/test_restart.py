"""A migration begun anew: a lost slot and a source that failed over stop it by a sentence, and one command is the way out."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from deltalake import DeltaTable

from changeover import failpoints, pipeline
from changeover.embedded.server import EmbeddedServer
from changeover.errors import (
    CouldNotFinish,
    DatabaseFailed,
    FolderFailed,
    LeaseHeld,
    Refused,
    SourceChanged,
    SpecError,
    StepOrder,
    UsageError,
)
from changeover.jobs.capture.service import capture
from changeover.jobs.ledger.chunks import append_name
from changeover.jobs.ledger.ledger import Ledger, mark_loaded
from changeover.jobs.ledger.records import CLOSED, PENDING, Stream
from changeover.jobs.spool.table import spool_path
from changeover.jobs.status import status
from changeover.position import Version, format_lsn
from changeover.session import connect
from changeover.stores.delta.appends import commit_once
from tests.support.fix_accounts import ACCOUNTS
from tests.support.fix_migration import FOLLOWS, FOLLOWS_TABLE, LAKE, NASTY_ROWS, STORE, MakeMigration, Migration
from tests.support.fix_postgres import SETTINGS
from tests.support.fix_writer import writing

WAY_OUT = "a gap; `changeover prepare --anew SPEC` empties the target tables, and every chunk is copied again"

IN_THE_GAP = """
DELETE FROM follows WHERE from_user % 7 = 0;
UPDATE follows SET note = 'in the gap' WHERE from_user % 5 = 0;
UPDATE follows SET from_user = from_user + 1000 WHERE from_user % 11 = 0;
"""


class Killed(BaseException):
    """Stands for kill -9 between two statements: nothing that handles errors sees it as one."""


def anew(migration: Migration, *, asked: bool = True) -> Stream:
    """Run the one command."""
    return pipeline.prepare(migration.spec, migration.spark, anew=asked).stream


def caught_up(migration: Migration) -> None:
    """Bring a migration to where it follows: loaded, and replayed with some changes."""
    migration.backfill()
    migration.old.execute("UPDATE follows SET note = 'followed' WHERE from_user % 3 = 0; DELETE FROM follows WHERE from_user = 2")
    migration.catch_up()


def lose_slot(migration: Migration) -> None:
    migration.old.execute("SELECT pg_drop_replication_slot(%s)", [migration.spec.slot])


def stream_of(migration: Migration) -> Stream:
    with Ledger.open(migration.spec, "test") as ledger:
        return ledger.stream("status")


def offered(migration: Migration, version: Version) -> bool:
    """Offer the store a row as a router's mirror does; return whether it was taken."""
    row = migration.new.execute(
        'SELECT changeover."gate_public.associations"(%s, %s, %s, false, (SELECT a FROM associations a ORDER BY 1 LIMIT 1))',
        [version.epoch, format_lsn(version.lsn), version.ordinal],
    ).fetchone()
    return bool(row and row[0])


def test_a_slot_that_is_lost_under_live_writes(migration: Migration) -> None:
    migration.prepare()
    caught_up(migration)
    before, chunks = stream_of(migration), len(migration.chunks(LAKE))
    with writing(migration.old.info.dsn + f" password={migration.old.info.password}", seed=3):
        lose_slot(migration)
        migration.old.execute(IN_THE_GAP)
        with pytest.raises(SourceChanged, match=f"the source's replication slot is missing, but .* was prepared: .*{WAY_OUT}"):
            capture(migration.spec, patience=0)
        with pytest.raises(SourceChanged, match=WAY_OUT):
            capture(migration.spec, patience=0)  # and it stays so
        after = anew(migration)
        assert migration.new.execute("SELECT count(*) FROM associations").fetchone() == (0,)
        migration.backfill()
        migration.catch_up()
        old_epochs_have_no_effect(migration, before, chunks)
        verdicts = migration.verify()
    assert {target: verdict.equal for target, verdict in verdicts.items()} == {STORE: True, LAKE: True}
    migration.catch_up()
    migration.assert_equal()
    assert (before.epoch, after.epoch, after.image) == (0, 1, Version(1, after.l0, -1))
    assert not spool_path(migration.spec.work, 0).exists()
    assert (status(migration.spec).epoch, status(migration.spec).store) == (1, "old")
    migration.abort()
    assert migration.leftovers() == []
    assert not spool_path(migration.spec.work, 1).exists()


def old_epochs_have_no_effect(migration: Migration, before: Stream, chunks: int) -> None:
    """What was left running from before: a mirror's write, a chunk's mark and append, and replay's position."""
    assert not offered(migration, Version(0, 2**40, 0)), "an earlier epoch's version, whatever its position"
    (row,) = migration.new.execute("SELECT max(token) FROM changeover.chunk").fetchall()
    with migration.new.transaction(force_rollback=True), migration.new.cursor() as cursor:
        cursor.execute("UPDATE changeover.chunk SET loaded = NULL")
        marks = [("public.follows", target, 0, token) for target in (STORE, LAKE) for token in range(9)]
        assert row[0] > 2**32
        assert not any(mark_loaded(cursor, migration.spec.name, *mark, (1, 0), 0.1) for mark in marks)
    lake = str(migration.spec.targets[LAKE].folder / "associations")
    version = DeltaTable(lake).version()
    for chunk in range(chunks):
        assert commit_once(lake, append_name(migration.spec.name, before.image, "public.follows", LAKE, chunk), []) >= 0
    assert DeltaTable(lake).version() == version
    with Ledger.open(migration.spec, "test") as ledger, pytest.raises(CouldNotFinish, match="was begun anew since this run began"):
        ledger.advance("public.follows", STORE, 2**62, 1, before.epoch)


@contextmanager
def copy_of(server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    """Copy a stopped server's folder, which starts as a standby, and remove it at the end."""
    with tempfile.TemporaryDirectory(prefix="changeover-pg-") as parent:
        Path(parent).chmod(0o755)
        copy = Path(parent) / "copy"
        copy.mkdir(mode=0o755)
        subprocess.run(["cp", "-a", f"{server.root}/.", copy], check=True)
        yield EmbeddedServer.attach(copy)


def promoted(copy: EmbeddedServer) -> EmbeddedServer:
    """Start a copy as a standby and promote it, as a failover does."""
    signal_file = copy.data / "standby.signal"
    signal_file.touch()
    owner = copy.data.stat()
    os.chown(signal_file, owner.st_uid, owner.st_gid)
    started = EmbeddedServer.start(copy.root, settings=SETTINGS)
    with connect(started.dsn(), "test") as session:
        session.execute("SELECT pg_promote()")
    return started


def test_a_source_that_failed_over_to_an_older_state(
    migration: Migration, server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = migration.old.info.dbname
    migration.prepare()
    migration.capture()
    server.stop()
    with copy_of(server) as copy:
        server.restart()
        migration = replace(
            migration, old=connect(server.dsn(database), "test"), new=connect(server.dsn(migration.new.info.dbname), "test")
        )
        migration.old.execute("SELECT pg_logical_emit_message(false, 'noise', repeat('x', 1000)) FROM generate_series(1, 20000)")
        migration.old.execute("INSERT INTO follows (from_user, to_channel, note) VALUES (5000, 1, 'lost in the failover')")
        caught_up(migration)
        seen = migration.spool().end()
        assert any("lost in the failover" in row for row in migration.target_rows(STORE))
        with promoted(copy) as primary, connect(primary.dsn(database), "test") as old:
            monkeypatch.setenv("OLD_DSN", primary.dsn(database))
            migration.old.close()
            migration = replace(migration, old=old)
            old.execute(IN_THE_GAP)
            with pytest.raises(SourceChanged, match=f"the source's timeline is 2, but 1 was prepared: .*{WAY_OUT}"):
                capture(migration.spec, patience=0)
            stream = anew(migration)
            assert stream.l0 < seen, "the positions of the new primary are below those that were seen"
            assert (stream.timeline, stream.epoch) == (2, 1)
            old.execute("DELETE FROM follows WHERE from_user = 4")
            with migration.capturing():
                migration.backfill()
                old.execute("INSERT INTO follows (from_user, to_channel) VALUES (6000, 1)")
            migration.catch_up()
            migration.assert_equal()
            assert all(verdict.equal for verdict in migration.verify().values())
            migration.abort()
        migration.new.close()


POINTS = ["epoch-begun", "stream-opened", "target-emptied", "before-record"]


def test_a_kill_at_any_point_is_made_good_by_the_same_command(migration: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    migration.prepare()
    caught_up(migration)
    lose_slot(migration)
    migration.old.execute(IN_THE_GAP)
    for number, point in enumerate(POINTS, 1):
        killed_at(migration, monkeypatch, point)
        with pytest.raises(StepOrder, match="capture needs prepare first: run `changeover prepare SPEC`"):
            capture(migration.spec, patience=0)
        with Ledger.open(migration.spec, "test") as ledger:
            assert (ledger.begun(), {load.state for load in ledger.loads()}) == (number, {PENDING})
        assert status(migration.spec).name == migration.spec.name
    assert anew(migration, asked=False).epoch == len(POINTS) + 1
    assert [path.name for path in migration.spec.work.glob("spool*")] == [f"spool-{len(POINTS) + 1}"]
    migration.backfill()
    migration.catch_up()
    migration.assert_equal()
    with Ledger.open(migration.spec, "test") as ledger:
        assert {load.state for load in ledger.loads()} == {CLOSED}
    migration.abort()
    assert migration.leftovers() == []


def killed_at(migration: Migration, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    def reach(name: str, detail: object = "") -> None:
        if name == point:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "reach", reach)
        with pytest.raises(Killed):
            anew(migration)


def wait_for_capture(migration: Migration) -> None:
    deadline = time.monotonic() + 120
    while not migration.old.execute(
        "SELECT FROM pg_replication_slots WHERE slot_name = %s AND active", [migration.spec.slot]
    ).fetchall():
        assert time.monotonic() < deadline, "capture does not begin"
        time.sleep(0.02)


def test_it_is_refused_where_it_would_lose_rows(make_migration: MakeMigration) -> None:
    migration = make_migration(FOLLOWS_TABLE, FOLLOWS, targets=[STORE])
    migration.old.execute(NASTY_ROWS, {"rows": 50})
    migration.prepare()
    migration.backfill()
    migration.new.execute("CREATE TABLE beside (id integer PRIMARY KEY); INSERT INTO beside VALUES (1)")
    held = migration.new.execute("SELECT count(*) FROM associations").fetchone()
    with migration.capturing():
        wait_for_capture(migration)
        with pytest.raises(LeaseHeld, match="another capture of this migration is running"):
            anew(migration)
    with pytest.raises(UsageError, match="changed since prepare"):
        anew(replace(migration, spec=replace(migration.spec, digest="another")))
    migration.new.execute("INSERT INTO changeover.authority VALUES (%s, 1, 'new', '0/1')", [migration.spec.name])
    with pytest.raises(Refused, match="authority has moved to the new store, whose rows are the truth"):
        anew(migration)
    migration.new.execute("DELETE FROM changeover.authority")
    migration.new.execute(
        "CREATE TABLE notes (a bigint, b text, c bigint, FOREIGN KEY (a, b, c) REFERENCES associations ON DELETE CASCADE);"
        " INSERT INTO notes SELECT entity_a, kind, entity_b FROM associations LIMIT 1"
    )
    with pytest.raises(DatabaseFailed, match=r"refused while emptying public.associations: cannot truncate .* foreign key"):
        anew(migration)
    assert migration.leftovers() == [], "an error leaves no slot behind"
    assert migration.new.execute("SELECT count(*) FROM associations").fetchone() == held
    migration.new.execute("ALTER TABLE notes DROP CONSTRAINT notes_a_b_c_fkey")
    assert anew(migration).epoch == 2
    assert migration.new.execute("SELECT (SELECT count(*) FROM notes), (SELECT count(*) FROM beside)").fetchone() == (1, 1)
    migration.old.execute("VACUUM FULL follows")
    with migration.capturing(), pytest.raises(Refused, match=r"it was rewritten since prepare.*prepare --anew SPEC"):
        migration.backfill()
    assert anew(migration).epoch == 3
    migration.backfill()
    migration.assert_equal()
    shutil.rmtree(migration.spec.work / "spool-3")
    with pytest.raises(FolderFailed, match="no spool is there: if it is lost for good, `changeover prepare --anew SPEC`"):
        capture(migration.spec, patience=0)
    migration.abort()


WITH_REVERSE = """
[[table]]
source = "public.accounts"
target = "ledgers"
key = ["id"]
[table.columns]
shout = "upper(note)"
[table.reverse]
note = "lower(shout)"
[flag]
key = "f"
target = "store"
"""


def test_reverse_replication_is_looked_at_again(make_migration: MakeMigration, caplog: pytest.LogCaptureFixture) -> None:
    migration = make_migration(WITH_REVERSE, ACCOUNTS, targets=[STORE])
    migration.prepare()
    assert "reverse replication" not in caplog.text
    migration.new.execute("ALTER TABLE ledgers ALTER balance TYPE text")
    assert anew(migration).epoch == 1
    assert "public.accounts has no reverse replication from ledgers: nothing gives its column balance" in caplog.text
    migration.new.execute("ALTER TABLE ledgers ALTER balance TYPE numeric(12,2) USING NULL, ALTER shout TYPE integer[] USING NULL")
    migration.new.execute("INSERT INTO ledgers (id, balance) VALUES (1, 1)")
    with pytest.raises(SpecError, match=r"columns.note: 'lower\(shout\)' is not a valid expression"):
        anew(migration)
    assert migration.new.execute("SELECT count(*) FROM ledgers").fetchone() == (1,), "nothing was begun"
    with Ledger.open(migration.spec, "test") as ledger:
        assert ledger.begun() is None
