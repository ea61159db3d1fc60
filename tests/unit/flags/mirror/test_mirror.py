"""The mirror: through the gate, in order, bounded, beside the caller; nothing lost in silence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from ldclient.migrations.types import Origin

from changeover.flags.mirror.change import Change, MirroredTable, Row
from changeover.flags.mirror.mirror import Mirror
from changeover.flags.mirror.offer import Bounds
from changeover.flags.mirror.worker import Way
from changeover.flags.mirror.written import Told
from changeover.position import Version, format_lsn
from tests.support.fix_flags import PATIENCE, Stores, wait_until

FAR = 1 << 40
"""An LSN above the floor of any fresh database."""


def follow(user: int, note: str = "hello", channel: int = 1) -> Change:
    row = {
        "from_user": user,
        "to_channel": channel,
        "note": note,
        "tags": ["a", None],
        "seen": datetime(2026, 1, 1, tzinfo=UTC),
    }
    return Change(row)


def gone(change: Change) -> Change:
    return Change(change.row, deleted=True)


def at(lsn: int, epoch: int = 0) -> Version:
    return Version(epoch, FAR + lsn, -1)


def offer(mirror: Mirror, version: Version, changes: list[Change]) -> bool:
    """Offer one unit, shared out by the user of its first row."""
    return mirror.offer(version, [Told(0, change) for change in changes], str(changes[0].row["from_user"]))


MakeMirror = Callable[..., Mirror]


@pytest.fixture
def make_mirror(stores: Stores) -> Iterator[MakeMirror]:
    made: list[Mirror] = []

    def to_new(row: Row) -> Row | None:
        if row["note"] == "private":
            return None
        if row["note"] == "partial":
            return {"subject": row["from_user"], "object": row["to_channel"]}
        if row["note"] == "broken":
            raise RuntimeError("the mapping failed")
        return {
            "subject": row["from_user"], "object": row["to_channel"], "attributes": {"note": row["note"]},
            "tags": row["tags"], "seen": row["seen"],
        }  # fmt: skip

    def make(limit: int = 1000, deadline: float = PATIENCE, workers: int = 4, wait: float = 0.05) -> Mirror:
        tables = [MirroredTable("public.follows", "public.associations", to_new, dict)]
        way = Way(stores.endpoint(Origin.NEW), Origin.NEW, tables, "changeover:follows:router")
        mirror = Mirror(way, Bounds(workers=workers, rows=limit, wait=wait, deadline=deadline))
        made.append(mirror)
        return mirror

    yield make
    for mirror in made:
        mirror.close(1)


def offer_until_taken(mirror: Mirror) -> None:
    """Offer one row after the other until one arrives: with a short deadline the machine may let one fail."""
    for number in itertools.count(9):
        assert offer(mirror, at(number), [follow(9)])
        assert mirror.drain(PATIENCE)
        if mirror.counters()["applied"]:
            return
        assert number < 50, mirror.counters()


def row_versions(stores: Stores) -> list[tuple[Any, ...]]:
    return stores.new.execute(
        "SELECT subject, _changeover_epoch, _changeover_lsn::text, _changeover_ordinal, _changeover_deleted"
        ' FROM changeover."versions_public.associations" ORDER BY subject'
    ).fetchall()


def test_a_row_arrives_whole_and_typed(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    assert offer(mirror, at(1), [follow(7)])
    assert mirror.drain(PATIENCE)
    row = stores.new.execute("SELECT subject, object, attributes, tags, seen FROM public.associations").fetchone()
    assert row == (7, 1, {"note": "hello"}, ["a", None], datetime(2026, 1, 1, tzinfo=UTC))
    assert row_versions(stores) == [(7, 0, format_lsn(FAR + 1), -1, False)]
    counters = mirror.counters()
    assert (counters["mirrored"], counters["applied"], counters["failed"], counters["depth"]) == (1, 1, 0, 0)


def test_a_delete_leaves_a_tombstone(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    offer(mirror, at(1), [follow(1)])
    offer(mirror, at(2), [gone(follow(1))])
    offer(mirror, at(3), [gone(follow(2))])
    assert mirror.drain(PATIENCE)
    assert stores.rows(Origin.NEW) == []
    assert [(row[0], row[4]) for row in row_versions(stores)] == [(1, True), (2, True)]


def test_an_older_version_is_refused_and_counted(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    offer(mirror, at(9), [follow(1, "newer")])
    offer(mirror, at(5), [follow(1, "older")])
    offer(mirror, Version(0, 0, -1), [follow(2, "below the floor")])
    assert mirror.drain(PATIENCE)
    assert stores.rows(Origin.NEW) == [(1, 1, "newer")]
    assert (mirror.counters()["applied"], mirror.counters()["refused_by_gate"]) == (1, 2)


def test_of_a_key_written_twice_in_a_transaction_the_last_image_wins(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    offer(mirror, at(1), [follow(1, "first"), follow(2), follow(1, "second"), gone(follow(2)), follow(1, "third")])
    assert mirror.drain(PATIENCE)
    assert stores.rows(Origin.NEW) == [(1, 1, "third")]
    assert [(row[0], row[4]) for row in row_versions(stores)] == [(1, False), (2, True)]


def test_the_order_of_a_key_is_kept(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    for number in range(200):
        offer(mirror, at(number), [follow(number % 5, str(number))])
    assert mirror.drain(PATIENCE)
    assert mirror.counters()["applied"] == 200
    assert mirror.counters()["refused_by_gate"] == 0
    assert stores.rows(Origin.NEW) == [(user, 1, str(195 + user)) for user in range(5)]


def test_a_slow_store_costs_the_caller_nothing_and_ends_at_the_deadline(stores: Stores, make_mirror: MakeMirror) -> None:
    patient, hasty = make_mirror(), make_mirror(deadline=0.3)
    stores.new.execute("BEGIN; LOCK TABLE public.associations IN ACCESS EXCLUSIVE MODE")
    for number in range(3):
        assert offer(patient, at(number), [follow(number)])
        assert offer(hasty, at(number), [follow(number)])
    assert patient.counters()["depth"] == 3, "the caller has gone on, and all of it still waits"
    assert hasty.drain(PATIENCE)
    stores.new.execute("ROLLBACK")
    assert patient.drain(PATIENCE)
    assert patient.counters()["applied"] == 3
    assert hasty.counters()["failed"] == 3
    assert hasty.counters()["last_failure"][1] == "QueryCanceled 57014"
    offer_until_taken(hasty)


def test_a_full_queue_drops_and_counts(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror(limit=5)
    stores.new.execute("BEGIN; LOCK TABLE public.associations IN ACCESS EXCLUSIVE MODE")
    taken = [offer(mirror, at(number), [follow(number)]) for number in range(50)]
    stores.new.execute("ROLLBACK")
    assert mirror.drain(PATIENCE)
    counters = mirror.counters()
    assert 5 <= sum(taken) <= 6
    assert counters["mirrored"] == counters["applied"] == sum(taken)
    assert counters["dropped"] == 50 - sum(taken)
    assert counters["last_drop"][1] == "queue full"


def test_a_broken_session_is_made_anew(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    offer(mirror, at(1), [follow(1)])
    assert mirror.drain(PATIENCE)
    assert stores.end_router_sessions(Origin.NEW) == 1
    offer(mirror, at(2), [follow(2)])
    assert mirror.drain(PATIENCE)
    assert [row[0] for row in stores.rows(Origin.NEW)] == [1, 2]
    assert mirror.counters()["failed"] == 0


def test_an_unreachable_store_fails_within_the_deadline_and_comes_back(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror(deadline=0.3)
    name = psycopg.sql.Identifier(stores.new.info.dbname)
    stores.old.execute(psycopg.sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
    offer(mirror, at(1), [follow(1)])
    assert mirror.drain(PATIENCE)
    assert mirror.counters()["failed"] == 1
    assert mirror.counters()["last_failure"][1] == "ServerUnavailable"
    stores.old.execute(psycopg.sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
    offer_until_taken(mirror)
    assert stores.rows(Origin.NEW) == [(9, 1, "hello")]


@pytest.mark.parametrize(("note", "reason"), [("partial", "ValueError"), ("broken", "RuntimeError")])
def test_a_row_that_is_not_whole_is_never_offered(stores: Stores, make_mirror: MakeMirror, note: str, reason: str) -> None:
    mirror = make_mirror()
    offer(mirror, at(1), [follow(1, note)])
    offer(mirror, at(2), [follow(2)])
    assert mirror.drain(PATIENCE)
    assert stores.rows(Origin.NEW) == [(2, 1, "hello")]
    assert mirror.counters()["failed"] == 1
    assert mirror.counters()["last_failure"][1] == reason


def test_a_row_that_is_not_carried_over_is_skipped(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    offer(mirror, at(1), [follow(1, "private"), follow(2)])
    assert mirror.drain(PATIENCE)
    assert stores.rows(Origin.NEW) == [(2, 1, "hello")]
    assert mirror.counters()["skipped"] == 1


def test_the_callers_later_changes_to_its_rows_do_not_travel(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    change = follow(1, "as committed")
    stores.new.execute("BEGIN; LOCK TABLE public.associations IN ACCESS EXCLUSIVE MODE")
    offer(mirror, at(1), [change])
    change.row["note"] = "changed afterwards"  # type: ignore[index]
    stores.new.execute("ROLLBACK")
    assert mirror.drain(PATIENCE)
    assert stores.rows(Origin.NEW) == [(1, 1, "as committed")]


def test_what_is_lost_is_counted_in_rows_by_the_epoch_of_the_write(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror(limit=1)
    offer(mirror, Version(1, FAR, -1), [follow(1, "broken"), follow(2)])
    assert mirror.drain(PATIENCE)
    offer(mirror, Version(3, FAR, -1), [follow(3, "partial")])
    assert mirror.drain(PATIENCE)
    stores.new.execute("BEGIN; LOCK TABLE public.associations IN ACCESS EXCLUSIVE MODE")
    taken = [offer(mirror, Version(3, FAR + number, -1), [follow(4), follow(5)]) for number in range(4)]
    stores.new.execute("ROLLBACK")
    assert mirror.drain(PATIENCE)
    assert mirror.counters()["lost"] == {"1": 2, "3": 1 + 2 * taken.count(False)}


def test_closing_deals_with_the_queue_and_counts_the_rest(stores: Stores, make_mirror: MakeMirror) -> None:
    mirror = make_mirror(deadline=0.3)
    stores.new.execute("BEGIN; LOCK TABLE public.associations IN ACCESS EXCLUSIVE MODE")
    for number in range(4):
        offer(mirror, at(number), [follow(number)])
    mirror.close(0.05)
    wait_until(lambda: mirror.counters()["dropped"] + mirror.counters()["failed"] == 4)
    stores.new.execute("ROLLBACK")
    assert not offer(mirror, at(9), [follow(9)])
