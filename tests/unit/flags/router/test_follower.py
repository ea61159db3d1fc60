"""The follower: the ledger's word within a moment, heartbeats in time, the last fact kept without it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.flags.observed import Observation, Observations, observations
from changeover.flags.router.follower import Beat, LedgerAuthority, LedgerFollower
from changeover.jobs.ledger.epochs import EVERYTHING
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Authority
from tests.support.fix_flags import PATIENCE, Stores, once_within

OLD, NEW = Observation(0, Origin.OLD), Observation(1, Origin.NEW)
AT_OLD, AT_NEW = Observations(), Observations(1, NEW)


def there_or_back(stores: Stores, epoch: int) -> Observation:
    """Move all rows, to the new store in the odd epochs; return what holds then."""
    observation = Observation(epoch, Origin.NEW if epoch % 2 else Origin.OLD)
    stores.move(epoch, observation.store.value)
    return observation


class Process:
    """A process that acts at a stage."""

    def __init__(self) -> None:
        self.beat: Beat | None = Beat(Stage.OFF, 0, {"writes": 1})

    def __call__(self) -> Beat | None:
        return self.beat


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
def follower(stores: Stores, process: Process) -> Iterator[LedgerFollower]:
    made = LedgerAuthority(stores.new_dsn, "follows").follow("p1", process)
    yield made
    made.close()


def test_the_first_fact_is_there_at_once(follower: LedgerFollower) -> None:
    assert follower.observations == AT_OLD


def test_a_new_epoch_is_followed(stores: Stores, follower: LedgerFollower, eventually: Callable[..., None]) -> None:
    epochs = itertools.count(1)

    def move() -> None:
        observation = there_or_back(stores, next(epochs))
        eventually(lambda: follower.observations == Observations(observation.epoch, observation))

    once_within(0.5, move)


def test_waiting_ends_when_the_fact_changes(stores: Stores, follower: LedgerFollower) -> None:
    started = time.monotonic()
    once_within(0.5, lambda: follower.wait(EVERYTHING, OLD, 0.1))
    assert time.monotonic() - started > 0.09
    epochs = itertools.count(1)

    def move() -> None:
        assert follower.observations is not None
        before = follower.observations.rest
        observation = there_or_back(stores, next(epochs))
        follower.wait(EVERYTHING, before, PATIENCE)
        assert follower.observations == Observations(observation.epoch, observation)

    once_within(0.5, move)


def test_heartbeats_come_in_time_and_at_once_on_change(
    stores: Stores, follower: LedgerFollower, process: Process, eventually: Callable[..., None]
) -> None:
    eventually(stores.ledger.heartbeats)
    first = stores.ledger.heartbeats()[0]
    assert (first.process, first.stage, first.epoch, first.counters) == ("p1", "off", 0, {"writes": 1})
    eventually(lambda: stores.ledger.heartbeats()[0].at > first.at)

    def acts(stage: Stage, epoch: int) -> None:
        process.beat = Beat(stage, epoch, {})
        eventually(lambda: [(beat.stage, beat.epoch) for beat in stores.ledger.heartbeats()] == [(stage.value, epoch)])

    stages, epochs = itertools.cycle((Stage.SHADOW, Stage.DUALWRITE)), itertools.count(1)
    once_within(0.3, lambda: acts(next(stages), 0))
    once_within(0.3, lambda: acts(Stage.SHADOW, next(epochs)))


def test_closing_records_a_last_heartbeat(stores: Stores, process: Process, eventually: Callable[..., None]) -> None:
    follower = LedgerAuthority(stores.new_dsn, "follows").follow("p1", process)
    process.beat = Beat(Stage.SHADOW, 0, {"writes": 99})
    follower.close()
    eventually(lambda: stores.ledger.heartbeats()[0].counters == {"writes": 99})


def test_a_broken_session_is_made_anew(stores: Stores, follower: LedgerFollower, eventually: Callable[..., None]) -> None:
    stores.end_router_sessions(Origin.NEW)
    eventually(lambda: follower.failures > 0)
    assert follower.observations == AT_OLD
    stores.move(1, "new")
    eventually(lambda: follower.observations == AT_NEW)


def test_an_unprepared_ledger_has_no_fact_and_hurts_nothing(new_dsn: str, process: Process) -> None:
    follower = LedgerAuthority(new_dsn, "follows").follow("p1", process)
    assert follower.observations is None
    follower.close()


def test_the_last_acknowledged_stage_survives_a_restart(stores: Stores, process: Process) -> None:
    stores.ledger.beat("gone", "rampdown", 1, {})
    follower = LedgerAuthority(stores.new_dsn, "follows").follow("p2", process)
    assert follower.last_stage is Stage.RAMPDOWN
    follower.close()


def test_a_tenants_move_is_followed_and_waiting_is_for_its_own(
    stores: Stores, follower: LedgerFollower, eventually: Callable[..., None]
) -> None:
    stores.move(1, "new", "7", "9")
    eventually(lambda: follower.observations == Observations(1, OLD, {"7": NEW, "9": NEW}))
    started = time.monotonic()
    follower.wait("8", OLD, 0.1)
    assert time.monotonic() - started > 0.09
    stores.move(2, "new", "8")
    follower.wait("8", OLD, PATIENCE)
    assert follower.observations is not None
    assert follower.observations.of("8") == Observation(2, Origin.NEW)


def test_the_names_are_read_again_only_after_a_move(
    stores: Stores, follower: LedgerFollower, monkeypatch: pytest.MonkeyPatch, eventually: Callable[..., None]
) -> None:
    reads: list[int] = []
    authorities = Ledger.authorities

    def counted(ledger: Ledger, since: int = 0) -> list[Authority]:
        found = authorities(ledger, since)
        reads.append(len(found))
        return found

    monkeypatch.setattr(Ledger, "authorities", counted)
    looks = follower._looks
    eventually(lambda: follower._looks >= looks + 5)
    assert not reads
    stores.move(1, "new", *map(str, range(10_000)))
    eventually(lambda: follower.observations is not None and len(follower.observations.named) == 10_000)
    looks = follower._looks
    eventually(lambda: follower._looks >= looks + 5)
    assert reads == [1]
    for epoch in range(2, 7):
        stores.move(epoch, "old" if epoch % 2 else "new", str(epoch))
        eventually(lambda epoch=epoch: follower.observations is not None and follower.observations.epoch == epoch)
    assert reads == [1, 2, 2, 2, 2, 2], "the last one that is known, and the new one"
    assert follower.observations == observations(authorities(stores.ledger))


def test_a_migration_that_began_again_by_the_same_name_is_read_anew(
    stores: Stores, follower: LedgerFollower, eventually: Callable[..., None]
) -> None:
    stores.move(1, "new", "7")
    eventually(lambda: follower.observations == Observations(1, OLD, {"7": NEW}))
    with stores.ledger.connection.transaction():
        stores.ledger.connection.execute("DELETE FROM changeover.authority")
        stores.move(1, "new", "9")
    eventually(lambda: follower.observations == Observations(1, OLD, {"9": NEW}))
