"""Recheck once authority has moved, while an application mirrors its writes: judged by queues and streams, never by seconds."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.flags import flagfile
from changeover.flags.fence.fence import fence
from changeover.flags.mirror.change import TableMapping
from changeover.flags.router.router import Router, returned
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.reverse import path as reverse
from changeover.session import connect
from changeover.verifiers.compare.verdict import Verdict
from changeover.verifiers.passage import Queues
from changeover.verifiers.verification import verify
from tests.scenarios.test_recheck import repeated
from tests.scenarios.test_tenants import FLAG, FOLLOWS, SPEC
from tests.scenarios.test_verify_tenants import UNREFUSED
from tests.support.fix_accounts import MAX_PAUSE, add, application, following, switch, wait_for_writes
from tests.support.fix_flags import PATIENT, wait_until
from tests.support.fix_migration import STORE, MakeMigration, Migration


def at_new(migration: Migration) -> None:
    with following(migration):
        fence(migration.spec, Origin.NEW)
    switch(migration, Stage.LIVE)


def damage(migration: Migration) -> None:
    """Write a row behind the refusal's back, as nobody may."""
    migration.old.execute(f"{UNREFUSED}; INSERT INTO accounts VALUES (5000, 0, 'behind its back'); RESET changeover.epoch".encode())


def verified(migration: Migration) -> Verdict:
    [verdict] = verify(migration.spec, migration.spark, targets=[STORE])
    return verdict


HELD_BEATS = 16
"""For how many heartbeats a row is locked: longer than two looks take that wait for nothing."""


@contextmanager
def locked(migration: Migration, account: int, until: threading.Event) -> Iterator[None]:
    """Keep a row of the old store from everybody, until `until` and some heartbeats after it."""
    holding, failed = threading.Event(), list[BaseException]()

    def hold() -> None:
        try:
            with (
                connect(migration.spec.source.dsn.resolve(), "test", autocommit=False) as session,
                Ledger.open(migration.spec, "test") as ledger,
            ):
                session.execute("SELECT FROM accounts WHERE id = %s FOR UPDATE", [account])
                holding.set()
                assert until.wait(5 * MAX_PAUSE)
                beats = {beat.at for beat in ledger.heartbeats()}

                def heard() -> bool:
                    beats.update(beat.at for beat in ledger.heartbeats())
                    return len(beats) > HELD_BEATS

                wait_until(heard)
        except BaseException as error:
            failed.append(error)
            holding.set()

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(MAX_PAUSE)
    try:
        yield
    finally:
        until.set()
        thread.join()
    assert not failed, failed


def test_what_a_mirrors_queue_holds_is_waited_for(mirrored: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    at_new(mirrored)
    with Ledger.open(mirrored.spec, "test") as ledger:
        reverse.break_off(ledger, "its slot is gone")  # so that the mirror alone brings anything
    asked, through = threading.Event(), Queues.through
    depths = []

    client = flagfile.client(mirrored.spec.work / "flags.json")
    limits = replace(PATIENT, mirror_deadline=10 * MAX_PAUSE)  # the row stays locked for all of a comparison
    with (
        Router.connect(mirrored.spec, mappings={"accounts": TableMapping(dict, dict)}, client=client, limits=limits) as router,
        mirrored.capturing(),
    ):

        def and_told(queues: Queues) -> None:
            depths.append(router.counters()["mirror_old"]["depth"])
            asked.set()
            through(queues)

        wait_until(lambda: router.stage is Stage.LIVE)
        with locked(mirrored, 7, asked), monkeypatch.context() as patched:
            assert add(router, 7).mirrored
            patched.setattr(Queues, "through", and_told)
            verdict = verified(mirrored)
        assert (verdict.word, verdict.recheck.rechecked, verdict.recheck.in_flight) == ("equal", 1, 1)
        assert depths[0] == 1
        damage(mirrored)
        verdict = verified(mirrored)
    client.close()  # type: ignore[no-untyped-call]
    assert (verdict.word, verdict.recheck.rechecked, verdict.differing_keys) == ("different", 1, 1)
    assert [dict(row["key"]) for row in mirrored.differences(verdict)] == [{"id": "5000"}]


def test_behind_the_fence_the_old_store_may_hold_what_the_new_one_held(mirrored: Migration) -> None:
    at_new(mirrored)
    with mirrored.capturing(), application(mirrored) as router:
        wait_until(lambda: router.stage is Stage.LIVE)
        wait_for_writes(router)
        verdict = verified(mirrored)
        assert (verdict.word, verdict.recheck.hot) == ("equal", 0)
        damage(mirrored)
        verdict = verified(mirrored)
    assert (verdict.word, verdict.differing_keys, verdict.recheck.hot) == ("different", 1, 0)
    assert [dict(row["key"]) for row in mirrored.differences(verdict)] == [{"id": "5000"}]


PUT = "UPDATE {} SET weight = %s WHERE {} = %s AND to_user = %s RETURNING *"


def put(router: Router, tenant: int, other: int, weight: int) -> None:
    """Write a row of a tenant, and have the router mirror it."""
    old, new = PUT.format("friends", "from_user"), PUT.format("links", "member")
    router.run(lambda store: store.mirror(returned(store.execute(store.of(old, new), [weight, tenant, other]))), tenant=tenant)


def test_while_tenants_are_apart_each_key_is_led_by_the_store_of_its_tenant(make_migration: MakeMigration) -> None:
    made = make_migration(f'{SPEC}mirror = "application"\n', FOLLOWS, targets=(STORE,))
    made.old.execute("INSERT INTO friends SELECT u, t, 'n' || t, u FROM generate_series(1, 6) u, generate_series(1, 30) t")
    made.prepare()
    made.backfill()
    flags = made.spec.work / "flags.json"
    flagfile.write_stage(flags, FLAG, Stage.SHADOW)
    with following(made):
        fence(made.spec, Origin.NEW, tenants=["1", "2"], max_pause=MAX_PAUSE)
    flagfile.write_tenants(flags, FLAG, "from_user", ["1", "2"], Stage.LIVE)
    client, numbers = flagfile.client(flags), random.Random(1)
    to_new: Any = lambda row: {"member" if name == "from_user" else name: value for name, value in row.items()}  # noqa: E731
    to_old: Any = lambda row: {"from_user" if name == "member" else name: value for name, value in row.items()}  # noqa: E731
    mappings = {"friends": TableMapping(to_new, to_old)}
    with Router.connect(made.spec, mappings=mappings, client=client, limits=PATIENT) as router:
        wait_until(lambda: router.stage_of(1) is Stage.LIVE and router.stage_of(5) is Stage.SHADOW)
        with (
            made.capturing(),
            repeated(lambda: put(router, numbers.randint(1, 6), numbers.randint(1, 20), numbers.randint(1, 999)), 0.005),
        ):
            wait_for_writes(router, 50)
            verdict = verified(made)
            assert (verdict.word, verdict.recheck.hot) == ("equal", 0)
            assert verdict.recheck.in_flight > 0
            made.new.execute("SET changeover.epoch = '99'; UPDATE links SET note = 'x' WHERE member = 5 AND to_user = 25")
            made.old.execute("SET changeover.epoch = '99'; DELETE FROM friends WHERE from_user = 2 AND to_user = 26")
            verdict = verified(made)
    client.close()  # type: ignore[no-untyped-call]
    found = {(*dict(row["key"]).values(), row["class"]) for row in made.differences(verdict)}
    assert found == {("5", "25", "mismatched"), ("2", "26", "extra")}
    assert verdict.recheck.hot == 0
