"""The setup of the reverse path: opened in front of a fence, proved to be whole, and taken away.

Publication first and then the slot, so that it holds whatever commits under the new authority. One whose stream has a gap, or whose
server is another one, is opened anew. Everything here runs on the driver and starts no JVM.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence

from psycopg import sql

from changeover.errors import SourceChanged, SpoolGap, StepOrder
from changeover.jobs.guarantee import definition
from changeover.jobs.ledger.epochs import NEW
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED, Stream
from changeover.jobs.preflight.obstacles import obstacles
from changeover.jobs.reverse.path import break_at_gap, break_off, new_dsn, recorded, spool_of, targets_of, whole
from changeover.jobs.source import snapshot
from changeover.jobs.source.catalog import SourceTable, record_tables, source_table, tables_of
from changeover.jobs.source.partitions import Roots
from changeover.jobs.source.replication import require_stream, slot_of
from changeover.names import qualified
from changeover.position import format_lsn
from changeover.session import LOCK_TIMEOUT, Connection, application_name, connect, speaking_to
from changeover.spec import Spec

log = logging.getLogger(__name__)

LEASE_SECONDS = 5.0


def open_path(spec: Spec, ledger: Ledger) -> Stream | None:
    """Open the path unless it is open and whole (driver).

    Waits for open transactions of the new store's server, so it comes before a fence's pause.

    Args:
        spec: The migration's spec.
        ledger: The migration's ledger, open.

    Returns:
        The path; None where there can be none, with the reasons in the log.

    Raises:
        SlotBlocked: A transaction of the new store's server stays open; it names the oldest.
        LockNotGranted: The publication's lock was not granted.
        SpecError: A secret or column of the spec is not there.
    """
    path = recorded(ledger)
    if path is not None and not path.broken and not any(load.stopped for load in ledger.loads(NEW)) and _intact(spec, ledger, path):
        return path
    dsn, application = new_dsn(spec), application_name(spec.name, "reverse")
    with connect(spec.source.dsn.resolve(), application) as old, connect(dsn, application) as new:
        reasons = obstacles(spec, old, new, slot_of(spec))
        if reasons:
            log.warning("no reverse path, %s: %s", spec.without_stream, "; ".join(reasons))
            break_off(ledger, reasons[0])
            return None
        system_id, timeline = snapshot.identify(dsn, application)
        _remove(new, slot_of(spec))
        tables = {table.source: found for table in tables_of(spec, NEW) if (found := source_table(new, table)) is not None}
        with speaking_to(dsn, "creating the publication"):
            _publish(new, slot_of(spec), [qualified(name) for name in tables])
            oids = definition.relations(new, [table.source_name for table in tables_of(spec, NEW)])
            pieces = definition.of_slot(new, slot_of(spec), oids)
        made = snapshot.create_slot(dsn, application, slot_of(spec))
        made.session.close()
    stream = Stream(made.l0, system_id, timeline, slot_of(spec), slot_of(spec), "", "")
    if _goes_on(spec, path, stream):
        spool_of(spec).create(stream.l0)
        _record(spec, ledger, stream, tables, pieces)
    else:
        _begin_afresh(spec, ledger, stream, tables, pieces)
    log.info("the reverse path is open: slot %s of the new store, from %s", slot_of(spec), format_lsn(made.l0))
    return recorded(ledger)


def _intact(spec: Spec, ledger: Ledger, path: Stream) -> bool:
    try:
        _require(spec, ledger, path)
    except (SourceChanged, SpoolGap) as error:
        log.warning("the reverse path is opened anew: %s", error)
        return False
    return True


def roots(spec: Spec, ledger: Ledger) -> Roots:
    """Return what the partitions in the new store's stream belong to (capture).

    Args:
        spec: The migration's spec.
        ledger: The migration's ledger, open.

    Returns:
        The partitions, which look up what they don't know and record it.

    Raises:
        SecretMissing: The environment variable of the DSN is not set.
    """
    return Roots(ledger, new_dsn(spec), tables_of(spec, NEW), NEW)


def require_definition(spec: Spec, ledger: Ledger, new: Connection) -> None:
    """Raise unless the new store's stream is defined by the rows that were recorded.

    Args:
        spec: The migration's spec.
        ledger: The migration's ledger, open.
        new: A session with the new store.

    Raises:
        SourceChanged: The publication or a table's key is another row.
    """
    prepared = definition.recorded(ledger, NEW)
    for change in definition.compared(prepared, definition.of_slot(new, slot_of(spec), definition.known(prepared))):
        raise definition.gap(change, prepared)


def gap_in(spec: Spec, ledger: Ledger, new: Connection) -> str | None:
    """Return what came or went in the new store without an event (driver).

    Args:
        spec: The migration's spec.
        ledger: The migration's ledger, open.
        new: A session with the new store.

    Returns:
        A sentence, after which the path is broken off; None where nothing did.
    """
    path = recorded(ledger)
    try:
        if path is not None and path.broken is None:
            require_definition(spec, ledger, new)
            roots(spec, ledger).look(new)
    except SourceChanged as gap:
        return break_at_gap(ledger, gap)
    return None


def _require(spec: Spec, ledger: Ledger, path: Stream) -> None:
    """Raise SourceChanged or SpoolGap unless the new store's stream is whole from the end of its spool on."""
    with connect(new_dsn(spec), application_name(spec.name, "reverse")) as new:
        require_definition(spec, ledger, new)
        roots(spec, ledger).look(new)
    dsn, application = new_dsn(spec), application_name(spec.name, "reverse")
    spool_of(spec).proved(path.l0, lambda durable: require_stream(dsn, application, path, durable))


