"""The opening of a change stream: publication, slot and snapshot, or the trigger log and its first tick.

What defines the stream is committed first, then looked at, and then the stream begins: what alters it later is a change.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import psycopg
from psycopg import sql

from changeover.errors import LockNotGranted
from changeover.jobs.guarantee import assumptions, definition
from changeover.jobs.ledger.records import Stream
from changeover.jobs.preflight.rules import Preflight
from changeover.jobs.source import snapshot, ticks, triggerlog
from changeover.session import LOCK_TIMEOUT, Connection, application_name, connect, server_name, speaking_to
from changeover.spec import SLOT, Spec

log = logging.getLogger(__name__)


LOCK_TRIES = 30

Opened = tuple[Stream, tuple[definition.Piece, ...]]
"""A stream, and what defined it before it began."""


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


def open_stream(spec: Spec, findings: Preflight) -> Opened:
    """Make the change stream, and the snapshot that it begins with, held by keepers (driver).

    What defines it is committed first, then looked at, and then the stream begins: what alters it
    later is a change.

    Args:
        spec: The migration's spec.
        findings: What the preflight found.

    Returns:
        The stream as it goes on record, and the catalogue's rows that define it.

    Raises:
        SlotBlocked: A transaction of the source stays open; it names the oldest.
    """
    if spec.source.capture == SLOT:
        return _open_slot(spec)
    return _open_log(spec, [findings.tables[table.source].identity for table in spec.tables])


def _open_log(spec: Spec, keys: Sequence[Sequence[str]]) -> Opened:
    """Make the trigger log, see what it is, then its first tick, whose snapshot keepers hold."""
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
