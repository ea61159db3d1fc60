"""Prepare, abort and finalize: everything that this product makes in the two stores, and its removal.

The order in `prepare` is the promise: tables and their files are recorded first, then the publication is committed, then the
slot and its snapshot are made by one command, then the gates get their floor. The ledger's record comes last, in one
transaction, so a killed prepare leaves nothing that a second one does not take away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from changeover import tenants
from changeover.errors import ChangeoverError, LockNotGranted, Refused, TargetNotEmpty, UnsafePlan, UsageError
from changeover.files import folders
from changeover.jobs.access import privileges
from changeover.jobs.guarantee import assumptions, definition
from changeover.jobs.guarantee.assumptions import Asked, Moment
from changeover.jobs.install.targets import create_target, install_gate
from changeover.jobs.ledger import epochs
from changeover.jobs.ledger.epochs import NEW, OLD
from changeover.jobs.ledger.ledger import Ledger, drop_ledger
from changeover.jobs.ledger.records import CLOSED, LEDGER_TABLES, Stream
from changeover.jobs.preflight.division import examined
from changeover.jobs.preflight.rules import Preflight
from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.source import partitions, snapshot, ticks, triggerlog
from changeover.jobs.source.catalog import SourceTable, source_table, store_columns
from changeover.jobs.spool.table import remove_spools, spool_of
from changeover.jobs.transform import inverse, transform
from changeover.session import LOCK_TIMEOUT, Connection, application_name, connect, server_name, speaking_to
from changeover.spec import SLOT, Spec, Table, Target
from changeover.stores import open_store
from changeover.stores.base.interface import TargetTable
from changeover.stores.postgres import gate, refusal
from changeover.tenants import EVERY

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

LOCK_TRIES = 30


@dataclass(frozen=True)
class Prepared:
    """What prepare made: the stream, and the transform of each load."""

    stream: Stream
    transforms: Mapping[tuple[str, str], transform.Transform]


Opened = tuple[Stream, tuple[definition.Piece, ...]]
"""A stream, and what defined it before it began."""


def prepare(spec: Spec, spark: SparkSession) -> Prepared:
    """Make publication, slot, kept snapshot, ledger, target tables and gates; a second call changes nothing (driver).

    Raises UnsafePlan with every reason, TargetNotEmpty, SlotBlocked, and UsageError when the spec changed since.
    """
    with Ledger.open(spec, "prepare") as ledger, ledger.lease("prepare"):
        if ledger.exists():
            return require_prepared(spec, spark, ledger, "prepare")
        found = examined(spec, Moment.PREPARE)
        if found.reasons:
            raise UnsafePlan(tuple(found.reasons))
        _remove_unfinished(spec, ledger)  # what a killed prepare left
        transforms = plan_transforms(spec, spark, {t.source: found.tables[t.source] for t in spec.tables})
        require_way_back(spec, spark, transforms)
        try:
            return _make(spec, ledger, found, transforms)
        except ChangeoverError:
            _remove_after_failure(spec, ledger)
            raise


def _make(spec: Spec, ledger: Ledger, found: Preflight, transforms: Mapping[tuple[str, str], transform.Transform]) -> Prepared:
    """Make everything, in the order that is the promise."""
    ledger.create()
    privileges.allow_ledger(spec, ledger.connection)
    created = _create_targets(spec, transforms, ledger)
    stream, pieces = open_stream(spec, found)
    types = {}
    for names, planned in transforms.items():
        with open_store(spec, spec.targets[names[1]], "prepare") as store:
            install_gate(spec, store, planned, stream)
            types[names] = {column.name: store.type_of(column) for column in planned.target.columns}
    folders.work(spec)
    spool_of(spec).create(stream.l0)
    with ledger.connection.transaction():
        _record(spec, ledger, stream, pieces, found, created)
        for (source, target), planned_types in types.items():
            ledger.record_types(source, target, planned_types)
    return Prepared(stream, transforms)


def _remove_unfinished(spec: Spec, ledger: Ledger) -> list[str]:
    """Remove from both stores what a prepare made that never came to its record."""
    removed = reverse_setup.remove(spec, None) + remove_from_source(spec)
    creating = ledger.creating()
    removed += _abort_targets(spec, creating)
    if creating:
        drop_ledger(ledger.connection, spec.name)
    _drop_empty_schema(ledger.connection)
    return removed


def _remove_after_failure(spec: Spec, ledger: Ledger) -> None:
    """Leave nothing behind; what can't be removed now (a server that is down) goes with the next prepare or abort."""
    try:
        _remove_unfinished(spec, ledger)
    except ChangeoverError as error:
        log.warning("not everything could be removed: %s", error)


