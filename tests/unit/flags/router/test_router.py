"""The router: authority first and alone on the caller's thread, whatever the other store, the flag or a fence do."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from ldclient import LDClient
from ldclient.migrations.types import Origin, Stage

from changeover import spec
from changeover.errors import AuthorityMoving, LockNotGranted, ServerUnavailable, SpecError
from changeover.flags import flagfile
from changeover.flags.mirror.change import Change, TableMapping
from changeover.flags.mirror.mirror import Mirror
from changeover.flags.router.desired import EVERYONE, FlagStage
from changeover.flags.router.endpoint import Cursor, PgEndpoint
from changeover.flags.router.follower import LedgerAuthority
from changeover.flags.router.router import RoutedStore, Router
from changeover.flags.router.runtime import Limits
from changeover.flags.shadow.judge import LAG_WAITS
from changeover.flags.stages import FENCED, TABLE, next_stage
from tests.support.fix_flags import FOLLOWS, PATIENCE, PATIENT, Follow, FollowRead, MakeRouter, Stores, wait_until, wrote

FLAG = "follows-store"
SetStage = Callable[[Router, Stage], None]


@pytest.fixture
def follow(make_follow: Callable[..., Follow]) -> Follow:
    return make_follow(1)


def put(router: Router, follow: Follow) -> Any:
    return wrote(router, follow.put_old, follow.put_new)


def drop(router: Router, follow: Follow) -> Any:
    return wrote(router, follow.drop_old, follow.drop_new)


def find(router: Router, follow: Follow) -> Any:
    return router.compare(old=follow.find_old, new=follow.find_new, experiment=FollowRead())


@pytest.mark.parametrize("stage", list(Stage))
def test_each_stage_writes_and_mirrors_as_the_table_says(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow, stage: Stage
) -> None:
    rule = TABLE[stage]
    if rule.writes is Origin.NEW:
        stores.fence_to_new()
    stores.record(stage)
    router = make_router()
    set_stage(router, stage)
    written = put(router, follow)
    assert router.drain(PATIENCE)
    assert (written.origin, written.stage, written.mirrored) == (rule.writes, stage, rule.mirrors)
    assert written.changes
    for origin in Origin:
        expected = [(1, 1, "hello")] if origin is rule.writes or rule.mirrors else []
        assert stores.rows(origin) == expected
    drop(router, follow)
    assert router.drain(PATIENCE)
    assert stores.rows(Origin.OLD) == stores.rows(Origin.NEW) == []
    if rule.mirrors:
        assert written.version.epoch == (0 if rule.writes is Origin.OLD else 1)
        assert written.version.ordinal == -1


@pytest.mark.parametrize("stage", list(Stage))
def test_each_stage_reads_and_compares_as_the_table_says(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow, stage: Stage
) -> None:
    rule = TABLE[stage]
    if rule.writes is Origin.NEW:
        stores.fence_to_new()
    stores.record(stage)
    router = make_router()
    set_stage(router, stage)
    put(router, follow)
    assert router.drain(PATIENCE)
    rows = find(router, follow)
    assert ("from_user" in rows[0]) is (rule.reads is Origin.OLD)
    assert router.drain(PATIENCE)
    counters = router.counters()["comparisons"]
    assert (counters["compared"], counters["matched"], router.mismatches) == (rule.compares, rule.compares, [])


def test_a_position_is_that_of_the_transaction_that_wrote(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow
) -> None:
    router = make_router()
    set_stage(router, Stage.DUALWRITE)
    versions = []
    for _ in range(20):
        before = insert_lsn(stores)
        versions.append(put(router, follow).version)
        assert before < versions[-1].lsn <= insert_lsn(stores)
    assert versions == sorted(set(versions))
    assert router.drain(PATIENCE)
    assert router.counters()["mirror_new"]["refused_by_gate"] == 0


def insert_lsn(stores: Stores) -> int:
    row = stores.old.execute("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint").fetchone()
    assert row is not None
    return int(row[0])


def test_a_failed_write_rolls_back_reaches_the_caller_and_is_not_mirrored(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow
) -> None:
    router = make_router()
    set_stage(router, Stage.DUALWRITE)

    def fail(cursor: Cursor) -> list[Change]:
        follow.put_old(cursor)
        cursor.execute("SELECT 1 / 0")
        return []

    with pytest.raises(psycopg.errors.DivisionByZero):
        wrote(router, fail, follow.put_new)
    with pytest.raises(TypeError, match="list of Change"):
        wrote(router, lambda cursor: None, follow.put_new)  # type: ignore[arg-type, return-value]
    assert router.drain(PATIENCE)
    assert stores.rows(Origin.OLD) == stores.rows(Origin.NEW) == []


def test_after_a_commit_of_unknown_outcome_nothing_is_mirrored(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow, make_follow: Callable[..., Follow]
) -> None:
    stores.old.execute(
        "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(1); RETURN NULL; END $$;"
        "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON public.follows DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " EXECUTE FUNCTION die()"
    )
    router = make_router()
    set_stage(router, Stage.DUALWRITE)
    with pytest.raises(psycopg.OperationalError):
        put(router, follow)
    stores.old.execute("DROP TRIGGER die ON public.follows")
    put(router, make_follow(2))
    assert router.drain(PATIENCE)
    assert stores.rows(Origin.NEW) == [(2, 1, "hello")]


def test_a_session_without_durable_commits_commits_durably_where_it_is_mirrored(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow
) -> None:
    name = psycopg.sql.Identifier(stores.old.info.dbname)
    stores.old.execute(psycopg.sql.SQL("ALTER DATABASE {} SET synchronous_commit = off").format(name))
    stores.old.execute(
        "CREATE TABLE seen (setting text);"
        "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$;"
        "CREATE CONSTRAINT TRIGGER look AFTER INSERT ON public.follows DEFERRABLE INITIALLY DEFERRED FOR EACH ROW"
        " EXECUTE FUNCTION look()"
    )
    router = make_router()
    put(router, follow)
    drop(router, follow)
    set_stage(router, Stage.DUALWRITE)
    put(router, follow)
    assert stores.old.execute("SELECT setting FROM seen").fetchall() == [("off",), ("on",)]


@contextmanager
def locked(connection: Any, table: str) -> Iterator[None]:
    connection.execute(psycopg.sql.SQL("BEGIN; LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(psycopg.sql.SQL(table)))
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


def test_a_slow_other_store_does_not_slow_the_caller(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, make_follow: Callable[..., Follow]
) -> None:
    router = make_router()
    set_stage(router, Stage.SHADOW)
    put(router, make_follow(0))
    assert router.drain(PATIENCE)
    with locked(stores.new, "public.associations"):  # until all of them are through: who waited for it would fail at a deadline
        for user in range(1, 21):
            put(router, make_follow(user))
            find(router, make_follow(user))
        assert router.counters()["mirror_new"]["failed"] == router.counters()["comparisons"]["errors"] == 0
    assert router.drain(PATIENCE)
    assert len(stores.rows(Origin.NEW)) == 21
    assert router.counters()["comparisons"]["matched"] == 20


def test_an_unreachable_new_store_hurts_no_caller(
    stores: Stores,
    flag_client: LDClient,
    set_stage: SetStage,
    flag_file: Path,
    follow: Follow,
    eventually: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    nowhere = "host=127.0.0.1 port=1 dbname=none user=none"
    router = Router(
        old=stores.endpoint(Origin.OLD), new=PgEndpoint(nowhere), mirrored=[FOLLOWS], stage=FlagStage(flag_client, FLAG),
        authority=LedgerAuthority(nowhere, "follows"),
        limits=Limits(mirror_deadline=0.2),
    )  # fmt: skip
    with router, caplog.at_level(logging.WARNING, "changeover.flags"):
        set_stage(router, Stage.SHADOW)
        assert put(router, follow).mirrored
        assert len(find(router, follow)) == 1
        assert router.drain(PATIENCE)
        assert router.counters()["mirror_new"]["failed"] == 1
        assert router.counters()["comparisons"]["errors"] == 1
        flagfile.write_stage(flag_file, FLAG, Stage.LIVE)
        eventually(lambda: flag_client.variation(FLAG, EVERYONE, None) == "live")
        with pytest.raises(ServerUnavailable, match="isn't known whether"):
            put(router, follow)
    assert any("ledger can't be read" in message for message in caplog.messages)


def test_the_wish_waits_for_the_fact_both_ways(
    stores: Stores,
    make_router: MakeRouter,
    set_stage: SetStage,
    flag_file: Path,
    flag_client: LDClient,
    eventually: Callable[..., None],
    follow: Follow,
) -> None:
    router = make_router()
    set_stage(router, Stage.SHADOW)
    for desired in (Stage.LIVE, Stage.RAMPDOWN, Stage.COMPLETE):
        flagfile.write_stage(flag_file, FLAG, desired)
        eventually(lambda desired=desired: flag_client.variation(FLAG, EVERYONE, None) == desired.value)
        assert router.stage is Stage.SHADOW
        assert put(router, follow).origin is Origin.OLD
    stores.fence_to_new()
    for recorded in (Stage.LIVE, Stage.RAMPDOWN, Stage.COMPLETE):  # it was switched in the console, and no evidence was asked for
        eventually(lambda recorded=recorded: router.stage is recorded)
        stores.record(next_stage(recorded) or recorded)
    for desired in (Stage.SHADOW, Stage.DUALWRITE, Stage.OFF):
        flagfile.write_stage(flag_file, FLAG, desired)
        eventually(lambda: router.stage is Stage.LIVE)
        assert put(router, follow).origin is Origin.NEW


def test_a_refused_writer_waits_and_writes_where_authority_then_is(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, flag_file: Path, follow: Follow
) -> None:
    router = make_router()
    set_stage(router, Stage.SHADOW)
    flagfile.write_stage(flag_file, FLAG, Stage.LIVE)
    stores.refuse(Origin.OLD)
    timer = threading.Timer(0.4, stores.fence_to_new_done)
    timer.start()
    started = time.monotonic()
    written = put(router, follow)
    waited = time.monotonic() - started
    timer.join()
    assert written.origin is Origin.NEW
    assert written.stage is Stage.LIVE
    assert waited > 0.3
    assert router.counters()["fence_waits"] == 1
    assert 0.3 < router.counters()["longest_wait_seconds"] <= waited + 0.001
    assert router.drain(PATIENCE)
    assert stores.rows(Origin.OLD) == stores.rows(Origin.NEW) == [(1, 1, "hello")]


def test_a_fence_that_is_called_off_lets_the_writer_go_on_where_it_was(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow
) -> None:
    router = make_router()
    set_stage(router, Stage.SHADOW)
    stores.refuse(Origin.OLD)
    timer = threading.Timer(0.3, stores.allow, (Origin.OLD,))
    timer.start()
    assert put(router, follow).origin is Origin.OLD
    timer.join()


def test_a_fence_without_end_is_an_error_after_max_pause(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow
) -> None:
    router = make_router(limits=replace(PATIENT, max_pause=0.3))
    set_stage(router, Stage.SHADOW)
    stores.refuse(Origin.OLD)
    started = time.monotonic()
    with pytest.raises(LockNotGranted, match="no write authority within the limit") as raised:
        put(router, follow)
    assert 0.3 <= time.monotonic() - started < PATIENCE / 2
    assert isinstance(raised.value.__cause__, psycopg.Error)
    assert raised.value.__cause__.sqlstate == FENCED
    assert stores.rows(Origin.OLD) == []


def test_reverse_replication_is_the_same(
    stores: Stores,
    make_router: MakeRouter,
    set_stage: SetStage,
    flag_file: Path,
    follow: Follow,
    make_follow: Callable[..., Follow],
) -> None:
    stores.fence_to_new()
    router = make_router()
    set_stage(router, Stage.LIVE)
    put(router, follow)
    assert router.drain(PATIENCE)
    stores.refuse(Origin.NEW)
    flagfile.write_stage(flag_file, FLAG, Stage.SHADOW)
    stores.allow(Origin.OLD)
    timer = threading.Timer(0.2, stores.move, (2, "old"))
    timer.start()
    written = put(router, make_follow(2))
    timer.join()
    assert (written.origin, written.stage, written.version.epoch) == (Origin.OLD, Stage.SHADOW, 2)
    assert router.drain(PATIENCE)
    assert stores.rows(Origin.OLD) == stores.rows(Origin.NEW) == [(1, 1, "hello"), (2, 1, "hello")]


def test_no_write_is_lost_or_doubled_when_authority_moves_under_load(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, flag_file: Path, make_follow: Callable[..., Follow],
    eventually: Callable[..., None],
) -> None:  # fmt: skip
    routers = [make_router(process=f"p{number}") for number in range(2)]
    for router in routers:
        set_stage(router, Stage.SHADOW)
    acknowledged: list[list[tuple[int, Origin]]] = [[] for _ in range(4)]
    stop = threading.Event()

    def work(number: int) -> None:
        user = number
        while not stop.is_set():
            acknowledged[number].append((user, put(routers[number % 2], make_follow(user)).origin))
            user += 4

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]

    def written(origin: Origin) -> int:
        return sum(where is origin for one in acknowledged for _, where in one)

    for thread in threads:
        thread.start()
    eventually(lambda: written(Origin.OLD) > 40)
    flagfile.write_stage(flag_file, FLAG, Stage.LIVE)
    stores.refuse(Origin.OLD)
    frozen = len(stores.rows(Origin.OLD))
    time.sleep(0.2)
    assert len(stores.rows(Origin.OLD)) == frozen
    stores.fence_to_new_done()
    eventually(lambda: written(Origin.NEW) > 40)
    stop.set()
    for thread in threads:
        thread.join()
    assert all(router.drain(PATIENCE) for router in routers)
    by_origin = {o: {user for list_ in acknowledged for user, origin in list_ if origin is o} for o in Origin}
    assert by_origin[Origin.OLD]
    assert by_origin[Origin.NEW]
    assert len(by_origin[Origin.OLD]) == frozen
    everyone = by_origin[Origin.OLD] | by_origin[Origin.NEW]
    assert {row[0] for row in stores.rows(Origin.OLD)} == {row[0] for row in stores.rows(Origin.NEW)} == everyone


def test_a_deadlock_on_the_authority_is_tried_again(
    stores: Stores, make_router: MakeRouter, make_follow: Callable[..., Follow]
) -> None:
    router = make_router()
    for user in (1, 2):
        put(router, make_follow(user))
    both = threading.Barrier(2, timeout=PATIENCE)

    def cross(first: int, second: int) -> None:
        met = False

        def write(cursor: Cursor) -> list[Change]:
            nonlocal met
            changes = make_follow(first, note="crossed").put_old(cursor)
            if not met:
                met = True
                both.wait()
            return changes + make_follow(second, note="crossed").put_old(cursor)

        wrote(router, write, write)

    threads = [threading.Thread(target=cross, args=pair) for pair in ((1, 2), (2, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert router.counters()["retries"] >= 1
    assert {row[2] for row in stores.rows(Origin.OLD)} == {"crossed"}


def test_a_request_keeps_its_stage(
    make_router: MakeRouter, set_stage: SetStage, flag_file: Path, follow: Follow, flag_client: LDClient,
    eventually: Callable[..., None],
) -> None:  # fmt: skip
    router = make_router()
    set_stage(router, Stage.DUALWRITE)
    with router.pinned() as stage:
        assert stage is Stage.DUALWRITE
        flagfile.write_stage(flag_file, FLAG, Stage.OFF)
        eventually(lambda: flag_client.variation(FLAG, EVERYONE, None) == "off")
        assert put(router, follow).stage is Stage.DUALWRITE
    assert put(router, follow).stage is Stage.OFF


def test_a_request_that_read_before_a_fence_is_run_anew(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow
) -> None:
    router = make_router()
    set_stage(router, Stage.SHADOW)
    with router.pinned():
        stores.fence_to_new()
        with pytest.raises(AuthorityMoving, match="run the request again from its first read"):
            put(router, follow)
    assert stores.rows(Origin.OLD) == stores.rows(Origin.NEW) == []
    with router.pinned() as stage:
        assert put(router, follow).stage is stage is Stage.LIVE
        assert "subject" in find(router, follow)[0]


def test_a_mismatch_of_the_stores_is_kept_and_a_late_mirror_is_none(
    stores: Stores,
    make_router: MakeRouter,
    set_stage: SetStage,
    make_follow: Callable[..., Follow],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[bool] = []
    under_way = Mirror.under_way

    def recorded(still: Callable[[], bool]) -> bool:
        told.append(still())
        return told[-1]

    monkeypatch.setattr(Mirror, "under_way", lambda mirror: partial(recorded, under_way(mirror)))
    router = make_router()
    set_stage(router, Stage.SHADOW)
    with stores.new.transaction():
        stores.new.execute("LOCK TABLE public.associations IN SHARE MODE")  # reads pass, and the mirror waits
        put(router, make_follow(1))
        find(router, make_follow(1))
        wait_until(lambda: len(told) > 2 * len(LAG_WAITS))  # more looks than there are, none of which counts
        assert all(told)
    assert router.drain(PATIENCE)
    assert router.counters()["comparisons"]["matched"] == 1
    stores.new.execute('UPDATE public.associations SET attributes = \'{"note": "spoilt"}\'')
    find(router, make_follow(1))
    assert router.drain(PATIENCE)
    assert router.counters()["comparisons"]["mismatched"] == 1
    assert router.mismatches[0].candidate.value[0]["attributes"] == {"note": "spoilt"}


def test_heartbeats_say_the_effective_stage(
    stores: Stores,
    make_router: MakeRouter,
    set_stage: SetStage,
    flag_file: Path,
    eventually: Callable[..., None],
    follow: Follow,
) -> None:
    router = make_router(process="web-1")
    set_stage(router, Stage.SHADOW)
    put(router, follow)
    flagfile.write_stage(flag_file, FLAG, Stage.LIVE)
    eventually(lambda: [(b.stage, b.epoch) for b in stores.ledger.heartbeats()] == [("shadow", 0)])
    assert stores.ledger.heartbeats()[0].process.startswith(f"web-1:{os.getpid()}.")
    stores.fence_to_new()
    eventually(lambda: [(b.stage, b.epoch) for b in stores.ledger.heartbeats()] == [("live", 1)])
    router.close()
    counters = stores.ledger.heartbeats()[0].counters
    assert counters["mirror_new"]["applied"] == 1
    assert "hello" not in json.dumps(counters)


def test_a_restart_by_the_same_name_leaves_on_record_what_was_counted_before(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, make_follow: Callable[..., Follow]
) -> None:
    for user in (1, 2):
        router = make_router(process="web-1")
        set_stage(router, Stage.DUALWRITE)
        put(router, make_follow(user))
        router.close()
    beats = stores.ledger.heartbeats()
    assert [beat.counters["mirror_new"]["applied"] for beat in beats] == [1, 1]


def test_what_came_of_reads_counts_from_nothing_again_at_each_stage(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow, eventually: Callable[..., None]
) -> None:
    def at_stage() -> dict[str, Any]:
        found: dict[str, Any] = stores.ledger.heartbeats()[0].counters["comparisons"]["at_stage"]
        return found

    router = make_router()
    set_stage(router, Stage.SHADOW)
    put(router, follow)
    assert router.drain(PATIENCE)
    stores.new.execute('UPDATE public.associations SET attributes = \'{"note": "spoilt"}\'')
    eventually(lambda: stores.ledger.heartbeats() and at_stage()["stage"] == "shadow")
    find(router, follow)
    assert router.drain(PATIENCE)
    eventually(
        lambda: at_stage() == {"stage": "shadow", "compared": 1, "matched": 0, "mismatched": 1, "ignored": 0, "inconclusive": 0}
    )
    set_stage(router, Stage.DUALWRITE)
    eventually(lambda: at_stage()["stage"] == "dualwrite")
    put(router, follow)
    set_stage(router, Stage.SHADOW)
    eventually(lambda: at_stage()["stage"] == "shadow")
    find(router, follow)
    assert router.drain(PATIENCE)
    eventually(
        lambda: at_stage() == {"stage": "shadow", "compared": 1, "matched": 1, "mismatched": 0, "ignored": 0, "inconclusive": 0}
    )
    assert router.counters()["comparisons"]["mismatched"] == 1, "of the whole process"


def test_a_restart_without_a_flag_goes_on_from_the_last_heartbeat(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, flag_file: Path, tmp_path: Path
) -> None:
    stores.fence_to_new()
    stores.record(Stage.COMPLETE)
    router = make_router()
    set_stage(router, Stage.COMPLETE)
    router.close()
    client = flagfile.client(tmp_path / "gone.json")
    restarted = Router(
        old=stores.endpoint(Origin.OLD),
        new=stores.endpoint(Origin.NEW),
        mirrored=[FOLLOWS],
        stage=FlagStage(client, FLAG),
        authority=LedgerAuthority(stores.new_dsn, "follows"),
    )
    with restarted:
        assert restarted.stage is Stage.COMPLETE
        assert restarted.counters()["alarms"] > 0
    client.close()  # type: ignore[no-untyped-call]


def test_a_forked_child_follows_with_threads_and_sessions_of_its_own(
    stores: Stores,
    make_router: MakeRouter,
    set_stage: SetStage,
    make_follow: Callable[..., Follow],
    eventually: Callable[..., None],
    flag_file: Path,
    in_child: Callable[[Callable[[], object]], AbstractContextManager[None]],
) -> None:
    router = make_router()
    set_stage(router, Stage.DUALWRITE)
    put(router, make_follow(1))

    def work() -> None:
        assert put(router, make_follow(2)).mirrored
        eventually(lambda: router.stage is Stage.OFF)
        assert not put(router, make_follow(3)).mirrored
        assert router.drain(PATIENCE)
        assert router.counters()["mirror_new"]["applied"] == 1
        router.close()

    with in_child(work):
        eventually(lambda: (2, 1, "hello") in stores.rows(Origin.OLD))
        flagfile.write_stage(flag_file, FLAG, Stage.OFF)
    eventually(lambda: router.stage is Stage.OFF)
    assert not put(router, make_follow(4)).mirrored
    assert router.drain(PATIENCE)
    assert [row[0] for row in stores.rows(Origin.OLD)] == [1, 2, 3, 4]
    assert [row[0] for row in stores.rows(Origin.NEW)] == [1, 2]
    assert len({beat.process for beat in stores.ledger.heartbeats()}) == 2


def test_routers_that_share_a_client_start_it_once_in_a_forked_child(
    make_router: MakeRouter, flag_client: LDClient, monkeypatch: pytest.MonkeyPatch,
    in_child: Callable[[Callable[[], object]], AbstractContextManager[None]],
) -> None:  # fmt: skip
    routers, started, postfork = [make_router(mirrors=False) for _ in range(3)], [], flag_client.postfork

    def counted() -> None:
        started.append(os.getpid())
        postfork()

    monkeypatch.setattr(flag_client, "postfork", counted)

    def work() -> None:
        assert [router.stage for router in routers] == [Stage.OFF] * 3
        assert started == [os.getpid()]

    with in_child(work):
        pass
    assert started == []


def test_a_session_that_the_server_closed_is_not_handed_out(
    stores: Stores, make_router: MakeRouter, make_follow: Callable[..., Follow]
) -> None:
    router = make_router()
    put(router, make_follow(1))
    assert stores.end_router_sessions(Origin.OLD) == 1
    put(router, make_follow(2))
    assert len(stores.rows(Origin.OLD)) == 2


class OnePool:
    """A pool of one session in another isolation level, as an application may have."""

    def __init__(self, dsn: str) -> None:
        self.session = psycopg.connect(dsn)
        self.session.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """Lend it, and commit afterwards."""
        yield self.session
        self.session.commit()


def test_an_applications_pool_is_used_and_left_as_it_was(stores: Stores, flag_client: LDClient, follow: Follow) -> None:
    pool = OnePool(stores.old_dsn)
    levels = []

    def write(cursor: Cursor) -> list[Change]:
        levels.append(cursor.execute("SHOW transaction_isolation").fetchone())
        return follow.put_old(cursor)

    router = Router(
        old=PgEndpoint(stores.old_dsn, pool=pool),
        new=stores.endpoint(Origin.NEW),
        mirrored=[FOLLOWS],
        stage=FlagStage(flag_client, FLAG),
    )
    with router, pool.session:
        wrote(router, write, follow.put_new)
        assert len(find(router, follow)) == 1
        assert pool.session.isolation_level is psycopg.IsolationLevel.REPEATABLE_READ
        pool.session.execute("SELECT 1")
        with pytest.raises(RuntimeError, match="outside a transaction"):
            wrote(router, write, follow.put_new)
    assert levels == [("read committed",)]


def test_a_unit_that_is_not_mirrored_keeps_its_sessions_isolation(stores: Stores, flag_client: LDClient) -> None:
    pool = OnePool(stores.old_dsn)
    router = Router(
        old=PgEndpoint(stores.old_dsn, pool=pool), new=stores.endpoint(Origin.NEW), stage=FlagStage(flag_client, FLAG)
    )  # fmt: skip
    with router, pool.session, router.write() as store:
        assert store.execute("SHOW transaction_isolation").fetchone() == ("repeatable read",)


def test_a_mirrored_row_has_all_its_digits_in_an_applications_pool(
    stores: Stores, flag_client: LDClient, set_stage: SetStage, follow: Follow
) -> None:
    pool, seen = OnePool(stores.old_dsn), []
    pool.session.execute("SET extra_float_digits = -5")
    pool.session.commit()

    def write(cursor: Cursor) -> list[Change]:
        seen.append(cursor.execute("SELECT 1 / 3.0::double precision").fetchone())
        return follow.put_old(cursor)

    router = Router(
        old=PgEndpoint(stores.old_dsn, pool=pool),
        new=stores.endpoint(Origin.NEW),
        mirrored=[FOLLOWS],
        stage=FlagStage(flag_client, FLAG),
    )
    with router, pool.session:
        set_stage(router, Stage.DUALWRITE)
        assert wrote(router, write, follow.put_new).mirrored
        assert pool.session.execute("SHOW extra_float_digits").fetchone() == ("-5",)
    assert seen == [(1 / 3,)]


def test_without_a_ledger_it_follows_the_flag_and_says_once_that_nothing_is_fenced(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "changeover.flags"):
        router = make_router(ledger=False)
        set_stage(router, Stage.LIVE)
        assert put(router, follow).origin is Origin.NEW
    assert sum("nothing is fenced" in message for message in caplog.messages) == 1


def test_a_closed_router_says_so(make_router: MakeRouter, follow: Follow) -> None:
    router = make_router()
    put(router, follow)
    router.close()
    with pytest.raises(RuntimeError, match="the router is closed"):
        put(router, follow)


def test_a_store_that_does_not_answer_is_an_error_in_time(stores: Stores, make_router: MakeRouter, follow: Follow) -> None:
    router = make_router(limits=replace(PATIENT, deadline=0.3))
    with pytest.raises(psycopg.errors.QueryCanceled), router.read() as store:
        store.execute("SELECT pg_sleep(600)")
    with locked(stores.old, "public.follows"), pytest.raises((psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled)):
        put(router, follow)
    assert put(router, follow).origin is Origin.OLD


def test_a_block_is_one_transaction_of_any_statements(stores: Stores, make_router: MakeRouter, set_stage: SetStage) -> None:
    stores.old.execute("CREATE TABLE notes (note text)")
    router = make_router()
    set_stage(router, Stage.SHADOW)
    with router.write() as store:
        store.execute("INSERT INTO follows (from_user, to_channel) VALUES (1, 1), (2, 1)")
        with store.connection.cursor() as more:
            more.execute("INSERT INTO notes VALUES (%s)", [store.of("old", "new")])
        with pytest.raises(psycopg.errors.UniqueViolation), store.connection.transaction():
            store.execute("INSERT INTO follows (from_user, to_channel) VALUES (1, 1)")
    with pytest.raises(psycopg.errors.DivisionByZero), router.write() as store:
        store.execute("DELETE FROM follows").execute("SELECT 1 / 0")
    with router.read() as store:
        assert store.execute("SELECT from_user, (SELECT note FROM notes) FROM follows ORDER BY 1").fetchall() == [
            (1, "old"), (2, "old"),
        ]  # fmt: skip


def test_a_unit_that_can_not_be_committed_is_never_taken_for_one_that_was(
    stores: Stores, make_router: MakeRouter, follow: Follow
) -> None:
    router = make_router()

    def swallow(store: RoutedStore) -> str:
        with suppress(psycopg.Error):
            store.execute("SELECT 1 / 0")
        return "done"

    def give_up(store: RoutedStore) -> str:
        follow.put_old(store.cursor)
        raise psycopg.Rollback

    with pytest.raises(psycopg.errors.InFailedSqlTransaction, match="its error was caught, so nothing can be committed"):
        router.run(swallow)
    with pytest.raises(psycopg.Rollback):
        router.run(give_up)
    with pytest.raises(psycopg.Rollback), router.write() as store:
        give_up(store)
    assert stores.rows(Origin.OLD) == []
    assert router.counters()["writes"] == 0


def test_a_block_that_a_fence_refuses_raises_and_the_next_one_goes_where_authority_is(
    stores: Stores, make_router: MakeRouter, set_stage: SetStage, follow: Follow, eventually: Callable[..., None]
) -> None:
    router = make_router()
    set_stage(router, Stage.SHADOW)
    stores.refuse(Origin.OLD)
    with pytest.raises(AuthorityMoving, match="write authority is moving") as raised, router.write() as store:
        follow.put_old(store.cursor)
    assert raised.value.transient
    stores.fence_to_new_done()
    eventually(lambda: router.stage is Stage.LIVE)
    with router.write() as store:
        store.mirror(store.of(follow.put_old, follow.put_new)(store.cursor))
    assert (stores.rows(Origin.OLD), stores.rows(Origin.NEW)) == ([], [(1, 1, "hello")])


SPEC = """
name = "follows"
[source]
dsn = "env:OLD_DSN"
[target.new]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "public.follows"
target = "public.associations"
key = ["subject", "object"]
[work]
path = "work"
"""


def test_a_router_comes_from_a_spec(
    stores: Stores, flag_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, follow: Follow, eventually:
    Callable[..., None], mappings: dict[str, TableMapping],
) -> None:  # fmt: skip
    monkeypatch.setenv("OLD_DSN", stores.old_dsn)
    monkeypatch.setenv("NEW_DSN", stores.new_dsn)
    path = tmp_path / "follows.toml"
    path.write_text(SPEC)
    with pytest.raises(SpecError, match="flag: is missing"):
        Router.connect(spec.load(path))
    flag = f'{SPEC}[flag]\nkey = "{FLAG}"\ntarget = "new"\nfile = "{flag_file}"\n'
    path.write_text(flag)
    with pytest.raises(SpecError, match=r"flag.mirror: is 'stream', so nothing needs mappings"):
        Router.connect(spec.load(path), mappings=mappings)
    with Router.connect(spec.load(path)) as plain:
        assert not put(plain, follow).mirrored
        drop(plain, follow)
    path.write_text(f'{flag}mirror = "application"\n')
    with pytest.raises(SpecError, match="the router needs a TableMapping for each table, and has none for public"):
        Router.connect(spec.load(path))
    flagfile.write_stage(flag_file, FLAG, Stage.DUALWRITE)
    with Router.connect(spec.load(path), mappings=mappings) as router:
        assert put(router, follow).mirrored
        assert router.drain(PATIENCE)
        stores.fence_to_new()
        flagfile.write_stage(flag_file, FLAG, Stage.LIVE)
        eventually(lambda: router.stage is Stage.LIVE)
        drop(router, follow)
        assert router.drain(PATIENCE)
        assert router.counters()["mirror_old"]["applied"] == 1
    assert stores.rows(Origin.OLD) == stores.rows(Origin.NEW) == []
