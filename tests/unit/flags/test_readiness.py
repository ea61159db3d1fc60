"""The gate's rules on heartbeats: what counts at a stage, what a rollback would lose, and where the mirror began."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.flags import history, readiness
from changeover.flags.fence.drain import unmirrored
from changeover.flags.history import Switch
from changeover.flags.observed import Observation, Observations
from changeover.flags.readiness import COMPARISONS, Evidence
from changeover.jobs.health import LAG_BYTES
from changeover.jobs.ledger.records import Heartbeat, Load
from changeover.jobs.reverse.path import State
from changeover.spec import Spec, load

if TYPE_CHECKING:
    from tests.support.fix_flags import Stores

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
LATELY, LONG_AGO = NOW - timedelta(seconds=1), NOW - timedelta(hours=1)
SWITCHED = NOW - timedelta(minutes=5)


def evidence(before: Stage, after: Stage, *beats: Heartbeat, **more: Any) -> Evidence:
    """Return evidence that nothing but the heartbeats speaks against."""
    made = Evidence(
        now=NOW, before=before, after=after, verdicts=[], loads=[], heartbeats=beats, observations=Observations(),
        stage_since=SWITCHED, mirrored_since=100, source_lsn=0, capture_active=True, sources=(), target="store",
    )  # fmt: skip
    return replace(made, **more)


def beat(stage: Stage, at: datetime = LATELY, epoch: int = 0, **counters: Mapping[str, Any]) -> Heartbeat:
    return Heartbeat(f"web-{len(counters)}", at, stage.value, epoch, counters)


def reads(stage: Stage, compared: int, mismatched: int = 0, at: datetime = LATELY) -> Heartbeat:
    here = {"stage": stage.value, "compared": compared, "mismatched": mismatched}
    return beat(stage, at, comparisons={"compared": 10**6, "mismatched": 10**6, "at_stage": here})


def test_a_flag_with_fewer_stages_is_asked_for_what_it_passes() -> None:
    four = frozenset({Stage.OFF, Stage.SHADOW, Stage.LIVE, Stage.COMPLETE})
    step = evidence(Stage.OFF, Stage.SHADOW, stages=four, replaying=False, mirrored_since=None)
    assert [line for line in readiness.objections(step) if "one step" in line or "dualwrite" in line] == []
    assert any("replay is not running" in line for line in readiness.objections(step))
    assert readiness.objections(replace(step, stages=tuple(Stage))) == ["off to shadow is not one step up"]
    reverse = State(None, "no key", "", None, None, None, ())
    last = evidence(Stage.OFF, Stage.COMPLETE, stages={Stage.OFF, Stage.COMPLETE}, reverse_path=reverse)
    assert not any("keep the old store" in line for line in readiness.objections(last)), "nothing does after complete"


@pytest.mark.parametrize(("before", "after"), [(Stage.SHADOW, Stage.LIVE), (Stage.LIVE, Stage.RAMPDOWN)])
def test_reads_of_the_stage_that_is_left_are_asked_for(before: Stage, after: Stage) -> None:
    def said(*beats: Heartbeat) -> str:
        return " ".join(readiness._comparisons_clean(evidence(before, after, *beats)))

    assert said(reads(before, COMPARISONS)) == ""
    assert said(reads(before, COMPARISONS - 1), reads(before, 1)) == ""
    assert f"only 40 reads were compared at {before.value}" in said(reads(before, 40))
    assert f"2 of 300 reads compared at {before.value} mismatched" in said(reads(before, 100, 1), reads(before, 200, 1))
    assert "only 0 reads" in said(reads(Stage.DUALWRITE, COMPARISONS)), "of another stage"
    assert "only 0 reads" in said(reads(before, COMPARISONS, 5, LONG_AGO)), "of an earlier time at this stage"
    assert "5 of 100" in said(reads(before, COMPARISONS, 5, NOW - timedelta(minutes=4))), "dead since, but of this time"


def test_reads_of_which_nobody_knows_keep_the_step_closed_where_they_are_the_most() -> None:
    here = {"stage": "shadow", "compared": COMPARISONS, "mismatched": 0, "inconclusive": COMPARISONS}
    found = evidence(Stage.SHADOW, Stage.LIVE, beat(Stage.SHADOW, comparisons={"at_stage": here}))
    assert readiness._comparisons_clean(found) == []
    here["inconclusive"] = COMPARISONS + 1
    assert "101 reads stayed inconclusive at shadow, more than the 100 that were compared" in readiness._comparisons_clean(found)[0]
    here["compared"] = 7
    assert "only 7 reads were compared at shadow, and 101 stayed inconclusive" in readiness._comparisons_clean(found)[0]


def test_before_both_stores_are_to_get_every_write_replay_runs() -> None:
    found = evidence(Stage.OFF, Stage.DUALWRITE, replaying=False)
    assert "replay is not running" in readiness._streams_run(found)[0]
    later = replace(found, before=Stage.DUALWRITE, after=Stage.SHADOW)
    for other in (replace(found, replaying=True), replace(found, mirrors=True), later):
        assert readiness._streams_run(other) == []


def test_without_a_way_back_the_new_store_takes_over_only_where_the_application_mirrors() -> None:
    way = State(None, "the new store can't tell", "missing", None, None, None, ())
    found = evidence(Stage.SHADOW, Stage.LIVE, reverse_path=way)
    assert "a rollback would lose every write: the new store can't tell" in readiness._way_back(found)[0]
    for other in (
        replace(found, mirrors=True), replace(found, before=Stage.LIVE, after=Stage.RAMPDOWN),
        replace(found, reverse_path=replace(way, lacking=None)),
    ):  # fmt: skip
        assert readiness._way_back(other) == []


@pytest.mark.parametrize("mirrors", [False, True])
def test_what_mirrors_is_the_same_in_the_spec_on_record_and_in_every_process(mirrors: bool) -> None:
    alike: Any = {"mirrors": mirrors}
    other: Any = {"mirrors": not mirrors}
    found = evidence(Stage.OFF, Stage.DUALWRITE, beat(Stage.OFF, **alike), beat(Stage.OFF, LONG_AGO, **other), mirrors=mirrors)
    assert readiness._mirror_agreed(found) == []
    [said] = readiness._mirror_agreed(replace(found, heartbeats=[beat(Stage.OFF, **other)]))
    assert "deploy it with this spec" in said
    [said] = readiness._mirror_agreed(replace(found, recorded_mirror="stream"))
    assert "on record as 'stream'" in said


@pytest.mark.parametrize("stage", [Stage.OFF, Stage.DUALWRITE, Stage.RAMPDOWN])
def test_a_stage_that_compares_nothing_is_asked_for_nothing(stage: Stage) -> None:
    assert readiness._comparisons_clean(evidence(stage, Stage.LIVE)) == []


def test_what_is_lost_is_of_some_epochs_and_of_the_dead() -> None:
    def lost(epochs: Collection[int], *beats: Heartbeat) -> int:
        return readiness.lost(beats, epochs, NOW)

    counts = {"lost": {"1": 7, "3": 2}, "queued": {"1": 1, "3": 4}}
    assert lost({3}, beat(Stage.LIVE, epoch=3, mirror_old=counts)) == 2, "the living still deliver what is queued"
    assert lost({3}, beat(Stage.LIVE, LONG_AGO, 3, mirror_old=counts)) == 6
    assert lost({3}, beat(Stage.LIVE, LONG_AGO, 3, mirror_old={"lost": {}, "queued": {"1": 5}})) == 0, "of an epoch that is over"
    assert lost({1, 3}, beat(Stage.LIVE, LONG_AGO, 3, mirror_old=counts)) == 14, "of tenants that went one after the other"
    assert lost({3}, beat(Stage.LIVE, epoch=3, mirror_new=counts)) == 0, "on the way to the new store"
    assert lost((), beat(Stage.SHADOW, epoch=4, mirror_old=counts)) == 0
    third = Observations(3, Observation(3, Origin.NEW))
    complete = evidence(Stage.RAMPDOWN, Stage.COMPLETE, beat(Stage.RAMPDOWN, epoch=3, mirror_old=counts), observations=third)
    assert "2 mirrored writes to the old store failed" in " ".join(readiness._mirror_whole(complete))
    assert readiness._mirror_whole(replace(complete, observations=Observations(5, Observation(5, Origin.NEW)))) == []


SPLIT = Observations(1, Observation(0, Origin.OLD), {"7": Observation(1, Origin.NEW)})
WHOLE = Observations(1, Observation(1, Origin.NEW))


@pytest.mark.parametrize(
    ("observations", "lag", "back"), [(Observations(), True, False), (SPLIT, True, True), (WHOLE, False, True)]
)
def test_while_tenants_stand_apart_both_directions_are_asked(observations: Observations, lag: bool, back: bool) -> None:
    way = State("0/1", None, "missing", None, LAG_BYTES + 1, None, ())
    loads = [Load("public.t", "store", "closed", 0, False, 0, 0, 0)]
    found = evidence(
        Stage.SHADOW,
        Stage.LIVE,
        observations=observations,
        loads=loads,
        source_lsn=LAG_BYTES + 1,
        capture_active=False,
        reverse_path=way,
    )
    said = " ".join(readiness._lag_small(found)), " ".join(readiness._reverse_open(found))
    assert ("capture is not running" in said[0], "bytes of WAL behind (at 0/0)" in said[0]) == (lag, lag)
    assert ("stream is not captured" in said[1], "behind the new one" in said[1]) == (back, back)


def test_reverse_replication_waits_for_the_mirror_of_what_goes_back_alone(stores: Stores) -> None:
    before = stores.ledger.now()
    stores.ledger.beat("web-1", "shadow", 2, {"mirror_old": {"depth": 3, "queued": {"2": 3}}})
    assert unmirrored(stores.ledger, before, {2}) == "the mirror of process web-1"
    assert unmirrored(stores.ledger, before, {1}) is None
    assert unmirrored(stores.ledger, stores.ledger.now(), {1}) == "process web-1 to say that its mirror is empty"


def test_a_step_of_some_tenants_asks_of_the_processes_everybodys_stage() -> None:
    again = evidence(Stage.SHADOW, Stage.LIVE, reads(Stage.LIVE, COMPARISONS), observations=WHOLE, everybodys=Stage.LIVE)
    assert readiness._processes_present(again) == readiness._comparisons_clean(again) == []
    late = replace(again, heartbeats=[reads(Stage.SHADOW, COMPARISONS)])
    assert "is at shadow, not live" in " ".join(readiness._processes_present(late))
    assert "only 0 reads were compared at live" in " ".join(readiness._comparisons_clean(late))


@pytest.mark.parametrize(("began", "said"), [(None, "not on record"), (501, "dualwrite began at 0/1F5"), (500, "")])
def test_replay_has_passed_where_the_mirror_began(began: int | None, said: str) -> None:
    loads = [Load("public.t", "store", "closed", 500, False, 0, 0, 0), Load("public.t", "lake", "closed", 0, False, 0, 0, 0)]
    found = readiness._replay_past_dualwrite(evidence(Stage.DUALWRITE, Stage.SHADOW, loads=loads, mirrored_since=began))
    assert (found == []) is (said == "")
    assert said in " ".join(found)
    assert readiness._replay_past_dualwrite(evidence(Stage.SHADOW, Stage.LIVE, mirrored_since=None)) == []


def turned(*stages: Stage) -> list[Switch]:
    """Return the turns through some stages, newest first; each bears its place as position."""
    return [Switch(NOW, before, after, place) for place, (before, after) in enumerate(itertools.pairwise(stages))][::-1]


@pytest.mark.parametrize(
    ("stages", "began"),
    [
        ((Stage.OFF,), None),
        ((Stage.OFF, Stage.DUALWRITE), 0),
        ((Stage.OFF, Stage.DUALWRITE, Stage.SHADOW, Stage.DUALWRITE), 0),
        ((Stage.OFF, Stage.DUALWRITE, Stage.OFF), None),
        ((Stage.OFF, Stage.DUALWRITE, Stage.OFF, Stage.DUALWRITE, Stage.SHADOW), 2),
    ],
)
def test_the_mirror_began_with_the_first_turn_of_those_that_kept_it(stages: tuple[Stage, ...], began: int | None) -> None:
    assert history.mirrored_since(turned(*stages)) == began


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
[flag]
key = "k"
target = "new"
[work]
path = "work"
"""


