"""The router by tenants: each row goes by its own tenant's authority and stage, and never by another's."""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from ldclient import LDClient
from ldclient.migrations.types import Origin, Stage
from psycopg import sql

from changeover import spec
from changeover.errors import AuthorityMoving, Refused, SpecError
from changeover.flags import flagfile
from changeover.flags.observed import Observation
from changeover.flags.router.desired import FlagStage
from changeover.flags.router.endpoint import PgEndpoint
from changeover.flags.router.router import Router, returned
from changeover.position import epoch_floor
from changeover.tenants import Tenants, as_text
from tests.support.fix_flags import FOLLOWS, PATIENCE, Follow, FollowRead, MakeRouter, Stores, wrote

FLAG, KIND = "follows-store", "from_user"
SetStage = Callable[[Router, Stage], None]
MakeFollow = Callable[..., Follow]


def put(router: Router, follow: Follow, tenant: Any = None) -> Any:
    return wrote(router, follow.put_old, follow.put_new, tenant=follow.user if tenant is None else tenant)


def drop(router: Router, follow: Follow) -> Any:
    return wrote(router, follow.drop_old, follow.drop_new, tenant=follow.user)


def find(router: Router, follow: Follow) -> Any:
    return router.compare(old=follow.find_old, new=follow.find_new, experiment=FollowRead(), tenant=follow.user)


@pytest.fixture
def router(make_router: MakeRouter, set_stage: SetStage) -> Router:
    made = make_router(tenants=True)
    set_stage(made, Stage.SHADOW)
    return made


def move_7(stores: Stores, flag_file: Path, router: Router, eventually: Callable[..., None]) -> None:
    """Move one tenant to the new store, as the product does, and turn the flag for it."""
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.LIVE)
    stores.refuse_tenants(Origin.OLD, 1, Tenants(frozenset({"7"}), others=False))
    stores.gate(Origin.OLD, epoch_floor(0))
    stores.move(1, "new", "7")
    eventually(lambda: router.stage_of(7) is Stage.LIVE)


def test_each_row_goes_where_its_tenant_has_authority(
    stores: Stores, router: Router, flag_file: Path, make_follow: MakeFollow, eventually: Callable[..., None]
) -> None:
    before = put(router, make_follow(7))
    assert router.drain(PATIENCE)
    move_7(stores, flag_file, router, eventually)
    seven, eight = put(router, make_follow(7, note="at live")), put(router, make_follow(8))
    assert (before.origin, before.version.epoch) == (Origin.OLD, 0)
    assert (seven.origin, seven.stage, seven.version.epoch) == (Origin.NEW, Stage.LIVE, 1)
    assert (eight.origin, eight.stage, eight.version.epoch) == (Origin.OLD, Stage.SHADOW, 0)
    assert router.stage is Stage.SHADOW
    assert "subject" in find(router, make_follow(7))[0]
    assert "from_user" in find(router, make_follow(8))[0]
    assert router.drain(PATIENCE)
    assert stores.rows(Origin.OLD) == stores.rows(Origin.NEW) == [(7, 1, "at live"), (8, 1, "hello")]
    assert router.mismatches == []


def test_what_reads_of_a_tenant_that_stands_apart_say_counts_at_everybodys_stage(
    stores: Stores, router: Router, flag_file: Path, make_follow: MakeFollow, eventually: Callable[..., None]
) -> None:
    move_7(stores, flag_file, router, eventually)
    put(router, make_follow(7))
    assert router.drain(PATIENCE)
    find(router, make_follow(7))
    assert router.drain(PATIENCE)
    at_stage = router.counters()["comparisons"]["at_stage"]
    assert at_stage == {"stage": "shadow", "compared": 1, "matched": 1, "mismatched": 0, "ignored": 0, "inconclusive": 0}
    stores.new.execute('UPDATE public.associations SET attributes = \'{"note": "spoilt"}\'')
    find(router, make_follow(7))
    assert router.drain(PATIENCE)
    assert router.counters()["comparisons"]["at_stage"]["mismatched"] == 1


def test_heartbeats_have_everybodys_stage_the_newest_epoch_and_no_name(
    stores: Stores, router: Router, flag_file: Path, make_follow: MakeFollow, eventually: Callable[..., None]
) -> None:
    move_7(stores, flag_file, router, eventually)
    put(router, make_follow(7, 765432))
    eventually(lambda: [(b.stage, b.epoch) for b in stores.ledger.heartbeats()] == [("shadow", 1)])
    router.close()
    assert "765432" not in json.dumps(stores.ledger.heartbeats()[0].counters)


def test_the_wish_for_a_tenant_waits_for_its_fact(
    stores: Stores, router: Router, flag_file: Path, make_follow: MakeFollow, eventually: Callable[..., None]
) -> None:
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.LIVE)
    time.sleep(0.3)
    assert router.stage_of(7) is Stage.SHADOW
    assert put(router, make_follow(7)).origin is Origin.OLD
    stores.move(1, "new", "7")
    eventually(lambda: router.stage_of("7") is Stage.LIVE)
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.SHADOW)
    time.sleep(0.3)
    assert router.stage_of(7) is Stage.LIVE, "the new store has authority still"


