"""Partitions: a partitioned source table is one table, and what it consists of must be what was prepared, or be born since.

The publication names the root and publishes each change as its partition's own, so partitions to
come are in it by themselves. A TRUNCATE of one partition is told, which with
`publish_via_partition_root` it would not be. The stream does not tell that a partition was
attached, detached or dropped: what it held then enters or leaves the table without any event. So
membership is compared with the ledger's at every connect of capture and once a minute, when a table
is closed, before a verdict and at the fence. A partition that was created as one is empty at first,
every row of it is in the stream, and it is recorded; all else stops the table.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing

from psycopg import sql
from psycopg.rows import class_row

from changeover.errors import SourceChanged, TableStopped
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import OLD, Partition
from changeover.session import Connection, application_name, connect, speaking_to
from changeover.spec import Table

PARTITIONS = """
WITH RECURSIVE parts AS (
    SELECT inhrelid, xmin, cmin FROM pg_inherits WHERE inhparent = to_regclass(%(root)s) AND NOT inhdetachpending
    UNION ALL SELECT i.inhrelid, i.xmin, i.cmin FROM pg_inherits i JOIN parts ON i.inhparent = parts.inhrelid
    WHERE NOT i.inhdetachpending)
SELECT n.nspname || '.' || c.relname, c.oid::bigint, coalesce(pg_relation_filenode(c.oid), 0)::bigint, p.xmin::text,
    p.cmin::text::bigint, t.xmin = p.xmin, n.nspname, c.relname
