"""Discovery: which tenants there are, how PostgreSQL writes their names, and whose desired stage is not the observed one.

The old store lists the tenants, because it has all of them from the beginning to the end. It does
so by a loose scan of an index that begins with their column: a step per tenant, not per row. A
count takes no more than a twentieth of the time, so with many tenants it is made less often: of
10,000 every few seconds, of 100,000 every few minutes. The flag itself is asked again as soon as
its file or the ledger has changed, by the SDK's own rules, percentage rollouts among them. An
answer that is no stage moves nobody.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
from ldclient import Context
from ldclient.migrations.types import Origin, Stage
from psycopg import sql

from changeover.errors import UsageError
from changeover.flags import flagfile
from changeover.flags.cutover.switch import flag_and_file
from changeover.flags.fence.fence import MOST_TENANTS
from changeover.flags.observed import Observations
from changeover.flags.stages import TABLE
from changeover.jobs.reverse import path as reverse
from changeover.jobs.transform.tenancy import new_column, old_column
from changeover.session import Connection, application_name, connect, escaped
from changeover.spec import Spec

log = logging.getLogger(__name__)

MOST = 100_000
"""Tenants that are followed one by one; of more, those that come later in the order of their column go with all the others."""

SHARE = 20.0
"""How many times as long as a count took, with what was asked of the flag then, it is not repeated."""

LOOK_SECONDS = 2.0
"""How long a look for a tenant's first row may take: it is a kindness and no more."""

TYPE = """
SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attname = %s AND NOT attisdropped
"""

LEADS_AN_INDEX = """
SELECT EXISTS (SELECT FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
    JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
    WHERE i.indrelid = to_regclass(%s) AND i.indisvalid AND i.indpred IS NULL AND m.amname = 'btree' AND a.attname = %s)
"""

LOOSE = """
WITH RECURSIVE tenant(v) AS (
    (SELECT {column} FROM {table} ORDER BY {column} LIMIT 1)
    UNION ALL SELECT (SELECT {column} FROM {table} WHERE {column} > tenant.v ORDER BY {column} LIMIT 1) FROM tenant
    WHERE tenant.v IS NOT NULL)
SELECT v::text FROM tenant WHERE v IS NOT NULL LIMIT {most}
"""

WHOLE = "SELECT DISTINCT {column}::text FROM {table} LIMIT {most}"
"""Where no index begins with the column: the whole table is read."""

PRESENT = """
SELECT asked.v::text FROM unnest(%s::{type}[]) AS asked (v) WHERE EXISTS (SELECT FROM {table} AS t WHERE t.{column} = asked.v)
"""

BITS = {"smallint": 16, "integer": 32, "bigint": 64}


@dataclass(frozen=True)
class Astray:
    """Tenants of which the flag asks a stage of the other store: to go back to the old one, and to go up to the new one."""

    back: tuple[str, ...] = ()
    up: tuple[str, ...] = ()


