"""Planned types: columns whose type is no longer the one that was planned (pure).

A comparison meets the target's values in the target's own type, so what a changed type did to a value may look the same on both
sides. Hence the type itself is compared, once a column, with the one that `prepare` recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from changeover.verifiers.compare.verdict import TypeDifference


def changed_types(side: str, planned: Mapping[str, str], looks: Sequence[Mapping[str, str]]) -> list[TypeDifference]:
    """Return the columns that had another type than planned in any of the looks at a table, or were not there.

    Args:
        side: `source` or `target`.
        planned: The planned type of each column.
        looks: The types that each look saw, by column.

    Returns:
        One difference a column.
    """
    return [
        TypeDifference(side, name, kind, others[0])
        for name, kind in planned.items()
        if (others := [types.get(name) for types in looks if types.get(name) != kind])
    ]