def _goes_on(spec: Spec, path: Stream | None, stream: Stream) -> bool:
    """Return whether a new stream's positions go on where those of the spool end: it is the same server, and its log the same."""
    if path is not None and (path.system_id, path.timeline) != (stream.system_id, stream.timeline):
        return False
    try:
        return spool_of(spec).end() <= stream.l0  # a server that was restored as it stood has another log under the same name
    except StepOrder:
        return path is None


def _begin_afresh(
    spec: Spec, ledger: Ledger, stream: Stream, tables: Mapping[str, SourceTable], pieces: Sequence[definition.Piece]
) -> None:
    """Put a path on record that has nothing in common with the one before it: neither a spooled event nor a position."""
    break_off(ledger, "the new store is another server than the one that the reverse path was opened on")
    with ledger.lease("capture-new", wait_seconds=LEASE_SECONDS):
        log.warning("what was spooled of the new store before is removed: its log is another one now")
        shutil.rmtree(spool_of(spec).path, ignore_errors=True)
        spool_of(spec).create(stream.l0)
        _record(spec, ledger, stream, tables, pieces, afresh=True)


def _publish(new: Connection, name: str, tables: Sequence[tuple[str, ...]]) -> None:
    """Create the publication; its lock is asked for briefly, the caller may try again."""
    with new.transaction():
        new.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
        listed = sql.SQL(", ").join(sql.Identifier(*table) for table in tables)
        new.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE ONLY {}").format(sql.Identifier(name), listed))


def _record(
    spec: Spec, ledger: Ledger, stream: Stream, tables: Mapping[str, SourceTable], pieces: Sequence[definition.Piece], *,
    afresh: bool = False,
) -> None:  # fmt: skip
    """Put an opened path on record in one transaction, each load at its beginning, or where it is beyond that unless `afresh`."""
    with ledger.connection.transaction():
        ledger.record_stream(NEW, stream)
        definition.record(ledger, NEW, pieces)
        record_tables(ledger, tables, NEW)
        for table in spec.tables:
            for target in targets_of(spec):
                ledger.connection.execute(
                    "INSERT INTO changeover.load (migration, store, source, target, state, applied)"
                    " VALUES (%s, 'new', %s, %s, %s, %s)"
                    " ON CONFLICT (migration, store, source, target) DO UPDATE SET stopped = NULL,"
                    " applied = CASE WHEN %s THEN excluded.applied ELSE greatest(load.applied, excluded.applied) END",
                    [spec.name, table.source, target, CLOSED, format_lsn(stream.l0), afresh],
                )


def remove(spec: Spec, ledger: Ledger | None) -> list[str]:
    """Take the path away: its record first, so that capture lets go of it (driver).

    Args:
        spec: The migration's spec.
        ledger: The migration's ledger, None where there is none.

    Returns:
        What was removed, each as a phrase.
    """
    if spec.flag is None:
        return []
    if ledger is not None:
        ledger.forget_stream(NEW)
    dsn = new_dsn(spec)
    with connect(dsn, application_name(spec.name, "remove")) as new, speaking_to(dsn, "removing the reverse path"):
        removed = [f"{what} of the new store" for what in _remove(new, slot_of(spec))]
    if spool_of(spec).path.exists():
        shutil.rmtree(spool_of(spec).path)
        removed.append("spool of the new store")
    return removed


def _remove(new: Connection, name: str) -> list[str]:
    removed = [f"replication slot {name}"] if snapshot.drop_slot(new, name) else []
    if new.execute("SELECT FROM pg_publication WHERE pubname = %s", [name]).fetchone() is not None:
        new.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(name)))
        removed.append(f"publication {name}")
    return removed


def lacking(spec: Spec, ledger: Ledger) -> str | None:
    """Return what `whole` does, with the new store's server asked too (driver).

    Capture, which tells of a gap by itself, may be down.

    Args:
        spec: The migration's spec.
        ledger: The migration's ledger, open.

    Returns:
        A sentence, None where the old store gets everything.
    """
    path = recorded(ledger)
    if (reason := whole(ledger)) is not None or path is None:
        return reason
    try:
        _require(spec, ledger, path)
    except (SourceChanged, SpoolGap) as gap:
        return break_at_gap(ledger, gap)
    return None


def leftovers(spec: Spec) -> list[str]:
    """Return what is left of the path in the new store (driver; looks only).

    Args:
        spec: The migration's spec.

    Returns:
        What is left, each as a phrase.
    """
    if spec.flag is None:
        return []
    with connect(new_dsn(spec), application_name(spec.name, "leftovers")) as new:
        rows = new.execute(
            "SELECT 'replication slot ' || slot_name FROM pg_replication_slots WHERE slot_name = %(name)s"
            " AND database = current_database() UNION ALL SELECT 'publication ' || pubname FROM pg_publication"
            " WHERE pubname = %(name)s",
            {"name": slot_of(spec)},
        ).fetchall()
    return [row[0] for row in rows]
