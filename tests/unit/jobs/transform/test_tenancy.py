"""Tenants at two stores: who is where, in the words of every command; and what waits until they are together again."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from changeover.errors import Refused
from changeover.jobs.apply.checkpoint import ReverseStream
from changeover.jobs.apply.retention import epoch_to_come
from changeover.jobs.finalize import abort, finalize
from changeover.jobs.ledger import epochs
from changeover.jobs.ledger.epochs import (
    FOR_EVER,
    NEW,
    OLD,
    Standing,
    absences,
    authority_epochs,
    histories,
    moving,
    sections,
    shares,
    stamped,
    standing,
)
from changeover.jobs.ledger.records import Authority
from changeover.jobs.restart import _require_allowed
from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.spool.events import INSERT
from changeover.jobs.status import status
from changeover.position import Version
from changeover.tenants import EVERY, Tenants, describe
from changeover.verifiers.explain import explain
from tests.support.fix_split import Split


def moves(*made: tuple[str, int, int, str]) -> list[Authority]:
    """Return an authority log: (store, from_lsn, new_lsn, tenants' names apart by spaces) move by move."""
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return [
        Authority(place, store, old, at, 0.1, new, frozenset(names.split()) or None)
        for place, (store, old, new, names) in enumerate(made, 1)
    ]


LOG = moves((NEW, 100, 5000, "7 9"), (OLD, 200, 6000, "7"), (NEW, 300, 7000, ""), (OLD, 400, 8000, "9"))


def test_who_is_where() -> None:
    assert [epochs.at(LOG[:made], OLD) for made in range(5)] == [
        EVERY, Tenants(frozenset({"7", "9"})), Tenants(frozenset({"9"})), None, Tenants(frozenset({"9"}), others=False),
    ]  # fmt: skip
    assert [epochs.at(LOG[:made], NEW) for made in range(5)] == [
        None, Tenants(frozenset({"7", "9"}), others=False), Tenants(frozenset({"9"}), others=False), EVERY,
        Tenants(frozenset({"9"})),
    ]  # fmt: skip
    assert [epochs.apart(LOG[:made]) for made in range(5)] == [[], ["7", "9"], ["9"], [], ["9"]]


def test_how_tenants_are_told() -> None:
    many = frozenset(str(name) for name in range(1, 10))
    assert describe(EVERY) == "all rows"
    assert describe(Tenants(frozenset({"7"}))) == "all rows but those of the tenant 7"
    assert describe(Tenants(many, others=False)) == "9 tenants (1, 2, 3, 4, 5, …)"


def test_each_place_of_a_log_is_somebodys_absence_or_nobodys() -> None:
    seven, nine, both = (frozenset(names) for names in ("7", "9", "79"))
    assert absences(LOG, OLD, 0) == [
        (100, 200, Tenants(both, others=False)), (200, 300, Tenants(nine, others=False)), (300, 400, EVERY),
        (400, FOR_EVER, Tenants(nine)),
    ]  # fmt: skip
    assert absences(LOG, NEW, 4000) == [
        (4000, 5000, EVERY), (5000, 6000, Tenants(both)), (6000, 7000, Tenants(nine)),
        (8000, FOR_EVER, Tenants(nine, others=False)),
    ]  # fmt: skip
    assert absences([], OLD, 0) == []
    assert {whose for _, whose in histories(LOG)} == {
        Tenants(both), Tenants(seven, others=False), Tenants(nine, others=False),
    }  # fmt: skip


def test_the_old_store_is_not_given_up_while_a_tenant_is_there_nor_the_new_one(split: Split) -> None:
    split.move(NEW, 100, 5000, "7", "9")
    with pytest.raises(Refused, match=r"abort: authority over 2 tenants \(7, 9\) has moved to the new store"):
        abort(split.spec)
    with pytest.raises(Refused, match=r"prepare --anew: authority over 2 tenants \(7, 9\) has moved to the new store"):
        _require_allowed(split.spec, split.ledger)
    with pytest.raises(Refused, match=r"finalize: .* over all rows but those of 2 tenants \(7, 9\): `changeover flags advance`"):
        finalize(split.spec)
    split.move(NEW, 200, 6000)
    split.move(OLD, 300, 7000, "9")
    with pytest.raises(Refused, match=r"finalize: the old store still has authority over the tenant 9: "):
        finalize(split.spec)
    with pytest.raises(Refused, match="abort: authority over all rows but those of the tenant 9 has moved"):
        abort(split.spec)
    split.move(OLD, 400, 8000)
    _require_allowed(split.spec, split.ledger)
    assert abort(split.spec) != [], "all are at the old store again"


def test_the_story_of_a_row_is_that_of_its_tenant(split: Split) -> None:
    split.move(NEW, 100, 5000, "7")
    split.move(OLD, 200, 6000, "7")
    for lsn in (90, 150, 250):
        for tenant in ("5", "7"):
            split.write(OLD, lsn + int(tenant), "I", {"who": tenant, "whom": "1"})
    split.old.execute("INSERT INTO follows VALUES (7, 1, 'here'), (5, 1, 'there')")
    mine, others = (explain(split.spec, [key, "1"]).parts for key in ("007", "5"))
    assert (mine["tenant"], mine["authority"]) == ("7", "old store, epoch 2")
    assert (others["tenant"], others["authority"]) == ("5", "old store, epoch 0")
    assert [event.get("version", event.get("standing", "")[:5]) for event in mine["spooled events"]] == [
        "0:0/61:0",
        "rogue",
        "2:0/101:0",
    ]
    assert [event["version"] for event in others["spooled events"]] == ["0:0/5F:0", "0:0/9B:0", "0:0/FF:0"]


def test_status_tells_the_tenants_and_both_lags(split: Split) -> None:
    assert status(split.spec).tenants == []
    split.move(NEW, 100, 5000, "7", "9")
    told = status(split.spec)
    assert (told.store, told.tenants) == (OLD, ["7", "9"])
    assert "    the new store has it over 2 tenants: 7, 9" in list(told.lines())
    assert told.loads[0]["behind_bytes"] > 0, "the others' writes go on to the new store"
    assert told.reverse_path is not None
    assert told.reverse_path.lacking is not None, "and the tenants' come back"
    split.move(NEW, 200, 6000)
    told = status(split.spec)
    assert (told.store, told.tenants, told.loads[0]["behind_bytes"]) == (NEW, [], None)
    split.move(OLD, 300, 7000, "9")
    told = status(split.spec)
    assert "    the old store has it over 1 tenant: 9" in list(told.lines())
    assert told.loads[0]["behind_bytes"] > 0, "replay goes on for it"


@given(st.lists(st.tuples(st.sampled_from([OLD, NEW]), st.sampled_from(["", "7", "9", "7 9"])), max_size=6), st.booleans())
def test_each_event_has_one_answer_whoever_is_asked(made: list[tuple[str, str]], takes_over: bool) -> None:
    changes: list[Authority] = []
    for place, (store, names) in enumerate(made, 1):
        if moving(changes, store, names.split() or None) is not None:
            changes += [replace(one, epoch=place) for one in moves((store, 100 * place, 1000 + 100 * place, names))]
    carried = {change.epoch for change in changes if change.store == NEW}
    offered = sections(changes, takes_over=takes_over, carried=carried)
    for tenant in ("7", "9", "5"):
        log = authority_epochs(changes, tenant)
        assert [held for held, whose in shares(changes).items() if tenant in whose] == [log[-1]._replace(tenant="")]
        assert (tenant in (epochs.at(changes, OLD) or Tenants(frozenset(), others=False))) == (log[-1].store == OLD)
        for applied in range(0, 800, 50):
            coming = [t.epoch for t in log if t.store == OLD and t.until > applied]
            assert epoch_to_come(changes, applied) <= min(coming, default=len(made)), "the floor would refuse what is to come"
        for store, lsn in [(OLD, 50 + 100 * n) for n in range(8)] + [(NEW, 1050 + 100 * n) for n in range(8)]:
            version = stamped(log, tenant, store, Version(0, lsn, 0))
            here = [one for part in offered for one in part if one.store == store and one.since <= lsn < one.until]
            mine = [one.epoch for one in here if tenant in one.tenants]
            assert mine == ([version.epoch] if version is not None and not (takes_over and store == NEW) else [])
            absent = [whose for first, last, whose in absences(changes, store, 0) if first <= lsn < last]
            assert any(tenant in whose for whose in absent) == (standing(log, tenant, store, lsn, False) is Standing.ROGUE)


def test_what_a_tenant_writes_right_after_its_move_is_not_passed_by(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    path = reverse_setup.open_path(split.spec, split.ledger)
    assert path is not None
    place = path.l0
    split.move("new", 100, place + 10, "1")
    split.write("new", place + 20, INSERT, {"a": "1", "b": "1"})
    back = ReverseStream(split.spec, cast(Any, None), split.ledger, {})
    read = back.reach

    def a_move_later() -> int:
        found = read()
        split.move("new", 200, place + 30, "2")
        split.write("new", place + 40, INSERT, {"a": "2", "b": "1"})
        return found

    monkeypatch.setattr(back, "reach", a_move_later)
    parts, reach = back.plan()
    offered = [one for section in parts for one in section if "2" in one.tenants and one.since <= place + 40 < one.until]
    assert [one.epoch for one in offered] == [2], "the log is read behind the reach"
    assert reach <= place + 30