def test_a_refused_tenant_waits_and_the_others_write_on(
    stores: Stores, router: Router, flag_file: Path, make_follow: MakeFollow
) -> None:
    put(router, make_follow(8))
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.LIVE)
    stores.refuse_tenants(Origin.OLD, 1, Tenants(frozenset({"7"}), others=False))
    timer = threading.Timer(0.4, stores.move, (1, "new", "7"))
    timer.start()
    assert put(router, make_follow(8)).origin is Origin.OLD
    assert router.counters()["fence_waits"] == 0
    written = put(router, make_follow(7))
    timer.join()
    assert (written.origin, written.version.epoch) == (Origin.NEW, 1)
    assert router.counters()["fence_waits"] == 1


def test_a_delete_that_finds_nothing_waits_for_its_tenants_fence_too(
    stores: Stores, router: Router, flag_file: Path, make_follow: MakeFollow
) -> None:
    """Its row may stand in the new store alone by then, written after the move."""
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.LIVE)
    stores.refuse_tenants(Origin.OLD, 1, Tenants(frozenset({"7"}), others=False))
    stores.new.execute("INSERT INTO public.associations VALUES (7, 1, '{}', NULL, now())")
    timer = threading.Timer(0.4, stores.move, (1, "new", "7"))
    timer.start()
    assert drop(router, make_follow(8)).changes == []
    assert router.counters()["fence_waits"] == 0
    assert len(drop(router, make_follow(7)).changes) == 1
    timer.join()
    assert router.counters()["fence_waits"] == 1


@pytest.mark.parametrize("live", [False, True])
def test_a_row_of_another_tenant_is_refused_before_the_commit(
    stores: Stores, router: Router, flag_file: Path, make_follow: MakeFollow, eventually: Callable[..., None], live: bool
) -> None:
    if live:
        move_7(stores, flag_file, router, eventually)
    with pytest.raises(Refused, match="is not the tenant that it was called for, and was rolled back"):
        put(router, make_follow(8), tenant=7)

    def both(cursor: Any) -> Any:
        follows = (make_follow(7), make_follow(8))
        return [one for follow in follows for one in (follow.put_new if live else follow.put_old)(cursor)]

    with pytest.raises(Refused, match="a key change from one to another as a delete and an insert"):
        wrote(router, both, both, tenant=7)
    assert router.drain(PATIENCE)
    assert stores.rows(Origin.OLD) == stores.rows(Origin.NEW) == []


def test_a_row_without_its_tenant_is_refused(router: Router, stores: Stores) -> None:
    def write(cursor: Any) -> Any:
        return returned(cursor.execute("INSERT INTO public.follows (from_user, to_channel) VALUES (7, 1) RETURNING to_channel"))

    with pytest.raises(TypeError, match="a mirrored row is without from_user, its tenant"):
        wrote(router, write, write, tenant=7)
    assert stores.rows(Origin.OLD) == []


def test_a_request_pins_each_tenant_on_its_first_use(
    stores: Stores, router: Router, flag_file: Path, make_follow: MakeFollow, flag_client: LDClient, eventually: Callable[..., None]
) -> None:
    move_7(stores, flag_file, router, eventually)
    with router.pinned() as everybody, router.pinned(tenant=7) as seventh:
        assert (everybody, seventh) == (Stage.SHADOW, Stage.LIVE)
        assert put(router, make_follow(8)).stage is Stage.SHADOW
        flagfile.write_stage(flag_file, FLAG, Stage.DUALWRITE)
        flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.RAMPDOWN)
        eventually(lambda: FlagStage(flag_client, FLAG, kind=KIND).stage("9") is Stage.DUALWRITE)
        eventually(lambda: FlagStage(flag_client, FLAG, kind=KIND).stage("7") is Stage.RAMPDOWN)
        assert put(router, make_follow(7)).stage is Stage.LIVE
        assert put(router, make_follow(8)).stage is Stage.SHADOW
        assert put(router, make_follow(9)).stage is Stage.DUALWRITE, "its first use"
    assert put(router, make_follow(7)).stage is Stage.LIVE, "rampdown is not on record"
    stores.record(Stage.RAMPDOWN)
    eventually(lambda: put(router, make_follow(7)).stage is Stage.RAMPDOWN)
    assert put(router, make_follow(8)).stage is Stage.DUALWRITE


def test_a_request_that_read_one_tenant_before_its_fence_is_run_anew(
    stores: Stores, router: Router, flag_file: Path, make_follow: MakeFollow
) -> None:
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.LIVE)
    with router.pinned():
        put(router, make_follow(7))
        put(router, make_follow(8))
        stores.refuse_tenants(Origin.OLD, 1, Tenants(frozenset({"7"}), others=False))
        stores.move(1, "new", "7")
        with pytest.raises(AuthorityMoving):
            put(router, make_follow(7))
        assert put(router, make_follow(8)).origin is Origin.OLD
    assert put(router, make_follow(7)).origin is Origin.NEW
    assert router.stage_of(7) is Stage.LIVE


