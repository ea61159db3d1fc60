"""A whole migration from a server without logical decoding, by a role that may not replicate: verified and handed over."""

from __future__ import annotations

import itertools
import secrets
import threading
import time
from collections.abc import Iterator

import pytest
from click.testing import CliRunner
from ldclient.migrations.types import Origin, Stage
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from changeover import api
from changeover.cli.main import main
from changeover.flags.fence.fence import fence
from changeover.flags.router.router import Router
from changeover.jobs.capture.rogue import rogue
from changeover.jobs.finalize import finalize
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.source import snapshot
from changeover.session import connect
from changeover.verifiers.verification import verify
from tests.support.fix_accounts import (
    application,
    assert_nothing_lost,
    finding,
    following,
    loaded,
    routed,
    rows,
    switch,
    unmirrored,
    wait_for_writes,
)
from tests.support.fix_flags import PATIENCE, wait_until
from tests.support.fix_migration import FOLLOWS, FOLLOWS_TABLE, LAKE, NASTY_ROWS, STORE, MakeMigration
from tests.support.fix_postgres import default_binaries, fresh_database, passing_server
from tests.support.fix_writer import writing


@pytest.fixture
def old_dsn() -> Iterator[str]:
    """Yield the DSN of a plain owner in a server that can't decode: `make_migration` takes it for the old store."""
    role, password = f"owner_{secrets.token_hex(4)}", secrets.token_hex(8)
    with passing_server(default_binaries(), wal_level="replica") as server, fresh_database(server, "old") as dsn:
        with connect(dsn, "test") as admin:
            admin.execute(
                sql.SQL("CREATE ROLE {} LOGIN PASSWORD {} NOSUPERUSER NOREPLICATION").format(
                    sql.Identifier(role), sql.Literal(password)
                )
            )
            name = sql.Identifier(conninfo_to_dict(dsn)["dbname"])  # type: ignore[arg-type]
            admin.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(name, sql.Identifier(role)))
            admin.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(role)))
        yield make_conninfo(dsn, user=role, password=password)


def test_loaded_followed_and_verified_beside_a_live_writer(make_migration: MakeMigration, old_dsn: str) -> None:
    made = make_migration(FOLLOWS_TABLE, FOLLOWS, kind="trigger")
    made.old.execute(NASTY_ROWS, {"rows": 2000})
    made.old.execute("ANALYZE follows")
    with writing(old_dsn) as writer:
        made.prepare()
        made.catch_up()
        made.backfill(STORE)
        made.catch_up()
        snapshot.release(old_dsn, made.spec.name)  # the snapshot is lost, and the rest is read in a new one
        with made.old.transaction():  # or the writer comes between the two
            made.old.execute("TRUNCATE follows")
            made.old.execute(NASTY_ROWS, {"rows": 1000})
        with made.capturing():  # which tells the backfill of the TRUNCATE that gave the table its new file
            made.backfill(LAKE)
        made.catch_up()
        verdicts = made.verify()
        assert {name: verdict.word for name, verdict in verdicts.items()} == {STORE: "equal", LAKE: "equal"}
        assert verdicts[STORE].source_rows > 500
    made.catch_up()
    assert writer.writes
    made.assert_equal()
    spoilt = made.new.execute(
        "UPDATE associations SET note = 'behind its back'"
        " WHERE (entity_a, entity_b) = (SELECT entity_a, entity_b FROM associations ORDER BY 1, 2 LIMIT 1)"
    )
    assert spoilt.rowcount == 1
    assert made.verify(STORE)[STORE].word == "different"
    assert made.leftovers()
    made.abort()
    assert made.leftovers() == []
    made.old.execute("UPDATE follows SET note = 'free again'")


def test_authority_moves_there_and_back_under_writers_and_no_write_is_lost(make_migration: MakeMigration) -> None:
    moved = loaded(make_migration, STORE, LAKE, kind="trigger")
    with following(moved):
        with application(moved) as router:
            wait_for_writes(router)
            there = fence(moved.spec, Origin.NEW)
            switch(moved, Stage.LIVE)
            wait_until(lambda: router.stage is Stage.LIVE)
            wait_for_writes(router)
            switch(moved, Stage.SHADOW)
            back = fence(moved.spec, Origin.OLD)
            wait_until(lambda: router.stage is Stage.SHADOW)
            wait_for_writes(router)
        assert ((there.epoch, there.store), (back.epoch, back.store)) == ((1, "new"), (2, "old"))
        assert all(verdict.equal for verdict in verify(moved.spec, moved.spark))
        fence(moved.spec, Origin.NEW)
    assert rows(moved.old, "accounts") == rows(moved.new, "ledgers")
    finalize(moved.spec)
    assert moved.leftovers() == []


def test_shadow_reads_are_judged_by_the_positions_of_the_log(make_migration: MakeMigration, old_dsn: str) -> None:
    moved = loaded(make_migration, STORE, kind="trigger")
    stop, writes = threading.Event(), itertools.count(1)

    def write() -> None:
        with connect(old_dsn, "test") as session:
            while not stop.is_set():
                session.execute("UPDATE accounts SET note = %s WHERE id = 1", [str(next(writes))])

    def read(router: Router, key: int) -> None:
        router.compare(old=finding("accounts", key), new=finding("ledgers", key))

    writer = threading.Thread(target=write)
    with following(moved), routed(moved) as router:
        wait_until(lambda: router.stage is Stage.SHADOW)
        writer.start()
        try:
            for _ in range(50):
                read(router, 1)
                read(router, 2)
            assert router.drain(5 * PATIENCE)
        finally:
            stop.set()
            writer.join()
        counted = router.counters()["comparisons"]
        assert (counted["mismatched"], counted["errors"], counted["dropped"]) == (0, 0, 0), counted
        assert counted["matched"] + counted["inconclusive"] == 100
        assert counted["matched"] >= 50, "the key at rest"
        wait_until(lambda: rows(moved.old, "accounts") == rows(moved.new, "ledgers"))
        moved.new.execute("UPDATE ledgers SET note = 'spoilt' WHERE id = 2")
        read(router, 2)
        assert router.drain(PATIENCE), "nobody writes, and the log is at rest"
        assert [(result.outcome, result.looks) for result in router.mismatches] == [("mismatched", 2)]
        wait_until(lambda: api.read_differences(moved.spec))
        shown = CliRunner().invoke(main, ["flags", "show", moved.spec.path]).stdout
    assert "reads: 1 that mismatched are on record, the newest is read at shadow" in shown


def test_the_fences_positions_in_the_log_part_what_was_written_under_each_authority(make_migration: MakeMigration) -> None:
    moved = loaded(make_migration, STORE, kind="trigger")
    with following(moved):
        with unmirrored(moved) as taken:
            for to in (Origin.NEW, Origin.OLD, Origin.NEW, Origin.OLD):
                time.sleep(1)
                fence(moved.spec, to)
            time.sleep(1)
        assert min(taken["accounts"], taken["ledgers"]) > 20, taken
        assert_nothing_lost(moved, taken)
        with Ledger.open(moved.spec, "test") as ledger:
            assert rogue(moved.spec, ledger) == [], "each write was made by somebody who had authority"
        assert verify(moved.spec, moved.spark)[0].equal
