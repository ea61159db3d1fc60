"""Rogue writes while tenants are at two stores: each change by its own tenant's tenure, and nothing is read twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from changeover.jobs.capture.rogue import Watch, rogue
from changeover.jobs.ledger.epochs import NEW, OLD
from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.spool.table import Spool
from changeover.position import format_lsn
from tests.support.fix_split import Split


def of_old(tenant: str) -> dict[str, str]:
    return {"who": tenant, "whom": "1"}


def of_new(tenant: str) -> dict[str, str]:
    return {"a": tenant, "b": "1"}


@pytest.fixture
def apart(split: Split) -> tuple[Split, int]:
    """Return a migration whose tenants 7 and 9 are at the new store, and where that was in its log."""
    path = reverse_setup.open_path(split.spec, split.ledger)
    assert path is not None
    there = path.l0 + 100
    split.move(NEW, 1000, there, "7", "9")
    return split, there


def told(split: Split) -> dict[str, tuple[int, int]]:
    return {one.store: (one.changes, one.transactions) for one in rogue(split.spec, split.ledger)}


def test_each_change_is_held_against_its_own_tenant(apart: tuple[Split, int]) -> None:
    split, there = apart
    split.write(OLD, 900, "I", of_old("7"))
    split.write(OLD, 1010, "I", of_old("5"))
    split.write(OLD, 1020, "I", of_old("7"), note="mirror")
    split.write(NEW, there - 50, "I", of_new("5"), note="changes")
    split.write(NEW, there + 10, "U", of_new("7"))
    split.write(NEW, there + 20, "I", of_new("5"), note="changes")
    assert told(split) == {}
    split.write(OLD, 1030, "D", None, key=of_old("9"))
    assert told(split) == {OLD: (1, 1)}
    split.write(OLD, 1040, "U", of_old("5"), key=of_old("7"))
    split.write(OLD, 1050, "U", of_old("7"), key=of_old("5"))
    split.write(NEW, there + 30, "U", of_new("5"))
    split.write(NEW, there + 40, "U", {**of_new("5"), "b": "7"})
    assert told(split) == {OLD: (3, 3), NEW: (2, 2)}
    split.write(OLD, 1060, "T", None)
    assert told(split) == {OLD: (4, 4), NEW: (2, 2)}, "a TRUNCATE takes everybody's rows"


def test_where_a_tenant_has_moved_again_its_writes_are_seen_anew(apart: tuple[Split, int]) -> None:
    split, there = apart
    watch = Watch(split.spec)
    split.write(OLD, 1010, "I", of_old("7"))
    split.write(NEW, there + 110, "I", of_new("7"))
    assert [(one.store, one.changes) for one in watch.look(split.ledger)] == [(OLD, 1)]
    split.move(OLD, 2000, there + 100, "7")
    assert [(one.store, one.changes) for one in watch.look(split.ledger)] == [(OLD, 1), (NEW, 1)], "past the fence, told late"
    split.write(OLD, 2010, "I", of_old("7"))
    split.write(OLD, 2020, "I", of_old("9"))
    assert [(one.store, one.changes) for one in watch.look(split.ledger)] == [(OLD, 2), (NEW, 1)]
    split.move(NEW, 3000, there + 200)
    split.write(OLD, 3010, "I", of_old("5"))
    split.write(NEW, there + 210, "I", of_new("5"))
    assert [(one.store, one.changes) for one in watch.look(split.ledger)] == [(OLD, 3), (NEW, 1)]
    assert watch.look(split.ledger) == rogue(split.spec, split.ledger), "what was remembered is what a first look finds"
    places = {"positions": {"source_lsn": 3011, "target": format_lsn(there + 300)}}
    split.ledger.record_verdict("follows", "store", "equal", None, places)
    assert watch.look(split.ledger) == rogue(split.spec, split.ledger) == []
    split.write(OLD, 3020, "I", of_old("5"))
    assert [(one.store, one.changes) for one in watch.look(split.ledger)] == [(OLD, 1)]


def test_a_watch_reads_what_is_new_alone(apart: tuple[Split, int], monkeypatch: pytest.MonkeyPatch) -> None:
    split, _ = apart
    read: list[int] = []
    parts = Spool.parts

    def counted(*given: Any, **more: Any) -> Iterator[pa.Table]:
        for part in parts(*given, **more):
            read.append(len(part))
            yield part

    monkeypatch.setattr(Spool, "parts", counted)
    watch = Watch(split.spec)
    for lsn in range(1010, 1060, 10):
        split.write(OLD, lsn, "I", of_old("5"))
    assert watch.look(split.ledger) == []
    assert read == [5]
    split.write(OLD, 1070, "I", of_old("7"))
    assert [one.changes for one in watch.look(split.ledger)] == [1]
    assert [one.changes for one in watch.look(split.ledger)] == [1]
    assert read == [5, 1]
