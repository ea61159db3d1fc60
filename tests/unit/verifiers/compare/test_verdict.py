"""The verdict: two words, a JSON round trip, and nothing sensitive in its sample."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from changeover.jobs.transform.masking import MASK, Mask, hashed
from changeover.verifiers.compare.verdict import (
    CLASSES,
    NOT_LOOKED_FOR,
    CheckResult,
    Difference,
    Positions,
    Range,
    RangeCount,
    Recheck,
    TableDiff,
    Verdict,
)

TEXTS = st.one_of(st.none(), st.text(max_size=8))
VALUES = st.dictionaries(st.text(min_size=1, max_size=5), TEXTS, max_size=3)
BOUNDS = st.one_of(st.none(), st.lists(st.text(max_size=4), min_size=1, max_size=2).map(tuple))
DIFFERENCES = st.builds(
    Difference,
    kind=st.sampled_from(sorted(CLASSES)),
    key=VALUES,
    columns=st.lists(st.text(max_size=4), max_size=2).map(tuple),
    source=st.one_of(st.none(), VALUES),
    target=st.one_of(st.none(), VALUES),
    side=st.sampled_from([None, "source", "target", "both"]),
)
COUNTS = st.integers(0, 2**40)
RANGE_COUNTS = st.lists(st.builds(RangeCount, st.builds(Range, st.integers(0, 9), BOUNDS, BOUNDS), COUNTS, COUNTS), max_size=3)
DIFFS = st.builds(
    TableDiff,
    table=st.text(max_size=9), store=st.text(max_size=5), key=st.lists(st.text(max_size=3), max_size=2).map(tuple),
    source_rows=COUNTS, target_rows=COUNTS, equal_rows=COUNTS,
    counts=st.fixed_dictionaries(dict.fromkeys(CLASSES, COUNTS)), columns=st.dictionaries(st.text(max_size=5), COUNTS),
    duplicates=st.dictionaries(st.sampled_from(["source", "target", "both"]), COUNTS),
    sample=st.lists(DIFFERENCES, max_size=3).map(tuple),
    source_ranges=RANGE_COUNTS.map(tuple), target_ranges=RANGE_COUNTS.map(tuple),
    difference_rows=COUNTS, kept=COUNTS, seconds=st.floats(0, 1e6),
)  # fmt: skip
CHECKS = st.lists(st.builds(CheckResult, st.text(max_size=5), st.booleans(), COUNTS, COUNTS, TEXTS), max_size=2)


def diff_of(**counts: int) -> TableDiff:
    row = Difference("mismatched", {"id": "1"}, ("mail",), {"id": "1", "mail": "a@x"}, {"id": "1", "mail": None})
    return TableDiff(
        table="public.t", store="new", key=("id",), source_rows=3, target_rows=3, equal_rows=2,
        counts=dict.fromkeys(CLASSES, 0) | counts, columns={}, duplicates={}, sample=(row,), source_ranges=(),
        target_ranges=(), difference_rows=1, kept=1, seconds=0.5,
    )  # fmt: skip


def verdict_of(diff: TableDiff, **options: object) -> Verdict:
    return Verdict.of(
        diff, run="r1", positions=Positions(0x16B374D848, "16/B374D900"), checked_at="2026-11-21T12:00:00Z",
        seconds=1.5, **options,  # type: ignore[arg-type]
    )  # fmt: skip


@given(DIFFS, CHECKS, st.builds(Recheck, COUNTS, COUNTS, COUNTS, COUNTS))
def test_json_round_trip(diff: TableDiff, checks: list[CheckResult], recheck: Recheck) -> None:
    verdict = verdict_of(diff, checks=checks, recheck=recheck)
    assert Verdict.from_json(verdict.to_json()) == verdict


@pytest.mark.parametrize("kind", sorted(CLASSES))
def test_every_class_but_notation_is_different(kind: str) -> None:
    verdict = verdict_of(diff_of(**{kind: 1}))
    assert verdict.word == ("equal" if kind == "canonicalisation" else "different")
    assert diff_of(**{kind: 1}).equal == verdict.equal


def test_a_failed_check_is_different() -> None:
    assert verdict_of(diff_of(), checks=[CheckResult("sum", True, 1, 1)]).word == "equal"
    assert verdict_of(diff_of(), checks=[CheckResult("sum", False, 1, 1, "3 / 4")]).word == "different"


def test_the_note_on_notation() -> None:
    assert verdict_of(diff_of(canonicalisation=1)).canonicalisation_note == "canonicalisation-only differences: 1 key"
    unknown = Verdict.from_json(verdict_of(diff_of()).to_json().replace('"looked for"', f'"{NOT_LOOKED_FOR}"'))
    assert unknown.canonicalisation_note == "canonicalisation-only differences: not looked for"


def test_sensitive_values_are_masked_in_key_and_sides() -> None:
    verdict = verdict_of(diff_of(mismatched=1), mask=Mask(frozenset({"mail", "id"}), ("id",)))
    shown = verdict.sample[0]
    assert shown.key == {"id": hashed("1")}
    assert shown.source == {"id": hashed("1"), "mail": MASK}
    assert shown.target == {"id": hashed("1"), "mail": None}
    assert "a@x" not in verdict.to_json()


def test_bounds_and_answers_of_checks_are_hidden_too() -> None:
    halves = (RangeCount(Range(0, None, ("a@x",)), 1), RangeCount(Range(1, ("a@x",), None), 2))
    diff = replace(diff_of(), key=("mail",), sample=(), source_ranges=halves, target_ranges=halves)
    assert "a@x" in verdict_of(diff).to_json()
    answered = [CheckResult("mails", False, 1, 1, "source alone: a@x")]
    verdict = verdict_of(diff, mask=Mask(frozenset({"mail"}), ("mail",), bounds=True), checks=answered)
    assert "a@x" not in verdict.to_json()
    assert verdict.source_ranges[0] == RangeCount(Range(0, None, (MASK,)), 1)


def test_a_machine_reads_the_word_and_both_positions() -> None:
    document = json.loads(verdict_of(diff_of(extra=2)).to_json())
    assert document["verdict"] == "different"
    assert document["source_position"] == "16/B374D848"
    assert document["positions"] == {"source_lsn": 0x16B374D848, "target": "16/B374D900"}


def test_more_found_than_kept_is_said() -> None:
    assert not verdict_of(diff_of()).truncated
    assert Verdict.from_json(verdict_of(diff_of()).to_json().replace('"difference_rows": 1', '"difference_rows": 9')).truncated