FROM parts p JOIN pg_class c ON c.oid = p.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    JOIN pg_type t ON t.oid = c.reltype ORDER BY 1
"""
"""A row type is as old as its table: where it is of the transaction that made the table a partition, so is the table."""


def partitions_of(connection: Connection, schema: str, name: str) -> tuple[Partition, ...] | None:
    """Return all partitions of a table, those of partitions too, or None where it is not partitioned."""
    root = sql.Identifier(schema, name).as_string(connection)
    kind = connection.execute("SELECT relkind FROM pg_class WHERE oid = to_regclass(%s)", [root]).fetchone()
    if kind is None or kind[0] != "p":
        return None
    return tuple(Partition(*row[:4]) for row in connection.execute(PARTITIONS, {"root": root}).fetchall())


def record(ledger: Ledger, source: str, parts: Sequence[Partition], store: str = OLD) -> None:
    """Record partitions of a table of a stream.

    Of a partition that is on record the file may be another now.

    Args:
        ledger: The migration's ledger, open.
        source: The table, as the spec names it in that store.
        parts: The partitions.
        store: The store whose stream it is.
    """
    with ledger.connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO changeover.source_partition (migration, store, source, oid, name, filenode, attached)"
            " VALUES (%s, %s, %s, %s, %s, %s, %s)"
            " ON CONFLICT (migration, store, source, oid) DO UPDATE SET filenode = excluded.filenode",
            [[ledger.migration, store, source, one.oid, one.name, one.filenode, one.attached] for one in parts],
        )


def recorded(ledger: Ledger, source: str, store: str = OLD) -> tuple[Partition, ...] | None:
    """Return the partitions on record.

    Args:
        ledger: The migration's ledger, open.
        source: The table, as the spec names it in that store.
        store: The store whose stream it is.

    Returns:
        The partitions, None for a table that is not partitioned.
    """
    row = ledger.connection.execute(
        "SELECT partitioned FROM changeover.source_table WHERE (migration, store, source) = (%s, %s, %s)",
        [ledger.migration, store, source],
    ).fetchone()
    if row is None or not row[0]:
        return None
    with ledger.connection.cursor(row_factory=class_row(Partition)) as cursor:
        query = (
            "SELECT name, oid, filenode, attached FROM changeover.source_partition"
            " WHERE (migration, store, source) = (%s, %s, %s) ORDER BY name"
        )
        return tuple(cursor.execute(query, [ledger.migration, store, source]))


def difference(prepared: Collection[Partition], present: Collection[Partition], born: Collection[int]) -> str | None:
    """Return what came to or left a table without an event, or None; `born` are the oids that were created as partitions (pure)."""
    now = {part.oid: part for part in present}
    before = {part.oid for part in prepared}
    for part in prepared:
        if part.oid not in now:
            return f"its partition {part.name} was detached or dropped since prepare: what it held left the table without any event"
        if now[part.oid].attached != part.attached:
            return f"its partition {part.name} was detached and attached again since prepare: no event tells what changed meanwhile"
    for part in present:
        if part.oid not in before | set(born):
            return f"the partition {part.name} was attached to it since prepare: what that held before is in no event"
    return None


def look(ledger: Ledger, connection: Connection, table: Table, store: str = OLD) -> str | None:
    """Compare a table's partitions with those on record, record new ones, and stop the table where they differ (driver).

    Returns the reason why it is stopped by this, None for a table that is as it was or is not partitioned. In the new store it is a
    gap in the stream, SourceChanged: reverse replication has it no better than the old store.
    """
    prepared = recorded(ledger, table.source, store)
    if prepared is None:
        return None
    reason, born = compared(connection, table.source_name, prepared)
    record(ledger, table.source, born, store)
    if reason is not None and store != OLD:
        raise SourceChanged(f"partitions of {table.source}: {reason}", "others", "not the same")
    if reason is not None:
        ledger.stop(reason, table.source)
    return reason


def compared(
    connection: Connection, name: tuple[str, str], prepared: Collection[Partition]
) -> tuple[str | None, Sequence[Partition]]:
    """Compare a table's partitions with those that were recorded.

    Args:
        connection: A session with the store.
        name: (schema, table).
        prepared: The partitions on record.

    Returns:
        Why they differ, None where they don't, and the partitions born since.
    """
    present = partitions_of(connection, *name)
    if present is None:
        return "it is no partitioned table any more", []
    known = {part.oid for part in prepared}
    born = [part for part in present if part.oid not in known and _born(connection, name, part)]
    return difference(prepared, present, [part.oid for part in born]), born


def require_same_partitions(ledger: Ledger, connection: Connection, table: Table) -> None:
    """Raise TableStopped where partitions came or went without an event (driver).

    Args:
        ledger: The migration's ledger, open.
        connection: A session with the store.
        table: The table of the spec.

    Raises:
        TableStopped: Partitions came or went without an event; it is on record.
    """
    if (reason := look(ledger, connection, table)) is not None:
        raise TableStopped(table.source, reason)


def _born(connection: Connection, table: tuple[str, str], part: Partition) -> bool:
    """Return whether a partition was created as one, or in the same transaction but empty when it was attached."""
    root = sql.Identifier(*table).as_string(connection)
    rows = {row[1]: row for row in connection.execute(PARTITIONS, {"root": root}).fetchall()}
    if part.oid not in rows or not rows[part.oid][5]:
        return False
    _, _, filenode, attached, command, _, schema, name = rows[part.oid]
    if not filenode:
        return True
    # of the rows of that one transaction, those that an earlier command wrote; what was updated since is in the stream as a whole
    query = sql.SQL("SELECT EXISTS (SELECT FROM ONLY {} WHERE xmin::text = {} AND cmin::text::bigint < {})")
    found = connection.execute(query.format(sql.Identifier(schema, name), sql.Literal(attached), sql.Literal(command))).fetchone()
    return found is not None and not found[0]


class Roots:
    """Of which table a partition in a store's stream is a part, by the ledger and, where it is new, by the catalogue (capture).

    `tables` are those of the stream, as that store names them.
    """

    def __init__(self, ledger: Ledger, dsn: str, tables: Sequence[Table], store: str = OLD) -> None:
        self.ledger, self.dsn, self.store = ledger, dsn, store
        self.tables = [table for table in tables if recorded(ledger, table.source, store) is not None]
        self.names = [table.source_relation for table in self.tables]
        self._root: dict[int, str] = {}
        self._part: dict[int, Partition] = {}

    def look(self, connection: Connection) -> list[str]:
        """Compare all partitioned tables with the ledger (capture).

        Args:
            connection: A session with the store.

        Returns:
            The tables that were stopped by it, each with the reason.

        Raises:
            SourceChanged: Partitions of the new store came or went without an event.
        """
        reasons = [(table, look(self.ledger, connection, table, self.store)) for table in self.tables]
        for table in self.tables:
            for part in recorded(self.ledger, table.source, self.store) or ():
                self._root[part.oid], self._part[part.oid] = table.source_relation, part
        return [f"{table.source}: {reason}" for table, reason in reasons if reason is not None]

    def of(self, oid: int) -> str | None:
        """Return the table of which a relation is or was a partition; one that is not known yet is looked up.

        Args:
            oid: The relation's oid.

        Returns:
            The table, as the stream names it; None where it is a partition of none.
        """
        if oid not in self._root and self.tables:
            with (
                closing(connect(self.dsn, application_name(self.ledger.migration, "capture"))) as connection,
                speaking_to(self.dsn, "looking up a partition"),
            ):
                self.look(connection)
        return self._root.get(oid)

    def leaves(self, name: str) -> frozenset[int]:
        """Return the partitions of a table that hold rows; none for a table that is not partitioned.

        Args:
            name: The table, as the stream names it.

        Returns:
            Their oids.
        """
        return frozenset(oid for oid, root in self._root.items() if root == name and self._part[oid].filenode)

    def called(self, oids: Collection[int]) -> Sequence[str]:
        """Return the names of some partitions.

        Args:
            oids: Their oids.

        Returns:
            The names, sorted.
        """
        return sorted(self._part[oid].name for oid in oids if oid in self._part)
