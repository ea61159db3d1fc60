"""The definition of a change stream: the catalogue's rows that decide which changes come, by value and by identity.

A publication that loses a table and gets it back reads as it did before, and what was written meanwhile is in no event. So each
row is recorded with its oid and the transaction that wrote it (`xmin`). Every ALTER changes one of them; VACUUM, VACUUM FULL,
ANALYZE, REINDEX and CLUSTER change neither (tried on PostgreSQL 15 and 18). A key is known by its constraint, which REINDEX
CONCURRENTLY leaves as it is while the index gets another oid; `xmin` of its rows changes when the table is renamed, so it is not
asked. Another row is a gap: whether something was lost, nobody can tell afterwards. Nothing of ours alters a definition once it
is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from psycopg import sql

from changeover.errors import SourceChanged
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.source.triggerlog import TRIGGERS, Log
from changeover.names import joined
from changeover.session import Connection

PUBLICATION, MEMBER, SCHEMA, KEY, TRIGGER, LOG = "publication", "table", "schema", "key", "trigger", "log"

SCHEMAS_SINCE = 150000
"""The release from which on a publication may name schemas."""


@dataclass(frozen=True)
class Piece:
    """A row of the catalogue: what it is, of which relation, its identity, and what it says.

    `table` is the source table whose changes it decides, empty where it decides those of all.
    """

    kind: str
    name: str
    table: str
    relation: int
    row: str
    says: Mapping[str, Any]

    @property
    def identity(self) -> tuple[str, str]:
        """Return by what a row is found again."""
        return self.kind, str(self.relation) if self.kind in (MEMBER, KEY) else self.name


@dataclass(frozen=True)
class DefinitionChange:
    """A row that is not what was recorded: the table concerned, empty for all, what it is of, and how it is now."""

    table: str
    what: str
    now: str

    @property
    def reason(self) -> str:
        """Return why the table is stopped."""
        return f"its change stream's {self.what} is {self.now}: what was written meanwhile may be in no event"


PUBLISHED = """
SELECT 'publication', p.pubname::text, 0::bigint, 0::bigint, p.oid || '/' || p.xmin::text, to_jsonb(p) - 'oid'
FROM pg_publication p WHERE p.pubname = %(publication)s
UNION ALL SELECT 'table', n.nspname || '.' || c.relname, c.oid::bigint, c.oid::bigint, r.oid || '/' || r.xmin::text,
    to_jsonb(r) - ARRAY['oid', 'prpubid', 'prrelid'] || jsonb_build_object('name', n.nspname || '.' || c.relname)
FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid AND p.pubname = %(publication)s
    JOIN pg_class c ON c.oid = r.prrelid JOIN pg_namespace n ON n.oid = c.relnamespace
"""

SCHEMAS = """
UNION ALL SELECT 'schema', s.nspname::text, 0, 0, r.oid || '/' || r.xmin::text, '{}'
FROM pg_publication_namespace r JOIN pg_publication p ON p.oid = r.pnpubid AND p.pubname = %(publication)s
    JOIN pg_namespace s ON s.oid = r.pnnspid
"""

KEYS = """
WITH RECURSIVE parts AS (
    SELECT oid AS root, oid FROM unnest(%(tables)s::oid[]) AS asked(oid)
    UNION ALL SELECT p.root, i.inhrelid FROM parts p JOIN pg_inherits i ON i.inhparent = p.oid)
SELECT 'key', c.oid::regclass::text, p.root::bigint, c.oid::bigint, coalesce(k.oid, i.indexrelid)::text,
    jsonb_build_object('told', c.relreplident <> 'n' AND i.indexrelid IS NOT NULL)
FROM parts p JOIN pg_class c ON c.oid = p.oid
    LEFT JOIN pg_index i ON i.indrelid = c.oid
        AND CASE WHEN c.relreplident = 'i' THEN i.indisreplident ELSE i.indisprimary END
    LEFT JOIN pg_constraint k ON k.conindid = i.indexrelid AND k.conrelid = c.oid AND k.contype IN ('p', 'u')
