"""Reads before writes on a live migration: who reads where, and that nobody reads older than what was written for them."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner
from ldclient import Context
from ldclient.migrations.types import Origin, Stage
from psycopg_pool import ConnectionPool

from changeover.cli.main import main
from changeover.errors import Refused
from changeover.flags import flagfile
from changeover.flags.cutover import commands as cutover
from changeover.flags.router.follower import LedgerFollower
from changeover.flags.router.router import Router
from changeover.jobs.capture.service import capture
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.restart import restart
from tests.support.fix_accounts import FLAG, following, loaded, moved, patient_fences, routed, switch
from tests.support.fix_flags import PATIENCE, wait_until
from tests.support.fix_migration import STORE, MakeMigration, Migration

__all__ = ["moved", "patient_fences"]

OTHER = {Origin.OLD: "accounts", Origin.NEW: "ledgers"}


def advance(migration: Migration, percent: int) -> Any:
    return cutover.advance(migration.spec, override="test", reads=percent)


def opened(router: Router, percent: int = 100) -> None:
    """Wait until a router knows that reads may move, and that a replay runs."""
    wait_until(lambda: router.reading(context=moving(router, percent)).origin is Origin.NEW, PATIENCE)


def moving(router: Router, percent: int) -> str:
    """Return a user to whom the flag serves live."""
    return next((user for user in map(str, range(1000)) if percent == 100 or served(router, user)), "0")


def served(router: Router, user: str) -> bool:
    asked = router._parts.stage.of(Context.create(user))
    return asked is not None and asked is Stage.LIVE


def note(router: Router, user: int) -> tuple[Origin, str | None]:
    with router.read(context=user) as store:
        row = store.execute(f"SELECT note FROM {OTHER[store.origin]} WHERE id = %s", [user]).fetchone()
    return store.origin, row[0] if row else None


def write(router: Router, user: int, text: str, *, context: int | None) -> Origin:
    with router.write(context=context) as store:
        store.execute(f"UPDATE {OTHER[store.origin]} SET note = %s WHERE id = %s", [text, user])
    return store.origin


def test_a_percentage_of_users_reads_from_the_new_store_and_writes_stay(moved: Migration) -> None:
    with following(moved), routed(moved) as router:
        done = advance(moved, 10)
        assert (done.before, done.after, done.reads, done.pause_seconds) == (Stage.SHADOW, Stage.SHADOW, 10, None)
        opened(router, 10)
        users = range(1000)
        there = {user for user in users if router.reading(context=user).origin is Origin.NEW}
        assert there == {user for user in users if served(router, str(user))}, "as LaunchDarkly serves it"
        assert 50 < len(there) < 150
        assert {write(router, user, "by a write", context=user) for user in (*list(there)[:5], 0)} == {Origin.OLD}
        assert router.stage is Stage.SHADOW
        assert router.reading().origin is Origin.OLD, "nobody in particular"
        shown = CliRunner().invoke(main, ["flags", "show", moved.spec.path])
        assert "reads: 10 % of contexts read the new store before writes go there" in shown.stdout
        cutover.rollback(moved.spec, reads=0)
        wait_until(lambda: router.reading(context=next(iter(there))).origin is Origin.OLD, PATIENCE)
        assert flagfile.read_flag(moved.spec.work / "flags.json", FLAG)["fallthrough"] == {"variation": 2}


def test_nobody_reads_older_than_what_was_written_for_them(moved: Migration) -> None:
    with following(moved), routed(moved) as router:
        router.stage  # noqa: B018 - it starts here, before reads are opened
        write(router, 7, "before", context=None)
        advance(moved, 100)
        opened(router)
        assert note(router, 7) == (Origin.NEW, "before"), "written before reads were opened"
        for number in range(20):
            for context in (8, None):  # what is written for nobody in particular counts for everybody
                assert write(router, 8, f"n{number}", context=context) is Origin.OLD
                assert note(router, 8) == (Origin.NEW, f"n{number}")
        reads = router.counters()["reads"]
        assert (reads["behind"], reads["moved"] >= 40) == (0, True)

        def work(place: Any) -> None:
            with router._running().session(place.origin) as own:
                own.execute("UPDATE accounts SET note = 'own session' WHERE id = 9")

        router.rerun(work, context=9)
        assert note(router, 9) == (Origin.NEW, "own session")
        assert router.compare(
            old=lambda cursor: "old", new=lambda cursor: cursor.execute("SELECT note FROM ledgers WHERE id = 9").fetchall()[0][0],
            context=Context.create("9"),
        ) == "own session"  # fmt: skip
        assert router.drain(PATIENCE)
        assert router.mismatches == []


@contextmanager
def capturing(migration: Migration) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=capture, args=(migration.spec,), kwargs={"stop": stop})
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_where_replay_does_not_run_reads_stay(moved: Migration) -> None:
    with routed(moved) as router:
        with following(moved):
            advance(moved, 100)
            opened(router)
        with capturing(moved):
            wait_until(lambda: router.reading(context=1).origin is Origin.OLD, PATIENCE)
            assert write(router, 7, "later", context=7) is Origin.OLD
            assert note(router, 7) == (Origin.OLD, "later")
            assert router.counters()["reads"]["unreplayed"] > 0
        with following(moved):
            opened(router)
            assert note(router, 7) == (Origin.NEW, "later")


def test_a_replay_that_is_behind_costs_a_wait_and_then_the_authority_is_read(moved: Migration) -> None:
    with following(moved), routed(moved) as router:
        advance(moved, 100)
        opened(router)
        with moved.new.transaction():
            moved.new.execute("LOCK TABLE ledgers IN SHARE MODE")  # replay waits, and readers don't
            write(router, 7, "held up", context=7)
            router._running().reads.wait = 0.2
            assert note(router, 7) == (Origin.OLD, "held up")
            assert router.counters()["reads"]["behind"] == 1
            assert note(router, 8)[0] is Origin.NEW, "nothing was written for this one"
        router._running().reads.wait = PATIENCE
        assert note(router, 7) == (Origin.NEW, "held up")


@contextmanager
def held(migration: Migration) -> Iterator[None]:
    """Keep replay from writing; readers don't wait."""
    with migration.new.transaction():
        migration.new.execute("LOCK TABLE ledgers IN SHARE MODE")
        yield


