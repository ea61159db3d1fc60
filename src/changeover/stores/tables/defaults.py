"""Defaults: what a column does by itself where a statement leaves it out: NOT NULL, default, identity, generated.

They are read from one table's catalogue, with every name qualified, and made on another table, so that an application may go on to
leave the same columns out. A sequence that a default draws from gets one of its own there, which the column owns: it goes with the
table, and a fence moves it on (`sequences`). What another server does not know is named, and not made. Runs on the driver.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psycopg
from psycopg import sql

from changeover.names import NAME_BYTES
from changeover.session import Connection
from changeover.stores.base.interface import TargetTable

ALWAYS = "a"
"""The catalogue's word for GENERATED ALWAYS AS IDENTITY; BY DEFAULT is another one."""

BY_NAME = re.compile(r"\b(nextval|currval|setval|lastval)\(")
"""Functions of sequences; one whose sequence is a text is looked up when it runs, so nobody knows which it is."""


@dataclass(frozen=True)
class Drawn:
    """A sequence that a column draws from: how the default names it, and how it counts."""

    name: str
    literal: str
    type: str
    start: int
    increment: int
    least: int
    most: int
    cache: int
    cycle: bool

    @property
    def options(self) -> sql.Composed:
        """Return it as the options of another sequence that counts alike."""
        return sql.SQL("START {} INCREMENT {} MINVALUE {} MAXVALUE {} CACHE {} {}").format(
            *map(sql.Literal, (self.start, self.increment, self.least, self.most, self.cache)),
            sql.SQL("CYCLE" if self.cycle else "NO CYCLE"),
        )


@dataclass(frozen=True)
class Own:
    """What a column does by itself; `expression` is its default, or what it is generated from."""

    name: str
    type: str
    not_null: bool
    identity: str
    generated: bool
    expression: str | None
    draws: tuple[Drawn, ...] = ()

    @property
    def filled(self) -> bool:
        """Return whether a statement may leave it out and get a value all the same."""
        return bool(self.identity) or self.expression is not None

    def written(self, literals: Mapping[str, str]) -> str:
        """Return the default with other sequences in place of its own.

        Args:
            literals: For each sequence's literal in the default, the one to put there.

        Returns:
            The expression, empty where there is none.
        """
        text = self.expression or ""
        for drawn in self.draws:
            text = text.replace(drawn.literal, literals[drawn.literal])
        return text

    @property
    def whole(self) -> bool:
        """Return whether every sequence that the default asks for is known."""
        return BY_NAME.search(self.written({draw.literal: "" for draw in self.draws}).replace("nextval()", "")) is None


COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity::text, a.attgenerated <> '',
    pg_get_expr(d.adbin, d.adrelid)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE n.nspname = %s AND c.relname = %s AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum
"""

DRAWS = """
SELECT DISTINCT a.attname, q.oid::regclass::text, format('%%L::regclass', q.oid::regclass::text),
    format_type(s.seqtypid, NULL), s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcache, s.seqcycle
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
LEFT JOIN pg_attrdef f ON f.adrelid = a.attrelid AND f.adnum = a.attnum
JOIN pg_depend d ON d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.refobjid = a.attrelid
        AND d.refobjsubid = a.attnum AND d.deptype = 'i'
    OR d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid AND d.refclassid = 'pg_class'::regclass
