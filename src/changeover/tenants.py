"""Cohorts: groups of a table's rows whose write authority moves together, told by name (pure).

Some of them are those that are named, or all but those: every row is of either, one of a cohort that nobody has seen yet too.
"""

from __future__ import annotations

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