class Census:
    """The tenants of one migration and what its flag file asks of each, looked at again and again (driver)."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.flag, self.file = flag_and_file(spec)
        self._names: frozenset[str] = frozenset()
        self._counts = 0
        self._due = 0.0
        self._inputs: tuple[Any, ...] | None = None
        self._astray = Astray()

    def look(self, known: Observations) -> Astray:
        """Return who is astray, at most `MOST_TENANTS` each way; the others are, at the next look."""
        started = time.monotonic()
        counts = started >= self._due
        if counts:
            self._count()
        file = self.file.stat()
        inputs = (file.st_mtime_ns, file.st_ino, known.epoch, self._counts)
        if inputs != self._inputs:
            self._astray, self._inputs = self._evaluated(known), inputs
        if counts:
            ended = time.monotonic()
            self._due = ended + SHARE * (ended - started)
        return self._astray

    def _count(self) -> None:
        tenants: set[str] = set()
        with connect(self.spec.source.dsn.resolve(), application_name(self.spec.name, "census")) as old:
            for table in self.spec.tables:
                tenants.update(present(old, *table.source_name, self.flag.context or "", MOST + 1))
        if len(tenants) > MOST:
            log.warning("there are more than %s tenants: those beyond are moved by all rows' flag, or by name, alone", f"{MOST:,}")
        names = frozenset(sorted(tenants)[:MOST])
        if names != self._names:
            self._names, self._counts = names, self._counts + 1

    def _evaluated(self, known: Observations) -> Astray:
        astray: dict[Origin, list[str]] = {Origin.OLD: [], Origin.NEW: []}
        with flagfile.loaded(self.file) as client:
            for name in sorted(self._names | known.named.keys()):
                value = client.variation(self.flag.key, Context.create(name, self.flag.context), None)
                stage = Stage.from_str(value) if isinstance(value, str) else None
                if stage is not None and TABLE[stage].writes is not known.of(name).store:
                    astray[TABLE[stage].writes].append(name)
        return Astray(tuple(astray[Origin.OLD][:MOST_TENANTS]), tuple(astray[Origin.NEW][:MOST_TENANTS]))


def present(connection: Connection, schema: str, name: str, column: str, most: int) -> list[str]:
    """Return the tenants that have rows in a table, no more than so many."""
    table = sql.Identifier(schema, name)
    row = connection.execute(LEADS_AN_INDEX, [table.as_string(connection), column]).fetchone()
    statement = LOOSE if row is not None and row[0] else WHOLE
    rows = connection.execute(
        sql.SQL(statement).format(column=sql.Identifier(column), table=table, most=sql.Literal(most))
    ).fetchall()  # fmt: skip
    return [value for (value,) in rows if value]


def spelled(spec: Spec, names: Collection[str]) -> list[str]:
    """Return tenants as PostgreSQL prints them, each once; raises UsageError for one that the column's type can't hold."""
    column = old_column(spec) or ""
    with connect(spec.source.dsn.resolve(), application_name(spec.name, "flags")) as old:
        kind = _type(old, spec, column)
    spellings = dict.fromkeys(str(_typed(kind, column, name)) for name in names)
    return list(spellings)


def unknown(spec: Spec, names: Collection[str]) -> tuple[str, ...]:
    """Return the tenants of which no table in either store has a row; none where that takes too long to tell."""
    column = old_column(spec) or ""
    left = set(names)
    with (
        connect(spec.source.dsn.resolve(), application_name(spec.name, "flags")) as old,
        connect(reverse.new_dsn(spec), application_name(spec.name, "flags")) as new,
    ):
        kind = _type(old, spec, column)
        values = [_typed(kind, column, name) for name in names]
        try:
            for table in spec.tables:
                for side, relation, holder in ((old, table.source_name, column), (new, table.target_name, new_column(spec, table))):
                    if left and holder is not None:
                        left -= _present(side, relation, holder, kind, values)
        except psycopg.errors.QueryCanceled:
            log.info("whether the tenants have rows takes more than %s s to tell", LOOK_SECONDS)
            return ()
    return tuple(sorted(left))


def _present(connection: Connection, relation: tuple[str, str], column: str, kind: str, values: list[Any]) -> set[str]:
    typed = sql.SQL(kind)  # a name that format_type printed
    names = {"table": escaped(sql.Identifier(*relation)), "column": escaped(sql.Identifier(column))}
    statement = sql.SQL(PRESENT).format(**names, type=typed)
    with connection.transaction():
        connection.execute("SELECT set_config('statement_timeout', %s, true)", [f"{LOOK_SECONDS * 1000:.0f}ms"])
        return {row[0] for row in connection.execute(statement, [values])}


def _type(old: Connection, spec: Spec, column: str) -> str:
    table = sql.Identifier(*spec.tables[0].source_name).as_string(old)
    row = old.execute(TYPE, [table, column]).fetchone()
    if row is None:
        raise UsageError(f"{spec.tables[0].source} has no column {column}, which flag.context names: `changeover check` says more")
    return str(row[0])


def _typed(kind: str, column: str, name: str) -> int | UUID | str:
    """Return a tenant as a value of its column's type (pure)."""
    try:
        if kind not in BITS:
            return UUID(name) if kind == "uuid" else name
        number = int(name.replace("_", "?"))  # which Python would take
        if number.bit_length() < BITS[kind]:
            return number
        raise ValueError(number)
    except ValueError:
        raise UsageError(f"tenant {name} is no {kind}, which {column} is: give the value as a row has it") from None
