"""The fence against real stores: authority moves under live writers, and no stale write gets through."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.errors import FenceCalledOff
from changeover.flags import cutover, flagfile
from changeover.flags.fence import fence
from changeover.flags.router import Change, Router, returned
from changeover.jobs.capture import capture
from changeover.jobs.ledger import Ledger
from changeover.jobs.replay import replay
from changeover.session import connect
from changeover.stores.gate import FENCED
from changeover.verifiers.verify import verify
from tests.fix_migration import STORE, MakeMigration, Migration

ACCOUNTS = "CREATE TABLE accounts (id bigint PRIMARY KEY, balance numeric(12,2) NOT NULL, note text)"
SPEC = '[[table]]\nsource = "public.accounts"\ntarget = "ledgers"\nkey = ["id"]\n[flag]\nkey = "accounts-store"\ntarget = "store"\n'
ROWS = 200


@pytest.fixture
def moved(make_migration: MakeMigration) -> Migration:
    """Return a migration of accounts that is loaded and closed, its flag at shadow."""
    made = make_migration(SPEC, ACCOUNTS, targets=(STORE,))
    made.old.execute("INSERT INTO accounts SELECT i, i * 1.5, 'n' || i FROM generate_series(1, %s) i", [ROWS])
    made.prepare()
    made.backfill()
    flagfile.write_stage(made.spec.work / "flags.json", "accounts-store", Stage.SHADOW)
    return made


@contextmanager
def following(migration: Migration) -> Iterator[None]:
    """Capture and replay for as long as the block lasts."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def guarded(work: Any, **options: Any) -> None:
        try:
            work(migration.spec, *options.pop("more", ()), stop=stop, **options)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=guarded, args=(capture,)),
        threading.Thread(target=guarded, args=(replay,), kwargs={"more": (migration.spark,), "follow": True}),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors


@contextmanager
def application(migration: Migration, threads: int = 3) -> Iterator[Router]:
    """Write to every account through a router, again and again, until the block ends; an error fails the test."""
    client = flagfile.client(migration.spec.work / "flags.json")
    router = Router.connect(migration.spec, "accounts", to_new=dict, to_old=dict, client=client)
    stop = threading.Event()
    errors: list[BaseException] = []

    def write(first: int) -> None:
        account = first
        while not stop.wait(0.004):
            account = account % ROWS + threads
            try:
                router.write(old=adding("accounts", account), new=adding("ledgers", account))
                router.read(old=finding("accounts", account), new=finding("ledgers", account))
            except BaseException as error:
                errors.append(error)
                return

    writers = [threading.Thread(target=write, args=(number,)) for number in range(threads)]
    for writer in writers:
        writer.start()
    try:
        yield router
    finally:
        stop.set()
        for writer in writers:
            writer.join()
        router.drain(10)
        router.close()
        client.close()  # type: ignore[no-untyped-call]
    assert not errors, errors


def adding(table: str, account: int) -> Any:
    """Return the application's write: one is added to an account's balance, or it is opened anew."""

    def write(cursor: Any) -> list[Change]:
        cursor.execute(f"UPDATE {table} SET balance = balance + 1 WHERE id = %s RETURNING *", [account])
        return returned(cursor)

    return write


def finding(table: str, account: int) -> Any:
    """Return the application's read."""
    return lambda cursor: cursor.execute(f"SELECT id, note FROM {table} WHERE id = %s", [account]).fetchone()


def rows(connection: psycopg.Connection[Any], table: str) -> list[tuple[Any, ...]]:
    return connection.execute(f"SELECT id, balance, note FROM {table} ORDER BY id").fetchall()


def test_authority_moves_there_and_back_under_writers_and_no_write_is_lost(moved: Migration) -> None:
    with following(moved):
        with application(moved) as router:
            time.sleep(1)
            there = fence(moved.spec, Origin.NEW)
            flagfile.write_stage(moved.spec.work / "flags.json", "accounts-store", Stage.LIVE)
            time.sleep(1)
            assert router.stage.value == "live"
            flagfile.write_stage(moved.spec.work / "flags.json", "accounts-store", Stage.SHADOW)
            back = fence(moved.spec, Origin.OLD)
            time.sleep(1)
            assert router.stage.value == "shadow"
        assert (there.epoch, there.store) == (1, "new")
        assert (back.epoch, back.store) == (2, "old")
        assert all(verdict.equal for verdict in verify(moved.spec, moved.spark))
    assert rows(moved.old, "accounts") == rows(moved.new, "ledgers")


def test_a_stale_write_is_refused_by_the_store_that_lost_authority(moved: Migration, old_dsn: str) -> None:
    with following(moved), connect(old_dsn, "stale", autocommit=False) as stale:
        fence(moved.spec, Origin.NEW)
        for statement in ("UPDATE accounts SET note = 'stale' WHERE id = 1", "DELETE FROM accounts", "TRUNCATE accounts",
                          "INSERT INTO accounts VALUES (-1, 0, 'stale')"):  # fmt: skip
            with pytest.raises(psycopg.Error) as refused:
                stale.execute(statement)
            assert refused.value.sqlstate == FENCED
            stale.rollback()


def test_an_open_transaction_drains_before_the_fence_or_calls_it_off(moved: Migration, old_dsn: str) -> None:
    with following(moved), connect(old_dsn, "slow", autocommit=False) as slow:
        slow.execute("UPDATE accounts SET note = 'slow' WHERE id = 7")
        with pytest.raises(FenceCalledOff, match="lock"):
            fence(moved.spec, Origin.NEW, max_pause=2.5)
        slow.commit()
        moved.old.execute("UPDATE accounts SET note = 'writers go on' WHERE id = 8")
        fence(moved.spec, Origin.NEW)
        arrived = moved.new.execute("SELECT note FROM ledgers WHERE id IN (7, 8) ORDER BY id").fetchall()
        assert arrived == [("slow",), ("writers go on",)]


def test_without_replay_the_fence_is_called_off_and_writers_go_on(moved: Migration) -> None:
    moved.old.execute("UPDATE accounts SET note = 'not there yet' WHERE id = 3")
    with pytest.raises(FenceCalledOff, match="capture to spool"):
        fence(moved.spec, Origin.NEW, max_pause=1.5)
    moved.old.execute("UPDATE accounts SET note = 'still here' WHERE id = 3")
    with Ledger.open(moved.spec, "test") as ledger:
        assert ledger.authority().store == "old"


def test_a_refusal_whose_fence_died_ends_by_itself(moved: Migration) -> None:
    from changeover.stores import refusal

    assert refusal.install(moved.old, "public", "accounts", 1, time.monotonic() + 1.0)
    with pytest.raises(psycopg.Error):
        moved.old.execute("UPDATE accounts SET note = 'x' WHERE id = 1")
    time.sleep(1.1)
    moved.old.execute("UPDATE accounts SET note = 'x' WHERE id = 1")


def test_the_gate_asks_for_a_verdict_and_a_router(moved: Migration, tmp_path: Path) -> None:
    shown = cutover.show(moved.spec)
    assert not shown.go
    told = " ".join(shown.reasons)
    for reason in ("never verified", "no router was heard", "capture is not running", "shadow reads were compared"):
        assert reason in told
