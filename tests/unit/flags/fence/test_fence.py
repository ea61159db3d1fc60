"""The fence against real stores: authority moves under live writers, and no stale write gets through."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.errors import FenceCalledOff, ServerUnavailable
from changeover.flags.cutover import commands as cutover
from changeover.flags.fence import fence as fences
from changeover.flags.fence.fence import fence
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Authority
from changeover.jobs.reverse import setup as reverse_setup
from changeover.session import connect
from changeover.stores.postgres import refusal
from changeover.stores.postgres.gate import FENCED
from changeover.verifiers.verification import verify
from tests.support.fix_accounts import application, following, rows, switch, wait_for_writes
from tests.support.fix_flags import wait_until
from tests.support.fix_migration import Migration


def test_authority_moves_there_and_back_under_writers_and_no_write_is_lost(moved: Migration) -> None:
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
    with Ledger.open(moved.spec, "test") as ledger:  # both databases are one server's, whose open transactions hold up a slot
        assert reverse_setup.open_path(moved.spec, ledger) is not None
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
    with pytest.raises(FenceCalledOff, match=r"after 3 s while waiting for replay .* before anybody is held up"):
        fence(moved.spec, Origin.NEW, max_pause=0.5)
    moved.old.execute("UPDATE accounts SET note = 'still here' WHERE id = 3")
    with Ledger.open(moved.spec, "test") as ledger:
        assert ledger.authority().store == "old"


def test_writers_go_on_while_a_replay_that_is_behind_draws_near(moved: Migration) -> None:
    write = "UPDATE accounts SET note = 'while it waits' WHERE id = 3"
    assert taken(moved, write)
    with ThreadPoolExecutor(1) as pool:
        moving = pool.submit(fence, moved.spec, Origin.NEW)
        for _ in range(20):
            assert taken(moved, write), "nothing was replayed yet, so nobody should wait"
            time.sleep(0.1)
        assert not moving.done()
        with following(moved):
            assert moving.result().store == "new"
    assert moved.new.execute("SELECT note FROM ledgers WHERE id = 3").fetchone() == ("while it waits",)


def taken(migration: Migration, write: str) -> bool:
    """Return whether the old store takes a write; a refusal is the one other answer."""
    try:
        migration.old.execute(write.encode())
    except psycopg.Error as refused:
        if refused.sqlstate != FENCED:
            raise
        return False
    return True


def test_a_refusal_whose_fence_died_ends_by_itself(moved: Migration) -> None:
    write = "UPDATE accounts SET note = 'x' WHERE id = 1"
    assert refusal.install(moved.old, "public", "accounts", refusal.Refusal(begun=refusal.TenantEpoch(1)), time.monotonic() + 120)
    with pytest.raises(psycopg.Error, match="no authority"):
        moved.old.execute(write)
    begun = refusal.Refusal(begun=refusal.TenantEpoch(1))
    while not refusal.install(moved.old, "public", "accounts", begun, time.monotonic() + 1.0):
        pass  # the machine stood still for that long
    wait_until(lambda: taken(moved, write))


def test_the_gate_asks_for_a_verdict_and_a_router(moved: Migration, tmp_path: Path) -> None:
    shown = cutover.show(moved.spec)
    assert not shown.go
    told = " ".join(shown.reasons)
    for reason in ("never verified", "no router was heard", "capture is not running", "only 0 reads were compared at shadow"):
        assert reason in told


def authority(migration: Migration) -> Authority:
    with Ledger.open(migration.spec, "test") as ledger:
        return ledger.authority()


def test_a_fence_that_can_not_be_recorded_gives_the_writers_back(moved: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ServerUnavailable("the ledger", "broke off")

    monkeypatch.setattr(fences, "_record", broken)
    with following(moved):
        with pytest.raises(ServerUnavailable):
            cutover.advance(moved.spec, to=Stage.LIVE, override="test")
        assert authority(moved).store == "old"
        assert cutover.desired_stage(moved.spec) is Stage.SHADOW
        moved.old.execute("UPDATE accounts SET note = 'goes on' WHERE id = 1")
        # a floor that had been raised for it would refuse, without a word, all that the old store writes from here on
        deadline = time.monotonic() + 120
        while moved.new.execute("SELECT note FROM ledgers WHERE id = 1").fetchone() != ("goes on",):
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.1)


def test_a_fence_whose_record_was_made_though_nobody_heard_it_stands(moved: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    record = fences._record

    def unheard(*arguments: Any) -> None:
        record(*arguments)
        raise ServerUnavailable("the ledger", "broke off after COMMIT")

    monkeypatch.setattr(fences, "_record", unheard)
    with following(moved), pytest.raises(ServerUnavailable):
        cutover.advance(moved.spec, to=Stage.LIVE, override="test")
    assert authority(moved).store == "new"
    assert cutover.desired_stage(moved.spec) is Stage.LIVE
    fences.settle(moved.spec)
    assert moved.new.execute("SELECT epoch FROM changeover.gate").fetchone() == (1,)
    with pytest.raises(psycopg.Error, match="no authority"):
        moved.old.execute("UPDATE accounts SET note = 'stale' WHERE id = 1")


def test_the_next_command_lets_the_store_with_authority_write_after_a_fence_was_killed(moved: Migration) -> None:
    assert refusal.install(moved.old, "public", "accounts", refusal.Refusal(begun=refusal.TenantEpoch(1)), time.monotonic() + 120)
    refusal.replace(moved.old, "public", "accounts", refusal.Refusal((refusal.TenantEpoch(1),)))
    with pytest.raises(psycopg.Error, match="no authority"):
        moved.old.execute("UPDATE accounts SET note = 'x' WHERE id = 1")
    assert cutover.rollback(moved.spec).after is Stage.DUALWRITE
    moved.old.execute("UPDATE accounts SET note = 'x' WHERE id = 1")