"""
"""The key of a table and of each of its partitions; REPLICA IDENTITY FULL tells it, too, and more."""

LOGGED = """
SELECT 'log', c.oid::regclass::text, 0::bigint, c.oid::bigint, c.oid::text,
    jsonb_build_object('persistence', c.relpersistence, 'filtered', row_security_active(c.oid))
FROM pg_class c WHERE c.oid IN (to_regclass(%(rows)s), to_regclass(%(ticks)s))
UNION ALL SELECT 'trigger', t.tgname || ' on ' || t.tgrelid::bigint, t.tgrelid::bigint, t.tgrelid::bigint,
    concat_ws('/', t.oid, t.xmin, f.oid, f.xmin), jsonb_build_object('enabled', t.tgenabled)
FROM pg_trigger t JOIN pg_proc f ON f.oid = t.tgfoid WHERE t.tgrelid = ANY (%(tables)s::oid[]) AND t.tgname = ANY (%(triggers)s)
"""
"""A trigger's row and its function's, which is also another one after a GRANT on the function: nothing needs one."""

WORDS = {
    "pubinsert": "insert", "pubupdate": "update", "pubdelete": "delete", "pubtruncate": "truncate", "puballtables": "all tables",
    "pubviaroot": "publish_via_partition_root", "pubgencols": "generated columns", "pubowner": "owner", "prqual": "row filter",
    "prattrs": "column list", "told": "tells rows by it",
}  # fmt: skip
"""What the catalogue's columns are called in SQL."""


def relations(connection: Connection, names: Collection[tuple[str, str]]) -> dict[int, str]:
    """Return the oids of tables that are there, with the tables' names.

    Args:
        connection: A session with the store.
        names: (schema, table) of each.

    Returns:
        Oid and qualified name; only tables that are there.
    """
    quoted = [sql.Identifier(*name).as_string(connection) for name in names]
    rows = connection.execute(
        "SELECT c.oid::bigint, n.nspname, c.relname FROM unnest(%s::text[]) AS asked(name)"
        " JOIN pg_class c ON c.oid = to_regclass(asked.name) JOIN pg_namespace n ON n.oid = c.relnamespace",
        [quoted],
    )
    return {oid: joined(schema, name) for oid, schema, name in rows.fetchall()}


def of_slot(connection: Connection, publication: str, tables: Mapping[int, str]) -> tuple[Piece, ...]:
    """Return what a publication is now, and the keys of tables, given by their oids.

    Args:
        connection: A session with the store.
        publication: The publication's name.
        tables: The tables' oids and names.

    Returns:
        The catalogue's rows.
    """
    schemas = SCHEMAS if connection.info.server_version >= SCHEMAS_SINCE else ""
    query = PUBLISHED + schemas
    rows = connection.execute(query.encode(), {"publication": publication}).fetchall()
    return _pieces(rows + _keys(connection, tables), tables)


def of_log(connection: Connection, log: Log, tables: Mapping[int, str]) -> tuple[Piece, ...]:
    """Return what a trigger log, its triggers and their functions are now, and the keys of tables."""
    asked = {
        "rows": log.rows.as_string(connection),
        "ticks": log.ticks.as_string(connection),
        "tables": list(tables),
        "triggers": [log.trigger + suffix for suffix, _, _ in TRIGGERS],
    }
    return _pieces(connection.execute(LOGGED, asked).fetchall() + _keys(connection, tables), tables)


def _keys(connection: Connection, tables: Mapping[int, str]) -> list[tuple[Any, ...]]:
    return connection.execute(KEYS, {"tables": list(tables)}).fetchall()


def _pieces(rows: Sequence[tuple[Any, ...]], tables: Mapping[int, str]) -> tuple[Piece, ...]:
    return tuple(Piece(kind, name, tables.get(root, ""), oid, row or "", says) for kind, name, root, oid, row, says in rows)


# -- the record