@pytest.fixture
def spec(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spec:
    monkeypatch.setenv("OLD_DSN", stores.old_dsn)
    monkeypatch.setenv("NEW_DSN", stores.new_dsn)
    path = tmp_path / "follows.toml"
    path.write_text(SPEC)
    return load(path)


def test_evidence_is_of_the_time_since_the_last_turn_by_the_ledgers_clock(
    stores: Stores, spec: Spec, eventually: Callable[..., None]
) -> None:
    collected = readiness.collect(spec, stores.ledger, Stage.SHADOW, Stage.LIVE)
    assert (collected.stage_since, collected.mirrored_since) == (None, None)
    history.record(stores.ledger, history.ADVANCED, Stage.OFF, Stage.DUALWRITE, 0x1F5, {})
    history.record(stores.ledger, history.FOLLOWED, Stage.DUALWRITE, Stage.SHADOW, None, {"epoch": 0})
    stores.ledger.audit(history.STEP, "refused", {"from": "shadow", "to": "live"})
    collected = readiness.collect(spec, stores.ledger, Stage.SHADOW, Stage.LIVE)
    newest = history.switches(stores.ledger)[0]
    assert (newest.before, newest.after, newest.at) == (Stage.DUALWRITE, Stage.SHADOW, collected.stage_since)
    assert collected.mirrored_since == 0x1F5
    assert stores.ledger.stage() == "shadow"
    stores.ledger.beat("web-1", "shadow", 0, {})
    collected = readiness.collect(spec, stores.ledger, Stage.SHADOW, Stage.LIVE)
    assert readiness._processes_present(collected) == []
    assert 0 <= (collected.now - collected.heartbeats[0].at).total_seconds() < 600
