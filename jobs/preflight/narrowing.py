"""Narrowing: which columns would lose something in silence, because what they are carried into does not hold all of it (pure).

Load and verification go through one transform, so a cast that nobody stated would lose the same on both sides. It is refused before
anything is made; a loss that is meant is an expression of the spec's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from changeover.jobs.transform.derivation import derivations
from changeover.names import quoted
from changeover.spec import IDENTIFIER, Table
from changeover.stores.base.fits import loss
from changeover.stores.base.interface import Store
from changeover.stores.base.pgtypes import Column


def narrower(store: Store, table: Table, source: Sequence[Column], existing: Sequence[Column]) -> list[str]:
    """Return which columns of an existing target do not hold every value that is carried into them, and what to do."""
    there, by_name = {c.name: c for c in existing}, {c.name: c for c in source}
    return [
        f"target {store.name}: {table.target}.{name} has the type {store.type_of(there[name])}, which does not hold every value of"
        f" {table.source}.{own.name} ({own.type}): {_way_out(name, own, there[name])}"
        for name, derivation in derivations(table, source).items()
        if derivation.origin is not None and name in there
        for own in [by_name[derivation.origin]]
        if own.spark_type and not store.holds(own, there[name])
    ]


def _way_out(name: str, own: Column, there: Column) -> str:
    """Return what to do about a column that does not hold all that is carried into it."""
    stated = loss(own.name if IDENTIFIER.fullmatch(own.name) else quoted(own.name), own.type, there.type, there.spark_type)
    key = name if IDENTIFIER.fullmatch(name) else json.dumps(name, ensure_ascii=False)
    example = f", such as {key} = {json.dumps(stated, ensure_ascii=False)}" if stated else ""
    return f"widen it, or state the loss in [table.columns] by an expression of its own{example}"
