"""Units of work by sessions of the application's own: a refusal is known whatever a framework makes of it; the unit runs anew."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.errors import AuthorityMoving
from changeover.flags.router.router import Place, Router
from changeover.flags.router.unit import sqlstate
from tests.support.fix_flags import MakeRouter, Stores

SetStage = Callable[[Router, Stage], None]
PUT = {
    Origin.OLD: "INSERT INTO public.follows (from_user, to_channel) VALUES (%s, 1)",
    Origin.NEW: "INSERT INTO public.associations VALUES (%s, 1, '{}', NULL, now())",
}


class Wrapped(Exception):
    """What a framework makes of a driver's error."""


@pytest.fixture
def router(make_router: MakeRouter, set_stage: SetStage) -> Router:
    made = make_router(mirrors=False)
    set_stage(made, Stage.SHADOW)
    return made


def put(stores: Stores, place: Place, user: int) -> Origin:
    """Write in a transaction of one's own, as a framework would."""
    dsn = place.of(stores.old_dsn, stores.new_dsn)
    try:
        with psycopg.connect(dsn) as session:
            session.execute(PUT[place.origin].encode(), [user])
    except psycopg.Error as error:
        raise Wrapped from error
    return place.origin


def test_a_block_goes_where_authority_is_and_a_refusal_is_one_error(
    stores: Stores, router: Router, eventually: Callable[..., None]
) -> None:
    with router.route() as place:
        assert put(stores, place, 1) is Origin.OLD
    stores.refuse(Origin.OLD)
    with pytest.raises(AuthorityMoving), router.route() as place:
        put(stores, place, 2)
    with pytest.raises(KeyError), router.route():
        raise KeyError
    stores.fence_to_new_done()
    eventually(lambda: router.stage is Stage.LIVE)
    with router.route() as place:
        assert put(stores, place, 2) is Origin.NEW
    assert [stores.rows(origin) for origin in Origin] == [[(1, 1, "none")], [(2, 1, None)]]
    assert router.counters()["writes"] == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_unit_that_a_fence_refused_runs_anew(stores: Stores, router: Router, asynchronous: bool) -> None:
    places: list[Origin] = []

    def work(place: Place) -> Origin:
        places.append(place.origin)
        return put(stores, place, 7)

    async def awaited(place: Place) -> Origin:
        return await asyncio.to_thread(work, place)

    stores.refuse(Origin.OLD)
    timer = threading.Timer(0.3, stores.fence_to_new_done)
    timer.start()
    done = asyncio.run(router.rerun_async(awaited)) if asynchronous else router.rerun(work)
    timer.join()
    assert done is Origin.NEW
    assert set(places) == {Origin.OLD, Origin.NEW}
    assert (stores.rows(Origin.OLD), len(stores.rows(Origin.NEW))) == ([], 1)
    assert router.counters()["fence_waits"] == 1


def test_the_event_loop_goes_on_while_a_unit_waits(stores: Stores, router: Router) -> None:
    turns = 0

    async def both() -> Origin:
        nonlocal turns

        async def work(place: Place) -> Origin:
            return await asyncio.to_thread(put, stores, place, 7)

        unit = asyncio.create_task(router.rerun_async(work))
        while not unit.done():
            turns += 1
            if turns == 30:
                stores.fence_to_new_done()
            await asyncio.sleep(0.01)
        return await unit

    stores.refuse(Origin.OLD)
    assert asyncio.run(both()) is Origin.NEW
    assert turns >= 30


def test_another_error_goes_to_the_caller(router: Router) -> None:
    def fail(place: Place) -> None:
        raise Wrapped from KeyError("a")

    with pytest.raises(Wrapped):
        router.rerun(fail)


def test_a_router_that_mirrors_has_to_see_each_row(make_router: MakeRouter) -> None:
    with pytest.raises(TypeError, match="sees what `write` and `run` did"), make_router().route():
        pass


def test_an_errors_state_is_found_behind_what_a_framework_raises() -> None:
    def raised(error: Exception, cause: Exception | None) -> Exception:
        error.__cause__ = cause
        return error

    refusal: Any = psycopg.errors.lookup("40001")("no")
    assert sqlstate(raised(Wrapped(), raised(Wrapped(), refusal))) == "40001"
    assert sqlstate(raised(Wrapped(), KeyError())) is None
