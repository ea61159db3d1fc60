"""Keys of two stores: whether a target's key tells apart whatever texts the source's does.

A key under a coarser collation (a case-insensitive one) would let one source row overwrite another that is alive. Columns that hold
a source column as it is are looked at, and `narrowing` looks at their types; what an expression computes is judged row by row. It
looks only; runs on the driver.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psycopg import sql

from changeover.jobs.access.grants import usable
from changeover.jobs.transform.derivation import origin
from changeover.session import Connection, application_name, connect
from changeover.spec import Spec, Table, Target

COLUMNS = """
SELECT a.attname, c.collisdeterministic, to_jsonb(c)
FROM pg_attribute a JOIN pg_collation c ON c.oid = a.attcollation
WHERE a.attrelid = to_regclass(%s) AND a.attnum > 0 AND NOT a.attisdropped
"""

LOCALE = ("colllocale", "colliculocale", "collcollate")
"""What a collation's locale is called in a server's catalogue: from 17 on, from 15 on, before."""


@dataclass(frozen=True)
class Collation:
    """How a column's texts are compared: the collation's name, and what makes it what it is."""

    name: str
    deterministic: bool
    rules: tuple[Any, ...]


def objections(spec: Spec, target: Target) -> list[str]:
    """Return which key columns of a PostgreSQL target's tables can't tell apart what the source's can (driver; looks only)."""
    application = application_name(spec.name, "check")
    with connect(spec.source.dsn.resolve(), application) as old, connect(target.dsn_value, application) as new:
        readable = [t for t in spec.tables if all(usable(*at) for at in ((old, t.source_name[0]), (new, t.target_name[0])))]
        return [f"target {target.name}: {reason}" for table in readable for reason in coarser(old, new, table)]


def coarser(old: Connection, new: Connection, table: Table) -> list[str]:
    """Return which columns of a target's key can't tell apart what the source's can; a table that is not there has none."""
    theirs, ours = collations(old, *table.source_name), collations(new, *table.target_name)
    moved = {name: origin(table, name) for name in table.key}
    return [
        f"the key column {name} of {table.target} has the nondeterministic collation {ours[name].name}, and {table.source}.{source}"
        f" has {theirs[source].name}: rows that are two there would be one here; give both the same collation"
        for name, source in moved.items()
        if source in theirs and name in ours and _coarser(theirs[source], ours[name])
    ]


def _coarser(source: Collation, target: Collation) -> bool:
    """Return whether two texts that differ under the source's collation can be equal under the target's.

    A locale or rules that differ may fold what the source's do not.
    """
    return not target.deterministic and (source.deterministic or source.rules != target.rules)


def collations(connection: Connection, schema: str, name: str) -> dict[str, Collation]:
    """Return the collations of a table's columns by name; one whose type has none is left out."""
    rows = connection.execute(COLUMNS, [sql.Identifier(schema, name).as_string(connection)]).fetchall()
    return {column: Collation(row["collname"], deterministic, _rules(row)) for column, deterministic, row in rows}


def _rules(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a collation compares by, whatever the server's version calls it."""
    locale = next((row[name] for name in LOCALE if row.get(name) is not None), None)
    return row["collprovider"], locale, row.get("collicurules")