def require_prepared(spec: Spec, spark: SparkSession, ledger: Ledger, step: str) -> Prepared:
    """Return what prepare recorded; raises StepOrder before it, UsageError when the spec changed since (driver)."""
    stream = ledger.stream(step)
    if ledger.spec_digest() != spec.digest:
        raise UsageError(
            f"{spec.path} changed since prepare (it was {ledger.spec_digest()}, it is {spec.digest}): put it back, or"
            f" `changeover abort` and begin again"
        )
    tables = {}
    with connect(spec.source.dsn.resolve(), application_name(spec.name, step)) as old:
        for stopped in assumptions.stop(Moment.RUN, Asked(spec, old, ledger)):
            log.warning("%s", stopped)
        for table in spec.tables:
            seen = source_table(old, table)
            filenode, columns, _ = ledger.source_table(table.source)
            identity = seen.identity if seen else tuple(c.name for c in columns if c.key)
            rows, parts = (seen.rows, seen.partitions) if seen else (0, None)
            tables[table.source] = SourceTable(table.source, filenode, identity, columns, rows, parts)
    return Prepared(stream, plan_transforms(spec, spark, tables))


def plan_transforms(
    spec: Spec, spark: SparkSession, tables: Mapping[str, SourceTable]
) -> dict[tuple[str, str], transform.Transform]:
    """Plan the transform of every table into every target."""
    planned = {}
    for target in spec.targets.values():
        with open_store(spec, target, "plan") as store:
            for table in spec.tables:
                seen = tables[table.source]
                existing = store.columns(*table.target_name)
                plan = transform.plan(spark, spec, table, store_columns(seen.columns), seen.identity, existing)
                planned[table.source, target.name] = replace(plan, partitioned=seen.partitions is not None)
    return planned


def require_way_back(spec: Spec, spark: SparkSession, transforms: Mapping[tuple[str, str], transform.Transform]) -> None:
    """Analyse the expressions by which rows will come back; that some are missing is said, and no error: the mirror is left.

    Raises SpecError or UnsafePlan for an expression that can't be.
    """
    for table in spec.tables if spec.flag is not None else ():
        assert spec.flag is not None
        planned = transforms[table.source, spec.flag.target]
        for lake in (transforms[table.source, name] for name in spec.targets if name != spec.flag.target):
            if reasons := inverse.cut(table, planned.target.columns, lake.target.columns):
                raise UnsafePlan(tuple(reasons))
        if lack := inverse.missing(spec, table, planned.source, planned.target.columns):
            log.warning("%s; until then the router's mirror alone keeps the old store up to date", lack)
        else:
            old = planned.source, [c.name for c in planned.identity]
            inverse.plan(spark, spec, table, old, planned.target.columns, table.key)


def _create_targets(
    spec: Spec, transforms: Mapping[tuple[str, str], transform.Transform], ledger: Ledger
) -> dict[tuple[str, str], bool]:
    """Create what is missing; each is on record before it is there, so that whoever comes after a kill knows whose it is."""
    created = {}
    for (source, target), planned in transforms.items():
        with open_store(spec, spec.targets[target], "prepare") as store:
            schema, name = planned.target.schema, planned.target.name
            missing = store.columns(schema, name) is None
            ledger.audit("prepare", "creating", {"source": source, "target": target, "created": missing})
            if missing:
                create_target(spec, store, planned)
            elif store.has_rows(schema, name):
                raise TargetNotEmpty(target, str(planned.target))
            created[source, target] = missing
    return created


def _open_slot(spec: Spec) -> Opened:
    """Commit the publication, see what it is, then make slot and snapshot by one command and have keepers hold the snapshot."""
    dsn = spec.source.dsn.resolve()
    application = application_name(spec.name, "prepare")
    system_id, timeline = snapshot.identify(dsn, application)
    with connect(dsn, application) as old:
        _publish(old, spec)
        pieces = assumptions.present(spec, old, spec.slot)
    made = snapshot.create_slot(dsn, application, spec.slot)
    with made.session:
        kept = snapshot.start_keeper(spec, made.snapshot)
    names = " ".join(one.name for one in kept)
    return Stream(made.l0, system_id, timeline, spec.slot, spec.slot, names, kept[0].visible), pieces


def open_stream(spec: Spec, found: Preflight) -> Opened:
    """Make the change stream, by slot or by trigger log, and the snapshot that it begins with, held by keepers.

    What defines it is committed first, then looked at, and then the stream begins: what alters it later is a change.
    """
    if spec.source.capture == SLOT:
        return _open_slot(spec)
    return _open_log(spec, [found.tables[table.source].identity for table in spec.tables])


def _open_log(spec: Spec, keys: Sequence[Sequence[str]]) -> Opened:
    """Make the trigger log, see what it is, then its first window, whose snapshot keepers hold."""
    dsn = spec.source.dsn.resolve()
    application = application_name(spec.name, "prepare")
    log = triggerlog.Log(spec.name)
    with connect(dsn, application) as old, speaking_to(dsn, "making the trigger log"):
        system_id, timeline = ticks.identify(old)
        triggerlog.install(old, spec, keys)
        pieces = assumptions.present(spec, old, spec.slot)
    with ticks.aligned(dsn, application, log, [table.source_name for table in spec.tables]) as first:
        kept = snapshot.start_keeper(spec, first.snapshot.name)
    names = " ".join(one.name for one in kept)
    return Stream(first.end, system_id, timeline, spec.slot, str(log), names, kept[0].visible), pieces


