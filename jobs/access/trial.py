"""The trial: an application's role writes one row to the store that takes over, as it will, and everything is rolled back.

The row is a copy of one that is there, under a new key. Whatever the old store fills in by itself
is left out, as the application leaves it out. Nothing is tried where our role may not become the
application's, where a trigger of the user's would act, or where no such row can be made. It then
says so. Only what the application would meet as well is a failure. No value of a row is told.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import psycopg
from psycopg import sql

from changeover.errors import ChangeoverError
from changeover.session import Connection
from changeover.stores.tables import sequences
from changeover.stores.tables.defaults import ALWAYS, Own


@dataclass(frozen=True)
class Trial:
    """How it went: `failure` is what the application would meet, `untried` why nothing was tried; with neither it went well."""

    failure: str | None = None
    untried: str | None = None


@dataclass(frozen=True)
class Tried:
    """The table of a trial: what its columns do, its key, and the columns that the application leaves out."""

    schema: str
    name: str
    own: Mapping[str, Own]
    key: Sequence[str]
    left_out: Collection[str]

    @property
    def table(self) -> sql.Identifier:
        """Return its name for statements."""
        return sql.Identifier(self.schema, self.name)

    @property
    def given(self) -> list[str]:
        """Return the columns that an INSERT names."""
        return [name for name, own in self.own.items() if name not in self.left_out and not own.generated]

    @property
    def changed(self) -> list[str]:
        """Return the columns that an UPDATE may name."""
        return [name for name, own in self.own.items() if not own.generated and own.identity != ALWAYS]


ACTING = """
SELECT format('the trigger %%s', tgname) FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'D'
    AND tgname NOT LIKE 'changeover\\_%%' AND tgrelid IN (SELECT %(table)s::regclass UNION
        SELECT relid FROM pg_partition_tree(%(table)s::regclass))
UNION ALL SELECT format('the rule %%s', rulename) FROM pg_rewrite WHERE ev_class = %(table)s::regclass LIMIT 1
"""
BECOMES = {True: "SELECT pg_has_role(%s, 'SET')", False: "SELECT pg_has_role(%s, 'MEMBER')"}
LIMITS = "SET LOCAL lock_timeout = '2s'; SET LOCAL statement_timeout = '10s'; SET LOCAL row_security = on"
PASSED = "SELECT set_config('changeover.epoch', '2147483647', true)"
"""Lets the row past a refusal that stands already while tenants move one by one."""

MET = (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedTable, psycopg.errors.UndefinedFunction,
       psycopg.errors.GeneratedAlways, psycopg.errors.ObjectNotInPrerequisiteState)  # fmt: skip
"""What the application would meet as well; the server's words for it hold names alone."""

NUMBER, TIME = re.compile(r"smallint|integer|bigint|numeric"), re.compile(r"date|timestamp")
TEXT = re.compile(r"(?:text|character varying|character)(?:\((\d+)\))?")


def trial(connection: Connection, role: str, tried: Tried) -> Trial:
    """Insert, update and delete one row as a role, and roll it back; what its sequences have given out is not taken back.

    That does no harm: a number that was drawn and not used is a gap, and the fence moves sequences
    farther than that.

    Args:
        connection: A session with the store.
        role: A role of the application's.
        tried: The table and its columns.

    Returns:
        What failed, or why nothing was tried.
    """
    asked = {"table": tried.table.as_string(connection)}
    modern = connection.info.server_version >= 160000
    row = connection.execute(BECOMES[modern], [role]).fetchone()
    if not row or not row[0]:
        return Trial(untried=f"our role may not SET ROLE to {role}")
    if acting := connection.execute(ACTING, asked).fetchone():
        return Trial(untried=f"{acting[0]} on {tried.schema}.{tried.name} would act")
    try:
        for one in sequences.sequences(connection, tried.schema, tried.name):
            if one.indexed:  # past the rows that have arrived or come meanwhile, whose numbers it has not given out
                held = sequences.held(connection, tried.schema, tried.name, one)
                sequences.move_past(connection, one, sequences.ahead(one, held))
        return _judged(connection, role, tried)
    except ChangeoverError as error:
        return Trial(untried=str(error))


def _judged(connection: Connection, role: str, tried: Tried) -> Trial:
    try:
        with connection.transaction(force_rollback=True):
            connection.execute(LIMITS)
            connection.execute(PASSED)
            row = _row(connection, tried)
            if row is None:
                return Trial(untried=f"no new row of {tried.schema}.{tried.name} can be made up")
            connection.execute(sql.SQL("SET LOCAL ROLE {}").format(sql.Identifier(role)))
            return _written(connection, tried, row)
    except MET as error:
        return Trial(failure=error.diag.message_primary or type(error).__name__)
    except psycopg.errors.NotNullViolation as error:
        column = error.diag.column_name or ""
        if column in tried.left_out:
            return Trial(failure=f"an INSERT that leaves {column} out puts NULL there, which {tried.name} refuses")
        return Trial(untried=f"no new row can be made up: {column} is NOT NULL")
    except psycopg.Error as error:
        what = error.diag.constraint_name or type(error).__name__
        return Trial(untried=f"no new row of {tried.schema}.{tried.name} could be written ({what})")


