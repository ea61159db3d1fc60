"""Tenancy: which column of a table says whose row it is, in the old store and in the new one.

A tenant is a row's value in the column that `flag.context` names, as text. It is part of the row's key in both stores, so that a
delete bears it too, and a row that changes it is another row. Whose rows are where follows from the authority log. Everything here
is pure.
"""

from __future__ import annotations

from changeover.errors import SpecError
from changeover.jobs.transform.derivation import origin
from changeover.spec import Flag, Spec, Table


def flag_of(spec: Spec) -> Flag:
    """Return the spec's flag.

    Args:
        spec: The spec.

    Returns:
        Its `[flag]`.

    Raises:
        SpecError: The spec has no `[flag]`.
    """
    if spec.flag is None:
        raise SpecError(spec.path, "flag", "is missing: name the flag's key, its target and its data file")
    return spec.flag


def required(column: str | None, spec: Spec) -> str:
    """Return the column of tenants, where there must be one because they move one by one.

    Args:
        column: What `old_column` or `new_column` gave.
        spec: The spec.

    Returns:
        The same column.

    Raises:
        SpecError: It gave none.
    """
    if column is None:
        raise SpecError(spec.path, "flag.context", "is missing, or no key column of the new table has it: it says whose row it is")
    return column


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