def _publish(old: Connection, spec: Spec) -> None:
    """Create the publication with all its tables; its lock is asked for briefly and again, so that writers go first."""
    tables = sql.SQL(", ").join(sql.Identifier(*table.source_name) for table in spec.tables)
    statement = sql.SQL("CREATE PUBLICATION {} FOR TABLE ONLY {}").format(sql.Identifier(spec.slot), tables)
    for _ in range(LOCK_TRIES):
        try:
            with old.transaction():
                old.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
                old.execute(statement)
            return
        except psycopg.errors.LockNotAvailable:
            time.sleep(0.2)
    raise LockNotGranted(server_name(spec.source.dsn.resolve()), "lock for the publication", "a session that alters the table")


def _record(
    spec: Spec, ledger: Ledger, stream: Stream, pieces: Sequence[definition.Piece], found: Preflight,
    created: Mapping[tuple[str, str], bool],
) -> None:  # fmt: skip
    """Record, in the caller's transaction, what was made."""
    ledger.record_migration(spec, stream)
    definition.record(ledger, OLD, pieces)
    record_tables(spec, ledger, found)
    for (source, target), made in created.items():
        ledger.record_load(source, target, stream.l0, made)
    ledger.audit("prepare", "done", {"l0": stream.l0, "slot": stream.slot, "spec": spec.digest})


def record_tables(spec: Spec, ledger: Ledger, found: Preflight) -> None:
    """Record the source tables, and the partitions that they have, as they were found before the slot was made."""
    for table in spec.tables:
        seen = found.tables[table.source]
        ledger.record_table(table.source, seen.filenode, seen.columns, seen.partitions is not None)
        partitions.record(ledger, table.source, seen.partitions or ())


# -- the way back, and the end


def remove_from_source(spec: Spec) -> list[str]:
    """Remove keeper, slot, publication, trigger log, refusal and gate from the old store; return what was removed."""
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


def abort(spec: Spec) -> list[str]:
    """Undo all that prepare made; the old store is as it was. Returns what was removed (driver; starts no JVM).

    Refused while the new store has authority over any row, because the old store lacks what is written there.
    """
    with Ledger.open(spec, "abort") as ledger:
        prepared = ledger.exists()
        if prepared and (gone := epochs.at(ledger.authorities(), NEW)) is not None:
            whose = "" if gone == EVERY else f" over {tenants.told(gone)}"
            raise Refused(f"abort: authority{whose} has moved to the new store: `changeover flags rollback` first")
        if prepared:
            removed = reverse_setup.remove(spec, ledger) + remove_from_source(spec)
            removed += _abort_targets(spec, {(load.source, load.target): load.created for load in ledger.loads()})
            drop_ledger(ledger.connection, spec.name)
            _drop_empty_schema(ledger.connection)
        else:
            removed = _remove_unfinished(spec, ledger)
    if remove_spools(spec.work):
        removed.append("spool")
    return removed


def _abort_targets(spec: Spec, created: Mapping[tuple[str, str], bool]) -> list[str]:
    """Remove the gates of loads, and the tables that prepare created."""
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


def _drop_empty_schema(connection: Connection) -> None:
    """Drop the ledger's own tables when no migration is left in them, then the schema if nothing else is in it."""
    row = connection.execute("SELECT to_regclass('changeover.migration') IS NOT NULL").fetchone()
    if row and row[0] and connection.execute("SELECT FROM changeover.migration LIMIT 1").fetchone() is None:
        for table in LEDGER_TABLES:
            connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier("changeover", table)))
        refusal.drop_empty_schema(connection)


def finalize(spec: Spec) -> list[str]:
    """End the migration: drop what is ours in the old store, the gates, tombstones and the spool; the ledger stays as record.

    Raises Refused while a load is open or, with a flag, while the old store has authority over any row (driver; starts no JVM).
    """
    with Ledger.open(spec, "finalize") as ledger:
        ledger.stream("finalize")
        open_loads = [f"{load.source} in {load.target}" for load in ledger.loads() if load.state != CLOSED]
        if open_loads:
            raise Refused(f"finalize: not loaded yet: {', '.join(open_loads)}")
        left = epochs.at(ledger.authorities(), OLD) if spec.flag is not None else None
        if left is not None:
            whose = "" if left == EVERY else f" over {tenants.told(left)}"
            raise Refused(f"finalize: the old store still has authority{whose}: `changeover flags advance` up to complete first")
        removed = reverse_setup.remove(spec, ledger) + remove_from_source(spec)
        for table in spec.tables:
            for target in spec.targets.values():
                with open_store(spec, target, "finalize") as store:
                    # a table that its owner dropped has left our own beside it
                    columns = store.columns(*table.target_name) or ()
                    store.finalize(TargetTable(*table.target_name, columns, table.key))
        ledger.connection.execute("UPDATE changeover.migration SET finalized = now() WHERE name = %s", [spec.name])
        ledger.audit("finalize", "done", {"removed": removed})
    remove_spools(spec.work)
    return removed