def test_what_is_lost_and_queued_is_by_the_tenants_epoch(
    stores: Stores, router: Router, flag_file: Path, make_follow: MakeFollow, eventually: Callable[..., None]
) -> None:
    move_7(stores, flag_file, router, eventually)
    stores.old.execute("ALTER TABLE public.follows ADD CONSTRAINT short CHECK (length(note) < 20)")
    put(router, make_follow(7, note="a note that the old store refuses"))
    assert router.drain(PATIENCE)
    assert router.counters()["mirror_old"]["lost"] == {"1": 1}
    assert router.counters()["mirror_old"]["queued"] == {}
    stores.old.execute("BEGIN; LOCK TABLE public.follows IN ACCESS EXCLUSIVE MODE")
    try:
        put(router, make_follow(7))
        assert router.counters()["mirror_old"]["queued"] == {"1": 1}
    finally:
        stores.old.execute("ROLLBACK")


def test_a_tenant_is_asked_for_where_there_are_tenants_and_only_there(
    make_router: MakeRouter, router: Router, make_follow: MakeFollow
) -> None:
    follow = make_follow(7)
    with pytest.raises(TypeError, match="tenant= is NoneType: give the row's own from_user"):
        wrote(router, follow.put_old, follow.put_new)
    with pytest.raises(TypeError, match="tenant= is NoneType"):
        router.compare(old=follow.find_old, new=follow.find_new)
    with pytest.raises(TypeError, match="tenant= is bool"):
        wrote(router, follow.put_old, follow.put_new, tenant=True)
    whole = make_router()
    with pytest.raises(TypeError, match="all rows move at once"):
        put(whole, follow)
    with pytest.raises(TypeError, match="all rows move at once"), whole.pinned(tenant=7):
        pass


def test_a_tenant_is_the_text_that_postgresql_prints(stores: Stores) -> None:
    identity = UUID("A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11")
    for value, kind in ((7, "bigint"), (-3, "smallint"), ("Zoë ", "text"), (identity, "uuid")):
        typed = sql.SQL("SELECT ({0})::{1}::text, ({0})::{1}").format(sql.Literal(value), sql.SQL(kind))
        row = stores.old.execute(typed).fetchone()
        assert row is not None
        assert as_text(value) == row[0] == as_text(row[1])
    assert as_text(1.5) is as_text(None) is as_text(False) is None


def test_a_router_of_tenants_needs_both_columns(stores: Stores, flag_client: LDClient) -> None:
    with pytest.raises(TypeError, match="their column in both stores"):
        Router(
            old=stores.endpoint(Origin.OLD, tenants=True), new=PgEndpoint(stores.new_dsn), mirrored=[FOLLOWS],
            stage=FlagStage(flag_client, FLAG),
        )  # fmt: skip


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
[table.columns]
subject = "from_user"
object = "to_channel"
[work]
path = "work"
[flag]
key = "follows-store"
target = "new"
"""


def test_a_router_of_tenants_comes_from_a_spec(
    stores: Stores, flag_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_follow: MakeFollow,
) -> None:  # fmt: skip
    monkeypatch.setenv("OLD_DSN", stores.old_dsn)
    monkeypatch.setenv("NEW_DSN", stores.new_dsn)
    path = tmp_path / "follows.toml"
    path.write_text(f'{SPEC}file = "{flag_file}"\ncontext = "note"\n')
    with pytest.raises(SpecError, match=r"flag.context: note is no key column of public.associations"):
        Router.connect(spec.load(path))
    path.write_text(f'{SPEC}file = "{flag_file}"\ncontext = "{KIND}"\n')
    flagfile.write_stage(flag_file, FLAG, Stage.SHADOW)
    flagfile.write_tenants(flag_file, FLAG, KIND, ["7"], Stage.LIVE)
    stores.move(1, "new", "7")
    with Router.connect(spec.load(path)) as router:
        assert put(router, make_follow(7)).origin is Origin.NEW
        assert put(router, make_follow(8)).origin is Origin.OLD
        assert router._running().follower.observations.of("7") == Observation(1, Origin.NEW)  # type: ignore[union-attr]


def test_what_a_tenant_costs_the_caller_is_a_part_of_what_the_router_may(
    stores: Stores, router: Router, flag_file: Path, eventually: Callable[..., None]
) -> None:
    """Measure the decision alone, with 10,000 tenants on record and in the flag; the bound is wide, for a busy machine."""
    names = [str(name) for name in range(10_000)]
    flagfile.write_tenants(flag_file, FLAG, KIND, names, Stage.LIVE)
    stores.move(1, "new", *names)
    eventually(lambda: router.stage_of(9_999) is Stage.LIVE)
    runtime, times = router._running(), []
    for number in range(5_000):
        started = time.perf_counter()
        router._pin(runtime, router._tenant(number * 2))
        times.append(time.perf_counter() - started)
    assert statistics.median(times) < 200e-6
