"""Tenancy: which column of a table says whose row it is, in the old store and in the new one.

A tenant is a row's value in the column that `flag.context` names, as text. It is part of the row's key in both stores, so that a
delete bears it too, and a row that changes it is another row. Whose rows are where follows from the authority log. Everything here
is pure.
"""

from __future__ import annotations

from changeover.jobs.transform.derivation import origin
from changeover.spec import Spec, Table


def old_column(spec: Spec) -> str | None:
    """Return the column of the old tables that holds a row's tenant (pure).

    Args:
        spec: The migration's spec.

    Returns:
        The column's name, None where all rows move at once.
    """
    return spec.flag.context if spec.flag is not None else None


def new_column(spec: Spec, table: Table) -> str | None:
    """Return the key column of a new table that holds the tenant unchanged (pure).

    Args:
        spec: The migration's spec.
        table: The table of the spec.

    Returns:
        The column's name, None where there is none.
    """
    own = old_column(spec)
    return next((name for name in table.key if own is not None and origin(table, name) == own), None)
