"""Obstacles: why the new store can't tell the old one what is written to it, in sentences that say what to do.

It looks at both stores and touches nothing. It asks whether every column of the old tables can be
had back. It also asks whether the new store's changes can be streamed without harm to the
application's own statements. No reason means that a reverse path can be opened. Runs on the driver
and starts no JVM.
"""

from __future__ import annotations

from psycopg import sql

from changeover.jobs.access import connections, grants
from changeover.jobs.guarantee.assumptions import hidden, server
from changeover.jobs.preflight.rules import CAPTURE_RULES, TABLE_RULES
from changeover.jobs.source.catalog import SourceTable, source_table, target_as_source
from changeover.jobs.transform import inverse
from changeover.names import qualified
from changeover.session import Connection, application_name, connect, one_row
from changeover.spec import SLOT, Spec
from changeover.stores.postgres import replica
from changeover.stores.postgres.batches import WIDEST


def obstacles(spec: Spec, old: Connection, new: Connection, slot: str = "") -> list[str]:
    """Return why no reverse path can be opened (driver; looks only).

    A table that is not there yet is no reason.

    Args:
        spec: The migration's spec.
        old: A session with the old store.
        new: A session with the new store.
        slot: A slot that the path itself has, which is no reason.

    Returns:
        Reasons, each a sentence.
    """
    there = has_slot(new, slot)
    asked = {"slot": slot, "else": ""}
    rows = new.execute(CAPTURE_RULES[SLOT], asked).fetchall()
    reasons = server(new) + [row[0] for row in rows if not there or "slots" not in row[0]]
    reasons += map(str, grants.of_server(new, SLOT))
    for table in spec.tables:
        old_table = source_table(old, table)
        if old_table is None:
            continue
        new_table = source_table(new, target_as_source(table))
        lack = inverse.missing(spec, table, old_table.store_columns, new_table.store_columns if new_table else None)
        reasons += [lack] if lack else []
        if len(old_table.columns) > WIDEST:
            reasons.append(
                f"{old_table.source} has {len(old_table.columns):,} columns: {WIDEST:,} is the most that a batch back to it holds"
            )
        reasons += replica.acting(old, _quoted(old, old_table))[0]
        if new_table is not None:
            reasons += _unfit(new, new_table)
    reasons = [f"the new store: {reason}" if reason.startswith(("the ", "wal_level", "all ")) else reason for reason in reasons]
    if spec.flag is not None:
        dsn = spec.targets[spec.flag.target].dsn_value
        reasons += connections.streaming(dsn, application_name(spec.name, "check"), "the new store")
    return reasons


def _quoted(connection: Connection, table: SourceTable) -> str:
    return sql.Identifier(*qualified(table.source)).as_string(connection)


def _unfit(new: Connection, new_table: SourceTable) -> list[str]:
    row = one_row(new.execute("SELECT %s::regclass::oid", [_quoted(new, new_table)]))
    lacks = grants.of_owners(new, row)
    identity = new_table.identity
    asked = {"oid": row[0], "name": new_table.source, "identity": ", ".join(sorted(identity)), "keys": list(identity)}
    rows = new.execute(TABLE_RULES, asked).fetchall()
    unseen = hidden(new, *qualified(new_table.source))
    reasons = [*map(str, lacks), *(new_table for (new_table,) in rows), *([unseen] if unseen else [])]
    return [reason for reason in reasons if "generated column" not in reason]  # it is computed anew, and no part of a transform


def has_slot(connection: Connection, slot: str) -> bool:
    """Return whether a server has the slot."""
    return connection.execute("SELECT FROM pg_replication_slots WHERE slot_name = %s", [slot]).fetchone() is not None


def notes(spec: Spec) -> list[str]:
    """Return what `check` has to say of reverse replication: why there is none, and what acts on its rows (driver; looks only).

    Args:
        spec: The migration's spec.

    Returns:
        Remarks, each a sentence.
    """
    if spec.flag is None:
        return []
    application = application_name(spec.name, "check")
    with (
        connect(spec.source.dsn.resolve(), application) as old,
        connect(spec.targets[spec.flag.target].dsn_value, application) as new,
    ):
        reasons = obstacles(spec, old, new)
        old_tables = [old_table for table in spec.tables if (old_table := source_table(old, table)) is not None]
        acting = [one for table in old_tables for one in replica.acting(old, _quoted(old, table))[1]]
    return [*(f"{reason}; until then {spec.without_stream} after the fence" for reason in reasons), *acting]
