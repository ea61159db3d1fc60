"""Cohorts: which column of a table says whose row it is, in the old store and in the new one.

A cohort is a row's value in the column that `flag.context` names, as text. It is part of the row's key in both stores, so that a
delete bears it too, and a row that changes it is another row. Everything here is pure.
"""

from __future__ import annotations

from changeover.jobs.transform import BARE
from changeover.spec import Spec, Table


def old_column(spec: Spec) -> str | None:
    """Return the column of the old tables that holds a row's cohort, None where all rows move at once."""
    return spec.flag.context if spec.flag is not None else None


def new_column(spec: Spec, table: Table) -> str | None:
    """Return the key column of a new table that holds the cohort unchanged, None where there is none."""
    for name in table.key:
        match = BARE.fullmatch(table.columns.get(name, name).strip())
        if match and match[1] == old_column(spec):
            return name
    return None
