"""Likeness: what a target table lacks beside its source, so that a statement of the application's would go otherwise there.

An INSERT that leaves a column out is the common case: the old table fills it in, and the new one may refuse the row or hold NULL.
Of a table that prepare will make, it says what prepare can't take over; of one that is there, what it has not. These are notes and
no reasons: what the application will write to the new store is for its owner to know. It looks only. Runs on the driver.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from changeover.jobs.transform.derivation import derivations
from changeover.session import Connection
from changeover.spec import Table
from changeover.stores.base.pgtypes import Column
from changeover.stores.tables import defaults
from changeover.stores.tables.defaults import ALWAYS, Own

BESIDE = """
WITH t AS (SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s)
SELECT 'index', i.indexrelid::regclass::text, ARRAY(SELECT a.attname::text
    FROM unnest(i.indkey) WITH ORDINALITY AS k (number, place)
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.number ORDER BY k.place)
FROM t JOIN pg_index i ON i.indrelid = t.oid WHERE NOT i.indisprimary
UNION ALL SELECT CASE c.contype WHEN 'f' THEN 'foreign key' ELSE 'check' END, c.conname::text, ARRAY(SELECT a.attname::text
    FROM unnest(c.conkey) WITH ORDINALITY AS k (number, place)
    JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.number ORDER BY k.place)
FROM t JOIN pg_constraint c ON c.conrelid = t.oid WHERE c.contype IN ('c', 'f') ORDER BY 1, 2
"""
"""Indexes, checks and foreign keys of a table, with the columns that they are of."""


DRAWING = """
SELECT count(DISTINCT (f.adrelid, f.adnum)) FROM pg_depend d JOIN pg_attrdef f ON f.oid = d.objid
WHERE d.classid = 'pg_attrdef'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = %(sequence)s::regclass
"""


def notes(old: Connection, new: Connection, table: Table, source: tuple[Column, ...]) -> list[str]:
    """Return what the target table lacks beside its source, or will lack once prepare has made it."""
    before, after = defaults.of_table(old, *table.source_name), defaults.of_table(new, *table.target_name)
    carried = {name: one.origin for name, one in derivations(table, source).items() if one.origin is not None}
    lacks: list[str] = []
    for name, origin in carried.items():
        if after:
            lacks += _unlike(table, name, before[origin], after.get(name))
        else:
            lacks += [*_unmade(new, table, name, before[origin]), *_shared(old, table, before[origin])]
    lacks += _generated(table, before, after)
    return lacks + _beside(old, new, table, carried)


def _unmade(new: Connection, table: Table, name: str, own: Own) -> Iterator[str]:
    """Yield what prepare can't take over of a column."""
    column = f"{table.source}.{own.name}"
    if own.identity == ALWAYS and name not in table.key:
        yield (
            f"{column} is GENERATED ALWAYS AS IDENTITY outside the key: in the new table it is made BY DEFAULT, because no update"
            f" could bring its values otherwise"
        )
    if (why := defaults.why_not(new, own)) is not None:
        yield f"the default of {column} ({own.expression}) is not made in the new table ({why}): {_left_out(own.not_null)}"


def _shared(old: Connection, table: Table, own: Own) -> Iterator[str]:
    """Yield that other columns draw from a column's sequence too: in the new store it has one of its own."""
    for drawn in own.draws:
        row = old.execute(DRAWING, {"sequence": drawn.name}).fetchone()
        if row is not None and row[0] > 1:
            yield (
                f"the sequence {drawn.name} of {table.source}.{own.name} is drawn from by {row[0]:,} columns: in the new store this"
                f" one has a sequence of its own, and may draw a number that another one holds"
            )


def _unlike(table: Table, name: str, own: Own, there: Own | None) -> Iterator[str]:
    """Yield what a column that is there has not of what its source has."""
    if there is None:
        return
    column, source = f"column {name} of target table {table.target}", f"{table.source}.{own.name}"
    if own.filled and not own.generated and not there.filled:
        yield f"{column} has no {_called(own)}, as {source} has: {_left_out(there.not_null)}"
    elif own.expression is not None and not own.draws and there.expression != own.expression and not there.identity:
        yield f"{column} has the default {there.expression}, and {source} has {own.expression}"
    if own.not_null and not there.not_null:
        yield f"{column} may be NULL, and {source} may not"


def _called(own: Own) -> str:
    return "identity" if own.identity else f"default ({own.expression})"


def _left_out(not_null: bool) -> str:
    return "an INSERT that leaves it out " + ("will fail" if not_null else "will put NULL there")


def _generated(table: Table, before: Mapping[str, Own], after: Mapping[str, Own]) -> Iterator[str]:
    """Yield the generated columns that nobody computes in the new store."""
    for name, own in before.items():
        if not own.generated or name in table.columns:
            continue
        column = f"{table.source}.{name} is generated ({own.expression})"
        if after and name in after and not after[name].generated:
            yield f"{column}, and column {name} of target table {table.target} is not: nothing fills it"
        elif name not in after:
            yield f"{column}, and target table {table.target} has no such column"


def _beside(old: Connection, new: Connection, table: Table, carried: Mapping[str, str]) -> list[str]:
    """Return, for information, the indexes, checks and foreign keys that the new table has not, in one line."""
    names = {origin: name for name, origin in carried.items()}
    there = {(kind, tuple(columns)) for kind, _, columns in new.execute(BESIDE, table.target_name).fetchall()}
    lacking = [
        f"{kind} {name}"
        for kind, name, columns in old.execute(BESIDE, table.source_name).fetchall()
        if (kind, tuple(names.get(column, "") for column in columns)) not in there
    ]
    return [f"target table {table.target} has not what {table.source} has: {', '.join(lacking)}"] if lacking else []
