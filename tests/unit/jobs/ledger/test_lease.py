"""The lease of a step: one holder at a time; a batch waits while another one is under way, and says for whom."""

from __future__ import annotations

import logging
import math
import threading

import pytest

from changeover.errors import LeaseHeld
from changeover.jobs.ledger import lease
from changeover.jobs.ledger.lease import hold, is_held
from changeover.session import Connection, connect
from tests.support.fix_flags import wait_until


def test_who_does_not_wait_or_not_long_is_told_who_has_it(new_dsn: str) -> None:
    with hold(new_dsn, "m", "replay-store"), hold(new_dsn, "m", "replay-lake"), hold(new_dsn, "other", "replay-store"):
        for seconds in (0, 0.1):
            sentence = r"another replay-store of this migration is running \(server process \d+"
            with pytest.raises(LeaseHeld, match=sentence), hold(new_dsn, "m", "replay-store", seconds):
                pytest.fail("two have one lease")
    with hold(new_dsn, "m", "replay-store"):
        pass


def test_a_batch_waits_for_as_long_as_another_one_takes(
    new_dsn: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lease, "NAMED_EVERY", 2)
    caplog.set_level(logging.INFO, lease.__name__)
    taken = threading.Event()

    def wait() -> None:
        with hold(new_dsn, "m", "replay-lake", lease.LEASE_SECONDS):
            taken.set()

    waiter = threading.Thread(target=wait)
    with connect(new_dsn, "test") as session:
        with hold(new_dsn, "m", "replay-lake"):
            waiter.start()
            named = "waiting for the lease of replay-lake, which is held: server process"
            wait_until(lambda: caplog.text.count(named) >= 3)
            assert not taken.is_set()
            assert is_held(session, "m", "replay-lake")
        waiter.join()
        assert taken.is_set()
        assert not is_held(session, "m", "replay-lake")
    assert math.inf == lease.LEASE_SECONDS, "no batch is given up because the machine is slow"


def test_a_wait_without_end_is_called_off(new_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.05)
    stop = threading.Event()
    refused: list[LeaseHeld] = []

    def wait() -> None:
        try:
            with hold(new_dsn, "m", "replay-lake", lease.LEASE_SECONDS, stop):
                pytest.fail("two have one lease")
        except LeaseHeld as error:
            refused.append(error)

    waiter = threading.Thread(target=wait)
    with hold(new_dsn, "m", "replay-lake"):
        waiter.start()
        waiter.join(0.5)
        assert waiter.is_alive()
        stop.set()
        waiter.join()
    assert len(refused) == 1


def test_a_session_that_is_kept_holds_the_lease_in_its_blocks_alone(new_dsn: str) -> None:
    kept: dict[str, Connection] = {}
    with connect(new_dsn, "test") as session:
        for number in range(3):
            with hold(new_dsn, "m", "replay-lake", kept=kept):
                assert is_held(session, "m", "replay-lake")
                sentence = rf"another replay-lake of this migration is running \(server process {kept_pid(kept)}, since \d\d:"
                with pytest.raises(LeaseHeld, match=sentence), hold(new_dsn, "m", "replay-lake"):
                    pytest.fail("two have one lease")
            assert not is_held(session, "m", "replay-lake")
            if number == 1:
                session.execute("SELECT pg_terminate_backend(%s)", [kept_pid(kept)])
        with pytest.raises(ZeroDivisionError), hold(new_dsn, "m", "replay-lake", kept=kept):
            print(1 / 0)
        assert not is_held(session, "m", "replay-lake")
    assert len(kept) == 1
    for one in kept.values():
        one.close()


def kept_pid(kept: dict[str, Connection]) -> int:
    """Return the server process of the one session that is kept."""
    [session] = kept.values()
    return session.info.backend_pid
