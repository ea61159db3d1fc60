"""Privileges: what the application's roles need in either store, asked of the server and granted where it is missing.

`[application] roles` names the roles by which the application uses the stores. On a new table they
get the rights that they have on the old one. A mirrored write runs in the application's own
session, with its own rights. The gate's function is no SECURITY DEFINER: under one, the
application's triggers and policies would meet another user and another search_path. So a role gets
what that function touches, of one table, and in the ledger the authority log, its heartbeat and reads that mismatched.
What can't be granted is named.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import psycopg
from psycopg import sql

from changeover.jobs.access.grants import RELATION, Lack
from changeover.jobs.transform.derivation import derivations
from changeover.session import Connection
from changeover.spec import Spec, Table
from changeover.stores.base.pgtypes import Column
from changeover.stores.postgres import gate
from changeover.stores.tables import defaults, sequences

log = logging.getLogger(__name__)

USES = ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE")
"""What an application does to a table."""

OF_COLUMNS = ("SELECT", "INSERT", "UPDATE")
"""Rights that a role may have on single columns."""


@dataclass(frozen=True)
class Need:
    """A right that a role needs: the question whether it has it, and the statement that gives it."""

    role: str
    what: str
    asks: sql.Composed
    grant: sql.Composed

    def lack(self, connection: Connection) -> Lack:
        """Return it as what is missing."""
        return Lack(f"the role {self.role} has no {self.what}", self.grant.as_string(connection))


@dataclass(frozen=True)
class Uses:
    """The rights of a role on a table, and those that it has on single columns alone."""

    whole: frozenset[str]
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def writes(self) -> bool:
        """Return whether the role writes rows, so that its writes are mirrored."""
        return bool({"INSERT", "UPDATE"} & (self.whole | self.columns.keys()))


FULL = Uses(frozenset(USES[:4]))
"""What a role gets that the old store does not know."""


def present(connection: Connection, roles: Sequence[str]) -> list[str]:
    """Return the roles that a server has.

    An application may use another one in each store.

    Args:
        connection: A session with the store.
        roles: The roles that the spec names.

    Returns:
        Those that are there.
    """
    rows = connection.execute("SELECT rolname FROM pg_roles WHERE rolname = ANY (%s)", [list(roles)]).fetchall()
    return [role for role in roles if (role,) in rows]


def uses(connection: Connection, role: str, schema: str, name: str) -> Uses:
    """Return a role's rights on a table; nothing where there is no such table.

    Args:
        connection: A session with the store.
        role: A role of the application's.
        schema: The table's schema.
        name: The table's name.

    Returns:
        The rights; none where there is no such table.
    """
    row = connection.execute(RELATION, [schema, name]).fetchone()
    if row is None:
        return Uses(frozenset())
    has = "SELECT r FROM unnest(%s::text[]) AS r WHERE has_table_privilege(%s, %s::oid, r)"
    whole = frozenset(r for (r,) in connection.execute(has, [list(USES), role, row[0]]).fetchall())
    some = (
        "SELECT r, array_agg(a.attname::text ORDER BY a.attnum) FROM unnest(%s::text[]) AS r, pg_attribute a"
        " WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped AND has_column_privilege(%s, a.attrelid, a.attnum, r)"
        " GROUP BY r"
    )
    rest = [right for right in OF_COLUMNS if right not in whole]
    return Uses(whole, {r: tuple(columns) for r, columns in connection.execute(some, [rest, row[0], role]).fetchall()})


# -- what is needed where


def of_table(
    connection: Connection, role: str, schema: str, name: str, used: Uses, carried: Mapping[str, str] | None = None
) -> list[Need]:
    """Return what a role needs to use a table that is there.

    Args:
        connection: A session with the store.
        role: A role of the application's.
        schema: The table's schema.
        name: The table's name.
        used: Its rights on the old table.
        carried: Target columns that hold one of the old table's, and which one.

    Returns:
        What it needs.
    """
    origins = carried or {}
    needs = [_need(role, "USAGE", "SCHEMA", [schema])]
    needs += [_need(role, right, "TABLE", [schema, name]) for right in USES if right in used.whole]
    for right, columns in used.columns.items():
        here = [column for column, origin in origins.items() if origin in columns]
        needs += [_need(role, right, "TABLE", [schema, name], column) for column in here]
    if "INSERT" in used.whole or "INSERT" in used.columns:
        identities = {own.name for own in defaults.of_table(connection, schema, name).values() if own.identity}
        drawn = [one for one in sequences.sequences(connection, schema, name) if one.column not in identities]
        needs += [_need(role, "USAGE", "SEQUENCE", [one.schema, one.name]) for one in drawn]
        needs += [_need(role, "USAGE", "SCHEMA", [one.schema]) for one in drawn if one.schema != schema]
    return needs


def of_gate(role: str, table: gate.GatedTable) -> list[Need]:
    """Return what a role's mirrored writes need of ours beside a table (pure).

    Args:
        role: A role of the application's.
        table: The gated table.

    Returns:
        What it needs: the versions, the floor, and the function of the gate.
    """
    function = sql.SQL("{}(integer, pg_lsn, bigint, boolean, {})").format(table.function, table.table)
    asks = sql.SQL("SELECT has_function_privilege({}, {}, 'EXECUTE')").format(
        sql.Literal(role), sql.Literal(function.as_string(None))
    )  # fmt: skip
    row_versions = ["changeover", gate.our_name("versions", table.schema, table.name)]
    execute = _grant(role, sql.SQL("EXECUTE"), "FUNCTION", function)
    return [
        _need(role, "USAGE", "SCHEMA", ["changeover"]),
        _need(role, "SELECT", "TABLE", ["changeover", "gate"]),
        *(_need(role, right, "TABLE", row_versions) for right in ("SELECT", "INSERT", "UPDATE")),
        Need(role, f"EXECUTE on the gate of {table.target}", asks, execute),
    ]


def of_mirror(role: str, schema: str, name: str, used: Uses) -> list[Need]:
    """Return what a role needs on a table that its writes are mirrored to (pure).

    A row is put there whole, whatever was there.

    Args:
        role: A role of the application's.
        schema: The table's schema.
        name: The table's name.
        used: Its rights on the table that it writes to.

    Returns:
        What it needs.
    """
    if not used.writes:
        return []
    rights = ("SELECT", "INSERT", "UPDATE", *(("DELETE",) if "DELETE" in used.whole else ()))
    return [_need(role, right, "TABLE", [schema, name]) for right in rights]


def of_ledger(role: str) -> list[Need]:
    """Return what a router needs of the ledger (pure).

    Args:
        role: A role of the application's.

    Returns:
        What it needs: to read who has authority and how far the streams are, to say at which stage it acts, and to put reads on
        record that mismatched.
    """
    return [
        _need(role, "USAGE", "SCHEMA", ["changeover"]),
        *(_need(role, "SELECT", "TABLE", ["changeover", name]) for name in ("authority", "load", "flag")),
        *(_need(role, right, "TABLE", ["changeover", "heartbeat"]) for right in ("SELECT", "INSERT", "UPDATE")),
        *(_need(role, right, "TABLE", ["changeover", "read_difference"]) for right in ("SELECT", "INSERT", "DELETE")),
    ]


def _need(role: str, right: str, kind: str, name: Sequence[str], column: str | None = None) -> Need:
    """Return the need of one right on a table, a sequence or a schema, or on one column of a table."""
    thing, plain = sql.Identifier(*name), ".".join(name)
    asked = sql.Literal(plain if kind == "SCHEMA" else thing.as_string(None))
    wanted = sql.Literal("USAGE, UPDATE" if kind == "SEQUENCE" else right)  # either lets a session draw
    if column is not None:
        of_column = sql.SQL("{} ({})").format(sql.SQL(right), sql.Identifier(column))
        asks = sql.SQL("SELECT has_column_privilege({}, {}, {}, {})").format(
            sql.Literal(role), asked, sql.Literal(column), wanted
        )  # fmt: skip
        return Need(role, f"{right} on column {column} of {plain}", asks, _grant(role, of_column, kind, thing))
    function = sql.SQL(f"has_{kind.lower()}_privilege")
    asks = sql.SQL("SELECT {}({}, {}, {})").format(function, sql.Literal(role), asked, wanted)
    what = f"{right} on {plain}" if kind == "TABLE" else f"{right} on the {kind.lower()} {plain}"
    return Need(role, what, asks, _grant(role, sql.SQL(right), kind, thing))


def _grant(role: str, right: sql.Composable, kind: str, thing: sql.Composable) -> sql.Composed:
    return sql.SQL("GRANT {} ON {} {} TO {}").format(right, sql.SQL(kind), thing, sql.Identifier(role))


# -- asking and granting


def lacking(connection: Connection, needs: Iterable[Need]) -> list[Lack]:
    """Return which rights are missing, each once.

    Args:
        connection: A session with the store.
        needs: What roles need.

    Returns:
        What is missing, each once, with the statement that grants it.
    """
    return list(dict.fromkeys(need.lack(connection) for need in needs if not _has(connection, need)))


def grant(connection: Connection, needs: Iterable[Need]) -> None:
    """Grant what is missing; what our role may not grant is said, and readiness asks for it."""
    for need in needs:
        if _has(connection, need):
            continue
        try:
            with connection.transaction():
                connection.execute(need.grant)
        except psycopg.errors.InsufficientPrivilege:
            log.warning("an administrator has to grant it: %s", need.lack(connection))


def _has(connection: Connection, need: Need) -> bool:
    row = connection.execute(need.asks).fetchone()
    return bool(row and row[0])


def missing(spec: Spec, old: Connection, new: Connection, table: Table, source: Sequence[Column]) -> list[tuple[str, Lack]]:
    """Return what the application's roles lack in either store (driver).

    It is asked before prepare, as far as can be known then.

    Args:
        spec: The migration's spec.
        old: A session with the old store.
        new: A session with the new store.
        table: The table of the spec.
        source: The source table's columns.

    Returns:
        (`old` or `new`, what is missing).
    """
    carried = {name: one.origin for name, one in derivations(table, source).items() if one.origin is not None}
    known, lacks = present(old, spec.roles), []
    there = new.execute(RELATION, table.target_name).fetchone() is not None
    for role in present(new, spec.roles) if there else ():
        used = uses(old, role, *table.source_name) if role in known else FULL
        lacks += [("new", lack) for lack in lacking(new, of_table(new, role, *table.target_name, used, carried))]
    for role in known if spec.mirrors else ():
        needs = of_mirror(role, *table.source_name, uses(old, role, *table.source_name))
        lacks += [("old", lack) for lack in lacking(old, needs)]
    return lacks


def allow_table(spec: Spec, old: Connection, new: Connection, source: tuple[str, str], target: tuple[str, str],
                carried: Mapping[str, str]) -> None:  # fmt: skip
    """Give the application's roles the rights on a new table that they have on the old one.

    Args:
        spec: The migration's spec.
        old: A session with the old store.
        new: A session with the new store, which gives the rights.
        source: The old table, as (schema, name).
        target: The new table, as (schema, name).
        carried: By column of the new table the old one that is carried to it.
    """
    known = present(old, spec.roles)
    for role in present(new, spec.roles):
        used = uses(old, role, *source) if role in known else FULL
        grant(new, of_table(new, role, *target, used, carried))


def allow_gate(spec: Spec, connection: Connection, table: gate.GatedTable) -> None:
    """Let the application's mirrored writes pass the gate of a table, where it mirrors; safe to repeat.

    Args:
        spec: The migration's spec.
        connection: A session with the store.
        table: The gated table.
    """
    for role in present(connection, spec.roles) if spec.mirrors else ():
        grant(connection, of_gate(role, table))


def allow_ledger(spec: Spec, connection: Connection) -> None:
    """Let the application's routers follow the ledger; safe to repeat.

    Args:
        spec: The migration's spec.
        connection: A session with the ledger's server.
    """
    for role in present(connection, spec.roles):
        grant(connection, of_ledger(role))
