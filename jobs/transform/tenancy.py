"""Cohorts: which column of a table says whose row it is, in the old store and in the new one.

A cohort is a row's value in the column that `flag.context` names, as text. It is part of the row's key in both stores, so that a
delete bears it too, and a row that changes it is another row. Whose rows are where follows from the authority log. Everything here
is pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from changeover.jobs.ledger.epochs import EVERYTHING, named, shares
from changeover.jobs.ledger.records import Authority
from changeover.jobs.transform.derivation import origin
from changeover.spec import Spec, Table
from changeover.tenants import EVERY, Cohorts

TOLD = 5
"""How many cohorts a sentence names."""


def old_column(spec: Spec) -> str | None:
    """Return the column of the old tables that holds a row's cohort, None where all rows move at once."""
    return spec.flag.context if spec.flag is not None else None


def new_column(spec: Spec, table: Table) -> str | None:
    """Return the key column of a new table that holds the cohort unchanged, None where there is none."""
    own = old_column(spec)
    return next((name for name in table.key if own is not None and origin(table, name) == own), None)


def at(changes: Sequence[Authority], store: str) -> Cohorts | None:
    """Return whose rows a store has authority over now, None where it has none."""
    here = [whose for held, whose in shares(changes).items() if held.store == store]
    if not here:
        return None
    names = named(changes)
    others = any(EVERYTHING in whose for whose in here)
    mine = frozenset(name for name in names if any(name in whose for whose in here))
    return Cohorts(names - mine if others else mine, others)


def apart(changes: Sequence[Authority]) -> list[str]:
    """Return the cohorts that are not where those without a move of their own are."""
    shared = shares(changes)
    rest = next(held.store for held, whose in shared.items() if EVERYTHING in whose)
    elsewhere = [whose for held, whose in shared.items() if held.store != rest]
    return sorted(name for whose in elsewhere for name in whose.names)


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
