"""The catalogue: a table as the server describes it, with its key, its columns, its file and its partitions.

It is read once where a step begins, and what was prepared is held against it. Everything runs where the caller's session runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from changeover.jobs.access import grants
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import OLD, Partition, SourceColumn
from changeover.jobs.source import partitions
from changeover.jobs.source.generated import generated_of
from changeover.names import qualified
from changeover.session import Connection
from changeover.spec import Spec, Table
from changeover.stores.base.pgtypes import Column, source_type
from changeover.stores.base.ranges import estimated_rows
from changeover.stores.base.reader import ReadTable


@dataclass(frozen=True)
class SourceTable:
    """A source table as the catalogue has it: identity columns in index order, the file, and the columns."""

    source: str
    filenode: int
    identity: tuple[str, ...]
    columns: tuple[SourceColumn, ...]
    rows: int
    partitions: tuple[Partition, ...] | None = None
    """None for an ordinary table."""
    generated: Mapping[str, str] = field(default_factory=dict)
    """Generated columns with their expressions in PostgreSQL; they are not among `columns`."""

    @property
    def store_columns(self) -> tuple[Column, ...]:
        """Return the columns as frames carry them."""
        return store_columns(self.columns)

    @property
    def read(self) -> ReadTable:
        """Return the table as readers take it."""
        return ReadTable(*qualified(self.source), self.store_columns, self.key, partitioned=self.partitions is not None)

    @property
    def key(self) -> tuple[Column, ...]:
        """Return the identity's columns in the index's order; a generated one, which is refused, is none of the table's."""
        by_name = {column.name: column for column in self.store_columns}
        return tuple(by_name[name] for name in self.identity if name in by_name)


def store_columns(columns: Sequence[SourceColumn]) -> tuple[Column, ...]:
    """Return catalogue columns as frames carry them (pure).

    Args:
        columns: A table's columns, as the catalogue or the ledger has them.

    Returns:
        The columns; one of an unproven type has an empty Spark type.
    """
    return tuple(Column(c.name, c.type, carried.spark if (carried := source_type(c.type)) else "", c.not_null) for c in columns)


IDENTITY = """
SELECT a.attname FROM pg_class c JOIN pg_index i ON i.indrelid = c.oid
    AND CASE WHEN c.relreplident = 'i' THEN i.indisreplident ELSE i.indisprimary END
CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k(attnum, place)
JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.attnum
WHERE c.oid = %s AND k.place <= i.indnkeyatts ORDER BY k.place
"""

COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.atttypid::bigint, t.typcategory = 'A', a.attnotnull AND NOT EXISTS (
        SELECT FROM pg_constraint c WHERE c.conrelid = a.attrelid AND c.contype = 'n' AND a.attnum = ANY (c.conkey)
            AND NOT c.convalidated), a.atttypmod, a.attnum
FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = '' ORDER BY a.attnum
"""


def source_table(connection: Connection, table: Table) -> SourceTable | None:
    """Return a source table as the catalogue has it (driver, capture).

    Args:
        connection: A session with the store.
        table: The table of the spec.

    Returns:
        The table, None where there is none by that name, or none that the role may look up.
    """
    schema, name = table.source_name
    if not grants.usable(connection, schema):
        return None
    row = connection.execute(
        "SELECT c.oid, pg_relation_filenode(c.oid) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        " WHERE n.nspname = %s AND c.relname = %s",
        [schema, name],
    ).fetchone()
    if row is None:
        return None
    identity = tuple(r[0] for r in connection.execute(IDENTITY, [row[0]]).fetchall())
    columns = tuple(
        SourceColumn(r[0], r[1], r[2], r[3], r[0] in identity, *r[4:]) for r in connection.execute(COLUMNS, [row[0]]).fetchall()
    )
    parts, rows = partitions.partitions_of(connection, schema, name), estimated_rows(connection, schema, name)
    return SourceTable(table.source_relation, row[1] or 0, identity, columns, rows, parts, generated_of(connection, row[0]))


def target_as_source(table: Table) -> Table:
    """Return a table's target as a source of its own (pure).

    Args:
        table: The table of the spec.

    Returns:
        The table, whose source is the target.
    """
    return Table(table.target_relation, table.source, table.key)


def tables_of(spec: Spec, store: str) -> list[Table]:
    """Return the tables of a store's stream, each as a source (pure).

    Args:
        spec: The migration's spec.
        store: `OLD` or `NEW`.

    Returns:
        The tables, in the spec's order.
    """
    return [table if store == OLD else target_as_source(table) for table in spec.tables]


def record_tables(ledger: Ledger, tables: Mapping[str, SourceTable], store: str = OLD) -> None:
    """Record the tables of a stream, and their partitions, as they were found before the slot was made.

    Args:
        ledger: The migration's ledger, open.
        tables: The tables by the names that the spec has for them in that store.
        store: The store whose stream it is.
    """
    for name, table in tables.items():
        ledger.record_table(name, table.filenode, table.columns, table.partitions is not None, store)
        partitions.record(ledger, name, table.partitions or (), store)
