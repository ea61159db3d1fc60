"""The verdict: what a comparison found about one table at one pair of positions.

A verdict is data and is made only by a comparison that covered everything: it is "equal" or "different", never "not
checked"; a comparison without an answer raises `CouldNotCheck` instead. A verdict survives a JSON round trip unchanged,
and its printed sample is short and bears no value of a column that was named as sensitive.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from changeover.jobs.transform.masking import MASK, Mask
from changeover.position import format_lsn

MISSING = "missing"
EXTRA = "extra"
MISMATCHED = "mismatched"
DUPLICATE = "duplicate"
CANONICALISATION = "canonicalisation"

TYPE = "type"
"""Class of a difference that is a column's and no key's: its type is not the one that was planned."""

CLASSES: dict[str, str] = {
    MISSING: "in the source alone",
    EXTRA: "in the target alone",
    MISMATCHED: "in both, and at least one value differs",
    DUPLICATE: "more than once on one side",
    CANONICALISATION: "in both, the same values in another notation",
}
"""Class of a differing key -> what it says; every class but the last makes a verdict "different"."""

SAMPLE_SIZE = 20
SAMPLE_LENGTH = 200
"""Characters of a value that a sample shows; the table of differences holds it whole."""

LOOKED_FOR = "looked for"
NOT_LOOKED_FOR = "not looked for"
NOTHING_HIDDEN = Mask()

Bound = tuple[str, ...] | None
"""A bound of a range in PostgreSQL's text form, a part per key column; None is infinite."""


@dataclass(frozen=True)
class Range:
    """A key range that is read as one: lower <= key < upper."""

    number: int
    lower: Bound
    upper: Bound


@dataclass(frozen=True)
class RangeCount:
    """What one range of one side held: its rows, and how many of them belong to a key that differs."""

    range: Range
    rows: int
    different: int = 0


@dataclass(frozen=True)
class Difference:
    """One differing key of a sample: values as text, NULL as None, each side None where the key is not there."""

    kind: str
    key: Mapping[str, str | None]
    columns: tuple[str, ...]
    source: Mapping[str, str | None] | None
    target: Mapping[str, str | None] | None
    side: str | None = None
    """Of a duplicate: the side that holds the key more than once, "source", "target" or "both"."""


@dataclass(frozen=True)
class TableDiff:
    """What `diff.compare` found; `counts` are keys per class.

    `difference_rows` hold them, of which the table of differences has `kept`.
    """

    table: str
    store: str
    key: tuple[str, ...]
    source_rows: int
    target_rows: int
    equal_rows: int
    counts: Mapping[str, int]
    columns: Mapping[str, int]
    duplicates: Mapping[str, int]
    sample: tuple[Difference, ...]
    source_ranges: tuple[RangeCount, ...]
    target_ranges: tuple[RangeCount, ...]
    difference_rows: int
    kept: int
    seconds: float

    @property
    def differing_keys(self) -> int:
        """Return how many keys differ in more than notation."""
        return sum(count for kind, count in self.counts.items() if kind != CANONICALISATION)

    @property
    def equal(self) -> bool:
        """Return whether no key differs in more than notation."""
        return self.differing_keys == 0


@dataclass(frozen=True)
class CheckResult:
    """The answer of one `[[table.check]]`: its two queries, each run by its own side's engine."""

    name: str
    equal: bool
    source_rows: int
    target_rows: int
    first_difference: str | None = None


@dataclass(frozen=True)
class TypeDifference:
    """A column of one side whose type is another one than `prepare` planned; `present_type` is None where it is gone."""

    side: str
    column: str
    planned: str
    present_type: str | None

    def __str__(self) -> str:
        now = "is gone" if self.present_type is None else f"has the type {self.present_type}"
        return f"column {self.column} of the {self.side} {now}, and {self.planned} was planned"


@dataclass(frozen=True)
class Positions:
    """The moment that a verdict speaks of: a source LSN in bytes, and the target's LSN as text or `version N`."""

    source_lsn: int
    target: str

    def __str__(self) -> str:
        return f"source {format_lsn(self.source_lsn)}, target {self.target}"


@dataclass(frozen=True)
class Recheck:
    """Keys that differed at first and were judged again: in the spool still, written ahead of X, or ever changing.

    None of them is left unjudged: a key without a judgement makes the comparison `CouldNotCheck`.
    """

    rechecked: int = 0
    in_flight: int = 0
    ahead: int = 0
    hot: int = 0