def _written(connection: Connection, tried: Tried, row: Sequence[str | None]) -> Trial:
    """Insert, update and delete a row; the key is what the server says."""
    names, key = sql.SQL(", ").join(map(sql.Identifier, tried.given)), list(map(sql.Identifier, tried.key))
    values = sql.SQL("({}) VALUES ({})").format(names, sql.SQL(", ").join(sql.Placeholder() for _ in row))
    texts = sql.SQL(", ").join(sql.SQL("{}::text").format(k) for k in key)
    put = sql.SQL("INSERT INTO {} {} RETURNING {}").format(tried.table, values if row else sql.SQL("DEFAULT VALUES"), texts)
    inserted = connection.execute(put, row).fetchone()
    if inserted is None:
        return Trial(failure="its INSERT wrote no row")
    where = sql.SQL(" AND ").join(sql.SQL("{} = %s").format(k) for k in key)
    same = sql.SQL(", ").join(sql.SQL("{0} = {0}").format(sql.Identifier(name)) for name in tried.changed)
    steps = [("UPDATE", sql.SQL("UPDATE {} SET {} WHERE {}").format(tried.table, same, where))] if tried.changed else []
    steps += [("DELETE", sql.SQL("DELETE FROM {} WHERE {}").format(tried.table, where))]
    for what, statement in steps:
        if connection.execute(statement, inserted).rowcount != 1:
            return Trial(failure=f"its {what} does not meet the row that it has written")
    return Trial()


def _row(connection: Connection, tried: Tried) -> list[str | None] | None:
    """Return texts for the columns that are given, those of a row that is there under a new key; None where there can be none."""
    listed = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in tried.given)
    found = connection.execute(sql.SQL("SELECT {} FROM {} LIMIT 1").format(listed, tried.table)).fetchone() if tried.given else ()
    made = dict(zip(tried.given, found, strict=True)) if found is not None else _made_up(tried)
    if made is None:
        return None
    if not any(name in tried.left_out for name in tried.key):
        fresh = next(((name, value) for name in tried.key if (value := _fresh(connection, tried, name)) is not None), None)
        if fresh is None:
            return None
        made[fresh[0]] = fresh[1]
    return [made[name] for name in tried.given]


def _fresh(connection: Connection, tried: Tried, name: str) -> str | None:
    """Return a value that a column does not hold, None for a type of which none is known, or where it would take a whole scan."""
    kind = tried.own[name].type
    if kind == "uuid":
        return _value(connection, sql.SQL("SELECT gen_random_uuid()::text"))
    if match := TEXT.fullmatch(kind):
        return _value(connection, sql.SQL("SELECT left(md5(random()::text), {})").format(sql.Literal(int(match[1] or 32))))
    if name != tried.key[0]:  # the key's index begins with another column, so its greatest value is not at hand
        return None
    column = sql.Identifier(name)
    if NUMBER.match(kind):
        further = sequences.MARGIN if kind in ("integer", "bigint", "numeric") else 1
        greater = sql.SQL("SELECT (coalesce(max({}), 0) + {})::text FROM {}").format(column, sql.Literal(further), tried.table)
        return _value(connection, greater)
    if TIME.match(kind):
        later = sql.SQL("SELECT (coalesce(max({}), now()) + interval '1 day')::text FROM {}").format(column, tried.table)
        return _value(connection, later)
    return None


def _value(connection: Connection, query: sql.SQL | sql.Composed) -> str | None:
    row = connection.execute(query).fetchone()
    return row[0] if row else None


def _made_up(tried: Tried) -> dict[str, str | None] | None:
    """Return a row for an empty table: NULL wherever that may stand; None where a column's type gives no idea."""
    made: dict[str, str | None] = {}
    for name in tried.given:
        own = tried.own[name]
        value = _example(own.type) if own.not_null else None
        if own.not_null and value is None:
            return None
        made[name] = value
    return made


def _example(kind: str) -> str | None:
    """Return a text that a type takes (pure)."""
    if kind.endswith("[]"):
        return "{}"
    if NUMBER.match(kind) or TEXT.fullmatch(kind) or kind in ("real", "double precision"):
        return "1"
    known = {"boolean": "true", "uuid": "00000000-0000-0000-0000-000000000001", "json": "{}", "jsonb": "{}", "bytea": "\\x00"}
    return "2000-01-01" if TIME.match(kind) else known.get(kind)