JOIN pg_class q ON q.relkind = 'S' AND q.oid = CASE WHEN d.classid = 'pg_class'::regclass THEN d.objid ELSE d.refobjid END
JOIN pg_sequence s ON s.seqrelid = q.oid
WHERE n.nspname = %s AND c.relname = %s
"""


def of_table(connection: Connection, schema: str, name: str) -> dict[str, Own]:
    """Return what a table's columns do by themselves.

    Args:
        connection: A session with the store.
        schema: The table's schema.
        name: The table's name.

    Returns:
        By column, in order; nothing where there is no such table.
    """
    with _qualified(connection):
        draws: dict[str, list[Drawn]] = {}
        for column, *drawn in connection.execute(DRAWS, [schema, name]).fetchall():
            draws.setdefault(column, []).append(Drawn(*drawn))
        rows = connection.execute(COLUMNS, [schema, name]).fetchall()
    return {row[0]: replace(Own(*row), draws=tuple(draws.get(row[0], ()))) for row in rows}


@contextmanager
def _qualified(connection: Connection) -> Iterator[None]:
    """Have every name printed and read with its schema."""
    with connection.transaction():
        connection.execute("SET LOCAL search_path = pg_catalog")
        yield


def why_not(connection: Connection, own: Own) -> str | None:
    """Return why a server can't have a column's default.

    It parses the expression and runs nothing.

    Args:
        connection: A session with the store.
        own: What the column does in the other store.

    Returns:
        A phrase, None where the server can have it.
    """
    if own.identity or own.expression is None or own.generated:
        return None
    if not own.whole:
        return "names its sequence by a text"
    text = own.written({draw.literal: "'pg_catalog.pg_class'::pg_catalog.regclass" for draw in own.draws})
    try:
        with _qualified(connection):
            probe = sql.SQL("PREPARE changeover_default AS SELECT CAST({} AS {})").format(sql.SQL(text), sql.SQL(own.type))
            connection.execute(probe)
            connection.execute("DEALLOCATE changeover_default")
    except psycopg.Error as error:
        return str(error).splitlines()[0]
    return None


def make(connection: Connection, table: TargetTable, owns: Mapping[str, Own]) -> None:
    """Give a table's columns the defaults and identities of others, as far as the server can have them, in one transaction.

    An identity that is always generated is made so in the key alone: elsewhere no update could
    bring its value.

    Args:
        connection: A session with the store.
        table: The target table.
        owns: What each column is to do.
    """
    possible = {name: own for name, own in owns.items() if why_not(connection, own) is None}
    with _qualified(connection):
        for name, own in possible.items():
            if own.identity:
                _identify(connection, table, name, own)
            elif own.expression is not None and not own.generated:
                _default(connection, table, name, own)


def _identify(connection: Connection, table: TargetTable, name: str, own: Own) -> None:
    when = "ALWAYS" if own.identity == ALWAYS and name in table.key else "BY DEFAULT"
    options = own.draws[0].options if own.draws else sql.SQL("")
    connection.execute(
        sql.SQL("ALTER TABLE {} ALTER {} ADD GENERATED {} AS IDENTITY{}").format(
            sql.Identifier(table.schema, table.name), sql.Identifier(name), sql.SQL(when),
            sql.SQL(" ({})").format(options) if own.draws else sql.SQL(""),
        )
    )  # fmt: skip


def _default(connection: Connection, table: TargetTable, name: str, own: Own) -> None:
    literals = {drawn.literal: _sequence(connection, table, name, drawn) for drawn in own.draws}
    connection.execute(
        sql.SQL("ALTER TABLE {} ALTER {} SET DEFAULT {}").format(
            sql.Identifier(table.schema, table.name), sql.Identifier(name), sql.SQL(own.written(literals))
        )
    )


def _sequence(connection: Connection, table: TargetTable, column: str, drawn: Drawn) -> str:
    """Create a sequence that counts like another one and belongs to the column; return how a default names it."""
    identifier = _free_name(connection, table, column)
    connection.execute(
        sql.SQL("CREATE SEQUENCE {} AS {} {} OWNED BY {}").format(
            identifier, sql.SQL(drawn.type), drawn.options, sql.Identifier(table.schema, table.name, column)
        )
    )
    return sql.SQL("{}::pg_catalog.regclass").format(sql.Literal(identifier.as_string(connection))).as_string(connection)


def _free_name(connection: Connection, table: TargetTable, column: str) -> sql.Identifier:
    """Return a name for a column's sequence, as PostgreSQL names that of a serial column, which nothing bears as yet."""
    number = 0
    while True:
        end = f"_seq{number or ''}"
        begin = f"{table.name}_{column}".encode()[: NAME_BYTES - len(end)].decode(errors="ignore")
        name = sql.Identifier(table.schema, begin + end)
        row = connection.execute("SELECT to_regclass(%s) IS NULL", [name.as_string(connection)]).fetchone()
        if row and row[0]:
            return name
        number += 1