@dataclass(frozen=True)
class Verdict:
    """What was proved about one table in one target; `seconds` is the whole check, `checked_at` is ISO 8601 in UTC."""

    run: str
    table: str
    target: str
    positions: Positions
    checked_at: str
    seconds: float
    key: tuple[str, ...]
    source_rows: int
    target_rows: int
    equal_rows: int
    counts: Mapping[str, int]
    columns: Mapping[str, int]
    duplicates: Mapping[str, int]
    sample: tuple[Difference, ...]
    source_ranges: tuple[RangeCount, ...]
    target_ranges: tuple[RangeCount, ...]
    difference_rows: int
    kept: int
    checks: tuple[CheckResult, ...] = ()
    recheck: Recheck = field(default_factory=Recheck)
    types: tuple[TypeDifference, ...] = ()
    canonicalisation: str = LOOKED_FOR

    @classmethod
    def of(
        cls, diff: TableDiff, *, run: str, positions: Positions, checked_at: str, seconds: float,
        checks: Sequence[CheckResult] = (), recheck: Recheck | None = None, mask: Mask = NOTHING_HIDDEN,
        types: Sequence[TypeDifference] = (),
    ) -> Verdict:  # fmt: skip
        """Bind what a comparison found to its moment.

        Args:
            diff: What the comparison found.
            run: The run's name.
            positions: The source's LSN in bytes, and the target's position as text.
            checked_at: When it was, in ISO 8601.
            seconds: How long it took.
            checks: The checks' results.
            recheck: What came of keys that were in flight.
            mask: What it hides is in no sample, no bound of a range, and no answer of a check.
            types: The columns of another type than planned.

        Returns:
            The verdict.
        """
        shown_checks = tuple(replace(check, first_difference=None) if mask.bounds else check for check in checks)
        return cls(
            run=run, table=diff.table, target=diff.store, positions=positions, checked_at=checked_at, seconds=seconds,
            key=diff.key, source_rows=diff.source_rows, target_rows=diff.target_rows, equal_rows=diff.equal_rows,
            counts={**diff.counts, TYPE: len(types)} if types else diff.counts, types=tuple(types),
            columns=diff.columns, duplicates=diff.duplicates,
            sample=tuple(masked(difference, mask) for difference in diff.sample[:SAMPLE_SIZE]),
            source_ranges=_shown(diff.source_ranges, mask), target_ranges=_shown(diff.target_ranges, mask),
            difference_rows=diff.difference_rows, kept=diff.kept,
            checks=shown_checks, recheck=recheck or Recheck(),
        )  # fmt: skip

    @property
    def differing_keys(self) -> int:
        """Return how many keys differ in more than notation."""
        return sum(count for kind, count in self.counts.items() if kind not in (CANONICALISATION, TYPE))

    @property
    def equal(self) -> bool:
        """Return whether no key differs in more than notation, no column in its type, and every check's two answers agree."""
        return self.differing_keys == 0 and not self.types and all(check.equal for check in self.checks)

    @property
    def word(self) -> str:
        """Return "equal" or "different"; there is no third word."""
        return "equal" if self.equal else "different"

    @property
    def truncated(self) -> bool:
        """Return whether more differing rows were found than the table of differences keeps."""
        return self.kept < self.difference_rows

    def to_json(self) -> str:
        """Return the verdict as a JSON object, what it says in one word included.

        Returns:
            The JSON, on one line.
        """
        return json.dumps(self.document(), ensure_ascii=False)

    def document(self) -> dict[str, Any]:
        """Return what `to_json` writes, as plain dicts and lists.

        Returns:
            The object, as `json.dumps` takes it.
        """
        return {
            "verdict": self.word,
            "canonicalisation_note": self.canonicalisation_note,
            "source_position": format_lsn(self.positions.source_lsn),
            **asdict(self),
        }

    @property
    def canonicalisation_note(self) -> str:
        """Return what the verdict says about values that differ in notation alone."""
        if self.canonicalisation != LOOKED_FOR:
            return f"canonicalisation-only differences: {self.canonicalisation}"
        count = self.counts.get(CANONICALISATION, 0)
        return f"canonicalisation-only differences: {count} {'key' if count == 1 else 'keys'}"

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """Return the verdict that `to_json` wrote.

        Args:
            text: The JSON.

        Returns:
            The verdict.
        """
        given = json.loads(text)
        derived = ("verdict", "canonicalisation_note", "source_position")
        plain = {name: value for name, value in given.items() if name not in derived}
        return cls(**{name: _READ[name](value) if name in _READ else value for name, value in plain.items()})


def masked(difference: Difference, mask: Mask) -> Difference:
    """Return a difference as it may be shown."""
    return replace(
        difference,
        key=mask.row(difference.key),
        source=None if difference.source is None else mask.row(difference.source),
        target=None if difference.target is None else mask.row(difference.target),
    )


def _shown(counts: Sequence[RangeCount], mask: Mask) -> tuple[RangeCount, ...]:
    """Bounds are keys of real rows."""

    def hide(bound: Bound) -> Bound:
        return (MASK,) if mask.bounds and bound is not None else bound

    return tuple(
        replace(count, range=replace(count.range, lower=hide(count.range.lower), upper=hide(count.range.upper))) for count in counts
    )


def _bound(given: Sequence[str] | None) -> Bound:
    return None if given is None else tuple(given)


def _range_counts(given: Sequence[Mapping[str, Any]]) -> tuple[RangeCount, ...]:
    return tuple(
        RangeCount(
            Range(item["range"]["number"], _bound(item["range"]["lower"]), _bound(item["range"]["upper"])),
            item["rows"],
            item["different"],
        )
        for item in given
    )


_READ: dict[str, Any] = {
    "positions": lambda given: Positions(**given),
    "key": tuple,
    "sample": lambda given: tuple(Difference(**{**item, "columns": tuple(item["columns"])}) for item in given),
    "source_ranges": _range_counts,
    "target_ranges": _range_counts,
    "checks": lambda given: tuple(CheckResult(**item) for item in given),
    "recheck": lambda given: Recheck(**given),
    "types": lambda given: tuple(TypeDifference(**item) for item in given),
}
"""Field -> how it comes back from plain JSON; a field that is not here is plain already."""
