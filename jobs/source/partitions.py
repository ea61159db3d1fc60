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

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing

from psycopg import sql
from psycopg.rows import class_row

from changeover.errors import SourceChanged, TableStopped
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Partition
from changeover.names import qualified
from changeover.session import Connection, application_name, connect, speaking_to
from changeover.spec import Spec, Table

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


def record(ledger: Ledger, source: str, parts: Sequence[Partition]) -> None:
    """Record partitions of a prepared source table.

    Of a partition that is on record the file may be another now.

    Args:
        ledger: The migration's ledger, open.
        source: The source table, as the spec names it.
        parts: The partitions.
    """
    with ledger.connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO changeover.source_partition (migration, source, oid, name, filenode, attached)"
            " VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (migration, source, oid) DO UPDATE SET filenode = excluded.filenode",
            [[ledger.migration, source, one.oid, one.name, one.filenode, one.attached] for one in parts],
        )


def recorded(ledger: Ledger, source: str) -> tuple[Partition, ...] | None:
    """Return the partitions on record.

    Args:
        ledger: The migration's ledger, open.
        source: The source table, as the spec names it.

    Returns:
        The partitions, None for a source table that is not partitioned.
    """
    row = ledger.connection.execute(
        "SELECT partitioned FROM changeover.source_table WHERE migration = %s AND source = %s", [ledger.migration, source]
    ).fetchone()
    if row is None or not row[0]:
        return None
    with ledger.connection.cursor(row_factory=class_row(Partition)) as cursor:
        query = "SELECT name, oid, filenode, attached FROM changeover.source_partition WHERE migration = %s AND source = %s"
        query += " ORDER BY name"
        return tuple(cursor.execute(query, [ledger.migration, source]))


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


def look(ledger: Ledger, connection: Connection, table: Table) -> str | None:
    """Compare a table's partitions with those on record, record new ones, and stop the table where they differ (driver).

    Returns the reason why it is stopped by this, None for a table that is as it was or is not partitioned.
    """
    prepared = recorded(ledger, table.source)
    if prepared is None:
        return None
    reason, born = compared(connection, table.source_name, prepared)
    record(ledger, table.source, born)
    if reason is not None:
        ledger.stop_table(table.source, reason)
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


class _Known:
    """The partitions that are known, each of one table, by their oids; one that is not is looked up."""

    def __init__(self, spec: Spec, dsn: str, names: Sequence[str]) -> None:
        self.spec, self.dsn, self.names = spec, dsn, names
        self._root: dict[int, str] = {}
        self._part: dict[int, Partition] = {}

    def know(self, name: str, parts: Sequence[Partition]) -> None:
        """Take partitions of a table for known."""
        for part in parts:
            self._root[part.oid], self._part[part.oid] = name, part

    def look(self, connection: Connection) -> list[str]:
        """Compare all partitioned tables with what is on record; return which were stopped by it, and why."""
        raise NotImplementedError

    def of(self, oid: int) -> str | None:
        """Return the table of which a relation is or was a partition; one that is not known yet is looked up."""
        if oid not in self._root and self.names:
            with (
                closing(connect(self.dsn, application_name(self.spec.name, "capture"))) as connection,
                speaking_to(self.dsn, "looking up a partition"),
            ):
                self.look(connection)
        return self._root.get(oid)

    def leaves(self, name: str) -> frozenset[int]:
        """Return the partitions of a table that hold rows; none for a table that is not partitioned."""
        return frozenset(oid for oid, root in self._root.items() if root == name and self._part[oid].filenode)

    def called(self, oids: Collection[int]) -> Sequence[str]:
        """Return the names of some partitions."""
        return sorted(self._part[oid].name for oid in oids if oid in self._part)


class Roots(_Known):
    """Of which source table a partition in the stream is a part, by the ledger and, where it is new, by the catalogue (capture)."""

    def __init__(self, spec: Spec, ledger: Ledger) -> None:
        self.ledger = ledger
        self.tables = [table for table in spec.tables if recorded(ledger, table.source) is not None]
        super().__init__(spec, spec.source.dsn.resolve(), [table.source_relation for table in self.tables])

    def look(self, connection: Connection) -> list[str]:
        """Compare all partitioned tables with the ledger (capture).

        Args:
            connection: A session with the store.

        Returns:
            The tables that were stopped by it, each with the reason.
        """
        reasons = [(table, look(self.ledger, connection, table)) for table in self.tables]
        for table in self.tables:
            self.know(table.source_relation, recorded(self.ledger, table.source) or ())
        return [f"{table.source}: {reason}" for table, reason in reasons if reason is not None]


class NewRoots(_Known):
    """Of which table of the new store a partition in its stream is a part; `record` is told of those that were born.

    One that came or went without an event is a gap in the stream: reverse replication has it no better than the old store.
    """

    def __init__(
        self, spec: Spec, dsn: str, known: Mapping[str, Sequence[Partition]], record: Callable[[str, Sequence[Partition]], None]
    ) -> None:
        super().__init__(spec, dsn, list(known))
        self.tables, self.record = dict(known), record

    def look(self, connection: Connection) -> list[str]:
        """Compare all partitioned tables with the record of the reverse path (capture).

        Args:
            connection: A session with the store.

        Returns:
            Nothing: what differs breaks the path off.

        Raises:
            SourceChanged: Partitions came or went without an event.
        """
        for name, before in self.tables.items():
            reason, born = compared(connection, qualified(name), before)
            if reason is not None:
                raise SourceChanged(f"partitions of {name}: {reason}", "others", "not the same")
            if born:
                self.tables[name] = [*before, *born]
                self.record(name, self.tables[name])
            self.know(name, self.tables[name])
        return []
