"""The tour: which reasons against a stage it waits for, which it verifies for, and at which it ends; and what it says of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.demo import tour
from changeover.demo.schema import SPEC
from changeover.errors import NotReady
from changeover.flags.observed import Observation, Observations
from changeover.flags.readiness import Evidence, objections
from changeover.flags.rights import Rights
from changeover.jobs.health import LAG_BYTES
from changeover.jobs.ledger.records import Heartbeat, Load, VerdictRow
from changeover.jobs.reverse.path import State
from changeover.verifiers.compare.verdict import CLASSES, Positions, Verdict

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
FOLLOWS = "public.follows"
OPEN = State("0/1", None, "active", None, 0, None, ())


def verdict_row(word: str, at: datetime = NOW) -> VerdictRow:
    return VerdictRow(1, at, FOLLOWS, "store", word, "shadow", {})


def evidence(**more: Any) -> Evidence:
    """Return evidence for shadow to live against which nothing speaks, but for what is given."""
    counts = {"comparisons": {"at_stage": {"stage": "shadow", "compared": 200, "mismatched": 0}}}
    made = Evidence(
        now=NOW, before=Stage.SHADOW, after=Stage.LIVE, verdicts=[verdict_row("equal")],
        loads=[Load(FOLLOWS, "store", "closed", LAG_BYTES, False, 0, 0, 0)],
        heartbeats=[Heartbeat("web-1", NOW, "shadow", 0, counts)], observations=Observations(),
        stage_since=NOW - timedelta(minutes=5), mirrored_since=0, source_lsn=LAG_BYTES, capture_active=True, sources=(FOLLOWS,),
        target="store", reverse_path=OPEN,
    )  # fmt: skip
    return replace(made, **more)


AT_NEW = Observations(1, Observation(1, Origin.NEW))
MISMATCHED = {"comparisons": {"at_stage": {"stage": "shadow", "compared": 200, "mismatched": 1}}}
FAILED = {
    "comparisons": {"at_stage": {"stage": "shadow", "compared": 200, "mismatched": 0}},
    "mirror_new": {"last_failure": [(NOW + timedelta(seconds=1)).isoformat(), "x"]},
}


@pytest.mark.parametrize(
    ("more", "lasting", "to_verify"),
    [
        ({}, 0, False),
        ({"heartbeats": []}, 0, False),
        ({"heartbeats": [Heartbeat("web-1", NOW, "dualwrite", 0, {})]}, 0, False),
        ({"capture_active": False}, 0, False),
        ({"source_lsn": 3 * LAG_BYTES}, 0, False),
        ({"observations": AT_NEW, "reverse_path": replace(OPEN, slot="inactive", behind_bytes=LAG_BYTES + 1)}, 0, False),
        ({"before": Stage.DUALWRITE, "after": Stage.SHADOW, "everybodys": Stage.SHADOW, "mirrored_since": 2 * LAG_BYTES}, 0, False),
        ({"verdicts": []}, 0, True),
        ({"verdicts": [verdict_row("different")]}, 0, True),
        ({"verdicts": [verdict_row("equal", NOW - timedelta(hours=25))]}, 0, True),
        ({"heartbeats": [Heartbeat("web-1", NOW, "shadow", 0, FAILED)]}, 0, True),
        ({"heartbeats": [Heartbeat("web-1", NOW, "shadow", 0, MISMATCHED)]}, 1, False),
        ({"loads": [Load(FOLLOWS, "store", "loading", LAG_BYTES, False, 0, 0, 0)]}, 1, False),
        ({"stopped": {FOLLOWS: "TRUNCATE"}}, 1, False),
        ({"rights": Rights(reasons=["app may not write"])}, 1, False),
    ],
)  # fmt: skip
def test_each_reason_of_readiness_is_waited_for_verified_for_or_the_end(
    more: dict[str, Any], lasting: int, to_verify: bool
) -> None:
    reasons = objections(evidence(**more))
    assert bool(reasons) == bool(more), "the case is of a reason"
    found = tour.what_helps(reasons)
    assert (len(found[0]), found[1]) == (lasting, to_verify), reasons


@pytest.mark.parametrize("stage", [Stage.LIVE, Stage.RAMPDOWN])
def test_a_difference_is_named_with_the_stage_that_was_asked_for(stage: Stage) -> None:
    verdict = Verdict(
        run="r1", table=FOLLOWS, target="store", positions=Positions(1, "0/1"), checked_at="", seconds=1.0, key=("id",),
        source_rows=3, target_rows=2, equal_rows=2, counts={**dict.fromkeys(CLASSES, 0), "missing": 1}, columns={}, duplicates={},
        sample=(), source_ranges=(), target_ranges=(), difference_rows=1, kept=1,
    )  # fmt: skip
    with pytest.raises(NotReady) as refused:
        tour._require_equal([verdict], stage)
    assert str(refused.value) == f"not ready for {stage.value}: store is different: 1 missing"
    tour._require_equal([replace(verdict, counts=dict.fromkeys(CLASSES, 0))], stage)


def test_the_demos_spec_states_its_reverse() -> None:
    assert "[table.reverse]" in SPEC


def test_damage_is_done_after_the_first_verdict_and_once() -> None:
    names = [step.name for step in tour.steps(["ghost", "truncate", "ghost"])]
    assert names == ["check", "plan", "prepare", "capture", "backfill", "replay", "verify", "break ghost, truncate"]
    assert tour.steps([]) == tour.STEPS