def record(ledger: Ledger, store: str, pieces: Sequence[Piece]) -> None:
    """Record a store's definition, in the transaction that records its stream.

    Args:
        ledger: The migration's ledger, open.
        store: `OLD` or `NEW`.
        pieces: The catalogue's rows.
    """
    ledger.connection.execute(
        "UPDATE changeover.stream SET definition = %s WHERE migration = %s AND store = %s",
        [json.dumps([asdict(piece) for piece in pieces]), ledger.migration, store],
    )


def recorded(ledger: Ledger, store: str) -> tuple[Piece, ...]:
    """Return a store's definition on record.

    Args:
        ledger: The migration's ledger, open.
        store: `OLD` or `NEW`.

    Returns:
        The catalogue's rows; none where none is on record, and then whatever is there is new.
    """
    row = ledger.connection.execute(
        "SELECT definition FROM changeover.stream WHERE migration = %s AND store = %s", [ledger.migration, store]
    ).fetchone()
    return tuple(Piece(**piece) for piece in row[0]) if row else ()


def known(prepared: Sequence[Piece]) -> dict[int, str]:
    """Return the oids of the tables that a definition is of, with their names at that time (pure).

    Args:
        prepared: The definition on record.

    Returns:
        Oid and name of each table.
    """
    return {piece.relation: piece.table for piece in prepared if piece.kind in (MEMBER, TRIGGER)}


# -- the comparison


def compared(prepared: Sequence[Piece], present: Sequence[Piece]) -> list[DefinitionChange]:
    """Return what is not as it was recorded, what concerns all tables first (pure).

    A partition that came or went has rules of its own (`partitions`), so its key alone is no
    change.

    Args:
        prepared: The definition on record.
        present: The definition as it is now.

    Returns:
        The changes; none where the stream is as it was.
    """
    present_rows, before = {piece.identity: piece for piece in present}, {piece.identity for piece in prepared}
    tables = known(prepared)
    changes = []
    for piece in prepared:
        now = present_rows.get(piece.identity)
        if now is None and piece.kind == KEY and piece.relation not in tables:
            continue
        if (how := _otherwise(piece, now)) is not None:
            changes.append(DefinitionChange(piece.table, _noun(piece), how))
    for piece in present:
        if piece.identity not in before and piece.kind not in (KEY, LOG):
            changes.append(DefinitionChange("", _noun(piece), "new since prepare"))
    return sorted(changes, key=lambda change: change.table != "")


def _otherwise(prepared: Piece, now: Piece | None) -> str | None:
    """Return how a row is now, None where it is as it was (pure)."""
    if now is None:
        return "missing"
    if differing := sorted(name for name in {*prepared.says, *now.says} if prepared.says.get(name) != now.says.get(name)):
        differences = (f"{WORDS.get(n, n)}: {_value(now, n)}, was {_value(prepared, n)}" for n in differing)
        return f"altered since prepare ({'; '.join(differences)})"
    if now.row != prepared.row:
        return "another one by now (altered and put back, or dropped and made anew)"
    return None


def _value(piece: Piece, name: str) -> str:
    """Return a value for a message; of a row filter, which may quote data, only whether there is one."""
    value = piece.says.get(name)
    if name == "prqual":
        return "none" if value is None else "one"
    return "none" if value is None else json.dumps(value).strip('"')


def _noun(piece: Piece) -> str:
    if piece.kind == KEY:
        return f"key of {piece.name}"
    if piece.kind == MEMBER:
        return f"publication of {piece.name}"
    if piece.kind == SCHEMA:
        return f"publication of the schema {piece.name}"
    if piece.kind == TRIGGER:
        return f"trigger {piece.name.partition(' on ')[0]}"
    return f"{'trigger log' if piece.kind == LOG else piece.kind} {piece.name}"


def gap(change: DefinitionChange, prepared: Sequence[Piece]) -> SourceChanged:
    """Return a change that concerns the whole stream as an error (pure).

    Args:
        change: The change.
        prepared: The definition on record.

    Returns:
        The error, to be raised.
    """
    tables = ", ".join(sorted(set(known(prepared).values()))) or "no"
    return SourceChanged(change.what, f"one with {tables}", change.now)