def by_own_session(migration: Migration, user: int, text: str) -> None:
    migration.old.execute("UPDATE accounts SET note = %s WHERE id = %s", [text, user])


def test_a_block_that_fails_after_its_commit_is_counted_as_a_write(moved: Migration) -> None:
    with following(moved), routed(moved) as router:
        advance(moved, 100)
        opened(router)
        router._running().reads.wait = 0.2
        with held(moved):
            with pytest.raises(ZeroDivisionError), router.route(context=7) as place:  # noqa: PT012 - it commits, then fails
                by_own_session(moved, 7, "committed")
                place.epoch // 0
            assert note(router, 7) == (Origin.OLD, "committed")
            assert note(router, 8)[0] is Origin.NEW
        router._running().reads.wait = PATIENCE
        write(router, 8, "later", context=8)
        assert note(router, 7) == (Origin.NEW, "committed")


def test_what_fails_after_a_commit_does_not_reach_the_caller(moved: Migration) -> None:
    with following(moved), routed(moved) as router:
        advance(moved, 100)
        opened(router)
        lenders = router._running()._lenders
        lent = lenders[Origin.OLD]
        lenders[Origin.OLD] = ConnectionPool(moved.spec.source.dsn.resolve(), open=False).connection
        with held(moved):
            assert router.rerun(lambda place: by_own_session(moved, 7, "done"), context=7) is None
            with router.route(context=8):
                by_own_session(moved, 8, "done")
            lenders[Origin.OLD] = lent
            assert [note(router, user) for user in (7, 8)] == [(Origin.OLD, "done")] * 2
            called: list[Any] = []
            with pytest.raises(TypeError, match="context= is list"):
                router.rerun(called.append, context=[7])  # type: ignore[arg-type]
            assert called == []


