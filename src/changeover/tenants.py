"""Tenants: groups of a table's rows whose write authority moves together, known by name (pure).

Some of them are those that are named, or all but those: every row is of either, one of a tenant that nobody has seen yet too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

Tenant = str | int | UUID
"""The value of a row in the column that `flag.context` names."""


def as_text(value: Any) -> str | None:
    """Return a tenant as PostgreSQL prints it, None for a value that is of no type of a tenant (pure).

    Args:
        value: The tenant as the application has it.

    Returns:
        The text, None for a value that is no tenant.
    """
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, (int, UUID)) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class Tenants:
    """Some tenants of a table's rows: those that are named, or with `others` all but those."""

    names: frozenset[str] = frozenset()
    others: bool = True

    def __contains__(self, tenant: str) -> bool:
        return (tenant in self.names) is not self.others


EVERY = Tenants()
"""All rows, whatever tenant they are of."""


NAMED = 5
"""How many tenants a sentence names."""


def describe(tenants: Tenants) -> str:
    """Return tenants as a person reads them; of many, how many and the first few.

    Args:
        tenants: The tenants.

    Returns:
        A part of a sentence.
    """
    if tenants == EVERY:
        return "all rows"
    names, count = listed(sorted(tenants.names)), len(tenants.names)
    what = f"the tenant {names}" if count == 1 else f"{count:,} tenants ({names})"
    return f"all rows but those of {what}" if tenants.others else what


def listed(names: Sequence[str]) -> str:
    """Return the first few names.

    Args:
        names: The tenants' names.

    Returns:
        NAMED of them at most, with commas between.
    """
    return ", ".join([*names[:NAMED], *(["…"] if len(names) > NAMED else [])])
