"""Division: whether a migration's rows can move tenant by tenant, and why not; it looks and changes nothing.

Each rule is one that the proof of split authority needs. Both stores tell a row's tenant from its
key, in the same text. No unique index can set rows of two tenants against each other, while both
stores draw values from sequences of their own. Sequences can be moved while others draw. Reverse
replication is there, because a tenant that moves back leaves no moment at which the mirror alone
has everything. `check` and `prepare` print every reason. Runs on the driver, without Spark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from psycopg import sql

from changeover.jobs.access import grants
from changeover.jobs.guarantee import assumptions
from changeover.jobs.guarantee.assumptions import Asked, Moment
from changeover.jobs.preflight.obstacles import obstacles
from changeover.jobs.preflight.rules import Preflight, preflight
from changeover.jobs.source import replication
from changeover.jobs.source.catalog import SourceTable, source_table, target_as_source
from changeover.jobs.transform.tenancy import new_column, old_column, required
from changeover.names import qualified
from changeover.session import Connection, application_name, connect
from changeover.spec import Spec, Table

FAMILIES = (re.compile(r"smallint|integer|bigint"), re.compile(r"text|character varying(\(\d+\))?"), re.compile("uuid"))
"""Types of which PostgreSQL writes equal values as the same text, and which of them write each other's."""

UNIQUE = """
SELECT i.indexrelid::regclass::text FROM pg_index i
WHERE i.indrelid IN (SELECT %(table)s::regclass UNION SELECT relid FROM pg_partition_tree(%(table)s::regclass))
    AND (i.indisunique OR i.indisexclusion) AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = i.indrelid
        AND a.attname = %(column)s AND a.attnum = ANY ((i.indkey::smallint[])[:i.indnkeyatts - 1]))
ORDER BY 1
"""
"""Indexes by which a row can stand in the way of another tenant's."""


def examined(spec: Spec, moment: Moment = Moment.CHECK) -> Preflight:
    """Return what stands against the plan (driver; looks only).

    That is rules of the preflight, broken assumptions, and why no tenant moves alone.

    Args:
        spec: The migration's spec.
        moment: When it is asked.

    Returns:
        The findings: reasons, grants, notes and the source tables.
    """
    findings = preflight(spec)
    with connect(spec.source.dsn.resolve(), application_name(spec.name, "check")) as old:
        findings.reasons = assumptions.sentences(moment, Asked(spec, old, plan=tuple(findings.reasons)))
    findings.reasons += [why for why in indivisible(spec) if not any(reason.endswith(why) for reason in findings.reasons)]
    return findings


def indivisible(spec: Spec) -> list[str]:
    """Return why tenants can't move one by one, nothing where the spec asks for none (driver).

    A fence asks again: an index may have been built since, as one is on a new table that was loaded
    without.

    Args:
        spec: The migration's spec.

    Returns:
        Reasons, each a sentence; nothing where the spec asks for none.
    """
    if spec.flag is None or spec.flag.context is None:
        return []
    application, dsn = application_name(spec.name, "check"), spec.targets[spec.flag.target].dsn_value
    reasons: list[str] = []
    with connect(spec.source.dsn.resolve(), application) as old, connect(dsn, application) as new:
        for table in spec.tables:
            if (old_table := source_table(old, table)) is not None:
                reasons += _indivisible(spec, table, old_table, old, new)
        why = obstacles(spec, old, new, replication.slot_of(spec))
    return reasons + [f"tenants move one by one only where they can come back: {one}" for one in why]


def _indivisible(spec: Spec, table: Table, old_table: SourceTable, old: Connection, new: Connection) -> Iterator[str]:
    """Yield why a table's rows can't move tenant by tenant."""
    column = required(old_column(spec), spec)
    if table.function is not None:
        yield f"{old_table.source} has a function, after which nobody can tell a row's tenant: leave flag.context out"
        return
    if column not in old_table.identity:
        key = ", ".join(old_table.identity)
        yield (
            f"{column} (flag.context) is not in the key of {old_table.source} ({key}), so a delete would not tell whose row it was"
        )
        return
    there = new_column(spec, table)
    if there is None:
        yield f"no key column of {table.target} is {column} (flag.context) alone, so the new store can't tell whose row it is"
        return
    new_table = source_table(new, target_as_source(table))
    yield from _unlike(old_table, column, new_table, there)
    for connection, one, name in ((old, old_table, column), (new, new_table, there)):
        if one is not None:
            yield from _crossing(connection, one, name)


def _unlike(old_table: SourceTable, column: str, new_table: SourceTable | None, there: str) -> Iterator[str]:
    """Yield why a tenant may read otherwise in the two stores; a new table that is not there yet is given the old type."""
    own = next(c.type for c in old_table.columns if c.name == column)
    family = next((one for one in FAMILIES if one.fullmatch(own)), None)
    if family is None:
        yield (
            f"{old_table.source}.{column} (flag.context) is of the type {own}: a tenant is an integer, a text, a varchar or a uuid"
        )
        return
    other = next((c.type for c in new_table.columns if c.name == there), None) if new_table is not None else own
    if new_table is not None and (other is None or not family.fullmatch(other) or not _as_long(own, other)):
        yield (
            f"{new_table.source}.{there} is of the type {other} and {old_table.source}.{column} of {own}:"
            " a tenant must read alike in both"
        )


def _as_long(own: str, other: str) -> bool:
    """Return whether a text of one type is never cut in another: a varchar drops spaces beyond its length without a word."""
    length, limit = (re.search(r"\((\d+)\)", one) for one in (own, other))
    return limit is None or (length is not None and int(length[1]) <= int(limit[1]))


def _crossing(connection: Connection, table: SourceTable, column: str) -> Iterator[str]:
    """Yield what of one store's table would bring rows of two tenants together."""
    schema, name = qualified(table.source)
    asked = {"table": sql.Identifier(schema, name).as_string(connection), "column": column}
    for (index,) in connection.execute(UNIQUE, asked).fetchall():
        yield (
            f"the index {index} of {table.source} is unique without {column}: while tenants are at two stores both may take one"
            f" value, and one of the rows would never come across; add {column} to it"
        )
    yield from map(str, grants.of_sequences(connection, schema, name, owning=True))