def test_what_is_written_while_reads_are_closed_counts_when_they_open_again(moved: Migration) -> None:
    with following(moved), routed(moved) as router, Ledger.open(moved.spec, "test") as ledger:

        def stop(reason: str | None) -> None:
            ledger.connection.execute("UPDATE changeover.load SET stopped = %s", [reason])

        advance(moved, 100)
        opened(router)
        reads = router._running().reads
        reads.wait = 0.2
        with held(moved):
            stop("test")
            wait_until(lambda: not reads.open, PATIENCE)
            assert router.reading(context=8).origin is Origin.OLD, "its table goes no further"
            write(router, 7, "meanwhile", context=7)
            stop(None)
            wait_until(lambda: reads.open, PATIENCE)
            assert note(router, 7) == (Origin.OLD, "meanwhile")
        reads.wait = PATIENCE
        assert note(router, 7) == (Origin.NEW, "meanwhile")


def test_tables_that_are_begun_anew_are_not_read(moved: Migration) -> None:
    with routed(moved) as router:
        with following(moved):
            advance(moved, 100)
            opened(router)
        restart(moved.spec, moved.spark)
        follower = router._running().follower
        assert isinstance(follower, LedgerFollower)
        with following(moved), Ledger.open(moved.spec, "test") as ledger:
            wait_until(lambda: ledger.is_connected("replay"), PATIENCE)
            assert note(router, 7) == (Origin.OLD, "n7")
            assert ledger.reads() == 0
            ledger.record_flag(None, 100)  # nor by a record that says so
            seen = follower._looks
            wait_until(lambda: follower._looks > seen + 20, PATIENCE)
            assert note(router, 7) == (Origin.OLD, "n7")


def test_a_rollout_that_is_not_on_record_moves_nobody(moved: Migration) -> None:
    with following(moved), routed(moved) as router:
        flagfile.write_reads(moved.spec.work / "flags.json", FLAG, 50)
        wait_until(lambda: any(served(router, str(user)) for user in range(100)), PATIENCE)
        shown = CliRunner().invoke(main, ["flags", "show", moved.spec.path])
        line = "reads: 50 % of contexts are served live, which is not on record: they read the old store until"
        assert f"{line} `changeover flags advance --reads 50`" in shown.stdout
        assert {router.reading(context=user).origin for user in range(100)} == {Origin.OLD}
        advance(moved, 50)
        wait_until(lambda: any(router.reading(context=user).origin is Origin.NEW for user in range(100)), PATIENCE)
        cutover.rollback(moved.spec)  # every switch ends it, whatever the flag serves then
        flagfile.write_reads(moved.spec.work / "flags.json", FLAG, 50)
        wait_until(lambda: {router.reading(context=user).origin for user in range(100)} == {Origin.OLD}, PATIENCE)


def test_what_stands_against_it_is_said(moved: Migration, make_migration: MakeMigration) -> None:
    def said(*words: str, command: str = "advance") -> tuple[int, str]:
        done = CliRunner().invoke(main, ["flags", command, moved.spec.path, *words])
        return done.exit_code, done.stderr

    code, stderr = said("--reads", "10")
    assert code == 1, stderr
    assert "never verified" in stderr
    assert "reverse" not in stderr
    assert said("--reads", "10", "--tenant", "7")[0] == 2
    assert said("--reads", "101")[0] == 2
    assert "are served" not in said("--reads", "0", command="rollback")[1]
    with pytest.raises(Refused, match="0 % of contexts have moved"):
        cutover.rollback(moved.spec, reads=0)
    switch(moved, Stage.DUALWRITE)
    with pytest.raises(Refused, match="at the stage shadow, and this is dualwrite"):
        advance(moved, 10)
    with routed(moved) as router, pytest.raises(TypeError, match="context= is list"):
        router.reading(context=[7])  # type: ignore[arg-type]
    with routed(moved) as router:
        assert router.reading(context=uuid.uuid4()).origin is Origin.OLD


def test_with_trigger_capture_a_read_waits_for_its_writes_too(make_migration: MakeMigration) -> None:
    made = loaded(make_migration, STORE, kind="trigger")
    with following(made), routed(made) as router:
        advance(made, 100)
        opened(router)
        for number in range(5):  # at rest but for these, so that capture is asked for each tick
            assert write(router, 7, f"n{number}", context=7) is Origin.OLD
            assert note(router, 7) == (Origin.NEW, f"n{number}")
