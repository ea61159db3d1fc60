"""The follower: the ledger's word within a moment, heartbeats in time, the last fact kept without it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.flags.authority import Beat, Fact, LedgerAuthority, LedgerFollower
from tests.fix_flags import PATIENCE, Stores, once_within

OLD, NEW = Fact(0, Origin.OLD), Fact(1, Origin.NEW)


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
    assert follower.fact == OLD


def test_a_new_epoch_is_followed(stores: Stores, follower: LedgerFollower, eventually: Callable[..., None]) -> None:
    epochs = itertools.count(1)

    def move() -> None:
        stores.move(epoch := next(epochs), "new")
        eventually(lambda: follower.fact == Fact(epoch, Origin.NEW))

    once_within(0.5, move)


def test_waiting_ends_when_the_fact_changes(stores: Stores, follower: LedgerFollower) -> None:
    started = time.monotonic()
    once_within(0.5, lambda: follower.wait(OLD, 0.1))
    assert time.monotonic() - started > 0.09
    epochs = itertools.count(1)

    def move() -> None:
        before = follower.fact
        assert before is not None
        stores.move(epoch := next(epochs), "new")
        follower.wait(before, PATIENCE)
        assert follower.fact == Fact(epoch, Origin.NEW)

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
    assert follower.fact == OLD
    stores.move(1, "new")
    eventually(lambda: follower.fact == NEW)


def test_an_unprepared_ledger_has_no_fact_and_hurts_nothing(new_dsn: str, process: Process) -> None:
    follower = LedgerAuthority(new_dsn, "follows").follow("p1", process)
    assert follower.fact is None
    follower.close()


def test_the_last_acknowledged_stage_survives_a_restart(stores: Stores, process: Process) -> None:
    stores.ledger.beat("gone", "rampdown", 1, {})
    follower = LedgerAuthority(stores.new_dsn, "follows").follow("p2", process)
    assert follower.last_stage is Stage.RAMPDOWN
    follower.close()
