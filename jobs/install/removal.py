"""The removal of everything that the product made in the two stores.

What is not there is passed over, so a removal that was killed is made good by the next. What a prepare made that never came to its
record is found by its names.
"""

from __future__ import annotations

from collections.abc import Mapping

from psycopg import sql

from changeover.jobs.ledger.ledger import Ledger, drop_ledger
from changeover.jobs.ledger.records import LEDGER_TABLES
from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.source import snapshot, triggerlog
from changeover.session import Connection, application_name, connect, speaking_to
from changeover.spec import Spec, Table, Target
from changeover.stores import open_store
from changeover.stores.base.interface import TargetTable
from changeover.stores.postgres import gate, refusal


def remove_unfinished(spec: Spec, ledger: Ledger) -> list[str]:
    """Remove from both stores what a prepare made that never came to its record.

    Args:
        spec: The migration's spec.
        ledger: The ledger that the prepare has begun.

    Returns:
        What was removed, each in a few words.

    Raises:
        ServerUnavailable: A store can't be reached.
    """
    removed = reverse_setup.remove(spec, None) + remove_from_source(spec)
    creating = ledger.creating()
    removed += abort_targets(spec, creating)
    if creating:
        drop_ledger(ledger.connection, spec.name)
    drop_empty_schema(ledger.connection)
    return removed


def remove_from_source(spec: Spec) -> list[str]:
    """Remove keeper, slot, publication, trigger log, refusal and gate from the old store.

    Args:
        spec: The migration's spec.

    Returns:
        What was removed, each in a few words.

    Raises:
        ServerUnavailable: The old store can't be reached.
        DatabaseFailed: It refuses a statement.
    """
    dsn = spec.source.dsn.resolve()
    removed = []
    with connect(dsn, application_name(spec.name, "remove")) as old, speaking_to(dsn, "removing what prepare made"):
        if snapshot.release(dsn, spec.name, old):
            removed.append("snapshot keeper")
        if snapshot.drop_slot(old, spec.slot):
            removed.append(f"replication slot {spec.slot}")
        removed += triggerlog.remove(old, spec.name)
        for table in spec.tables:
            removed += refusal.remove(old, *table.source_name)
            removed += gate.remove(old, *table.source_name)
        refusal.drop_empty_schema(old)
        if old.execute("SELECT FROM pg_publication WHERE pubname = %s", [spec.slot]).fetchone() is not None:
            old.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(spec.slot)))
            removed.append(f"publication {spec.slot}")
    return removed


def abort_targets(spec: Spec, created: Mapping[tuple[str, str], bool]) -> list[str]:
    """Remove the gates of loads, and the tables that prepare created.

    Args:
        spec: The migration's spec.
        created: Whether prepare created the target of a load, by (source, target's name).

    Returns:
        What was removed, each in a few words.

    Raises:
        ServerUnavailable: A target can't be reached.
    """
    return [
        line
        for table in spec.tables
        for target in spec.targets.values()
        if (table.source, target.name) in created
        for line in _abort_target(spec, table, target, created[table.source, target.name])
    ]


def _abort_target(spec: Spec, table: Table, target: Target, created: bool) -> list[str]:
    with open_store(spec, target, "abort") as store:
        columns = store.columns(*table.target_name)
        if columns is None:
            store.finalize(TargetTable(*table.target_name, (), table.key))  # what is left of ours beside it
            return []
        store.abort(TargetTable(*table.target_name, columns, table.key), created)
    return [f"{'table' if created else 'gate of'} {table.target} in {target.name}"]


def drop_empty_schema(connection: Connection) -> None:
    """Drop the ledger's own tables when no migration is left in them, then the schema if nothing else is in it.

    Args:
        connection: A session with the ledger's server.
    """
    row = connection.execute("SELECT to_regclass('changeover.migration') IS NOT NULL").fetchone()
    if row and row[0] and connection.execute("SELECT FROM changeover.migration LIMIT 1").fetchone() is None:
        for table in LEDGER_TABLES:
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier("changeover", table)))
        refusal.drop_empty_schema(connection)
