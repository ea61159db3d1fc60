"""Tenants: cohorts of a table's rows whose write authority moves together, told by name (pure).

Some of them are those that are named, or all but those: every row is of either, one of a cohort that nobody has seen yet too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cohorts:
    """Some cohorts of a table's rows: those that are named, or with `others` all but those."""

    names: frozenset[str] = frozenset()
    others: bool = True

    def __contains__(self, cohort: str) -> bool:
        return (cohort in self.names) is not self.others


EVERY = Cohorts()
"""All rows, whatever cohort they are of."""


TOLD = 5
"""How many cohorts a sentence names."""


def told(cohorts: Cohorts) -> str:
    """Return cohorts as a person reads them; of many, how many and the first few."""
    if cohorts == EVERY:
        return "all rows"
    names, count = listed(sorted(cohorts.names)), len(cohorts.names)
    what = f"the cohort {names}" if count == 1 else f"{count:,} cohorts ({names})"
    return f"all rows but those of {what}" if cohorts.others else what


def listed(names: Sequence[str]) -> str:
    """Return the first few names."""
    return ", ".join([*names[:TOLD], *(["…"] if len(names) > TOLD else [])])
