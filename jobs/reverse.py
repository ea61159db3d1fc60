"""The reverse path: the stream by which a store that took over tells the others what was written to it.

It is opened in front of the fence, publication first and then the slot, so it holds whatever commits under the new authority;
capture brings it into a spool of its own, and replay offers from there. What stands on record is where the stream began, how its
tables looked, and how far each load has come, in the new store's own log. Where a path can't be, `obstacles` says why in sentences,
and the mirror alone keeps the old store up to date. Everything here runs on the driver and starts no JVM.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from ldclient.migrations.types import Stage
from psycopg import sql

from changeover.errors import SourceChanged, SpoolGap, StepOrder
from changeover.jobs import snapshot
from changeover.jobs.entries import Authority, Partition, SourceColumn, Stream
from changeover.jobs.ledger import Ledger
from changeover.jobs.obstacles import has_slot, obstacles, target_as_source
from changeover.jobs.partitions import NewRoots
from changeover.jobs.preflight import SourceTable, source_table, store_columns
from changeover.jobs.replication import require_stream, slot_alarm
from changeover.jobs.spool import Spool
from changeover.jobs.tenure import NEW, epochs_of, shares
from changeover.position import format_lsn, parse_lsn
from changeover.session import LOCK_TIMEOUT, Connection, application_name, connect, speaking_to
from changeover.spec import Spec, Table, Target
from changeover.stores import Column

log = logging.getLogger(__name__)

OLD_STORE = "old store"
"""The old store as a target of the way back; no target of a spec can bear a name with a space."""

LEASE_SECONDS = 5.0

COMPLETED = "the last stage was reached, from which the old store gets nothing any more"


@dataclass(frozen=True)
class Path:
    """The path on record: its stream, its tables' columns by name, why it is of no use any more, if so, and when it was opened.

    `parts` are the partitions of those tables that have some.
    """

    stream: Stream
    tables: Mapping[str, tuple[SourceColumn, ...]]
    broken: str | None
    opened: datetime
    parts: Mapping[str, tuple[Partition, ...]]


@dataclass(frozen=True)
class ReverseLoad:
    """How far a table's changes have come into a target; `applied` is in the new store's log, `stopped` why they stand still."""

    source: str
    target: str
    applied: int
    events: int
    stopped: str | None


def slot_of(spec: Spec) -> str:
    """Return the name of the new store's slot and publication; no migration's name begins as its own part does."""
    return f"changeover__new_{spec.name}"


def spool_of(spec: Spec) -> Spool:
    """Return the spool of the new store's stream."""
    return Spool(spec.work / "spool-new")


def new_dsn(spec: Spec) -> str:
    """Return the DSN of the store that takes over; there is one wherever the spec has a flag."""
    assert spec.flag is not None
    return spec.targets[spec.flag.target].dsn_value


def old_target(spec: Spec) -> Target:
    """Return the old store as a target."""
    return Target(OLD_STORE, "postgres", dsn=spec.source.dsn)


def targets_of(spec: Spec) -> list[str]:
    """Return the targets that the new store's stream is offered to: the old store, and every one beside the new store."""
    assert spec.flag is not None
    return [OLD_STORE, *sorted(set(spec.targets) - {spec.flag.target})]


# -- the record


def recorded(ledger: Ledger) -> Path | None:
    """Return the path on record, None where there is none."""
    row = ledger.connection.execute(
        "SELECT l0::text, system_id, timeline, slot, tables, broken, opened FROM changeover.reverse_stream WHERE migration = %s",
        [ledger.migration],
    ).fetchone()
    if row is None:
        return None
    tables = {name: tuple(SourceColumn(**column) for column in table["columns"]) for name, table in row[4].items()}
    parts = {
        name: tuple(Partition(**part) for part in table["partitions"])
        for name, table in row[4].items()
        if table["partitions"] is not None
    }
    return Path(Stream(parse_lsn(row[0]), row[1], row[2], row[3], row[3], "", ""), tables, row[5], row[6], parts)


def loads(ledger: Ledger) -> list[ReverseLoad]:
    """Return how far each table has come back into each target."""
    rows = ledger.connection.execute(
        "SELECT source, target, applied::text, events, stopped FROM changeover.reverse_load WHERE migration = %s"
        " ORDER BY source, target",
        [ledger.migration],
    ).fetchall()
    return [ReverseLoad(r[0], r[1], parse_lsn(r[2]), r[3], r[4]) for r in rows]


def advance(ledger: Ledger, source: str, target: str, applied: int, events: int) -> None:
    """Record that every event below `applied` was offered, and that nothing stands in the way; the position never goes back."""
    ledger.connection.execute(
        "UPDATE changeover.reverse_load SET applied = greatest(applied, %s), events = events + %s, stopped = NULL"
        " WHERE migration = %s AND source = %s AND target = %s",
        [format_lsn(applied), events, ledger.migration, source, target],
    )


def stop(ledger: Ledger, target: str, reason: str, source: str | None = None) -> None:
    """Record why changes do not come back into a target, of one table or of all; the next batch that does takes it away."""
    ledger.connection.execute(
        "UPDATE changeover.reverse_load SET stopped = %s WHERE migration = %s AND target = %s AND source = coalesce(%s, source)",
        [reason, ledger.migration, target, source],
    )


def break_off(ledger: Ledger, reason: str) -> None:
    """Record that the path is of no use any more; the next fence opens a new one."""
    ledger.connection.execute(
        "UPDATE changeover.reverse_stream SET broken = coalesce(broken, %s) WHERE migration = %s", [reason, ledger.migration]
    )


def break_at_gap(ledger: Ledger, gap: SourceChanged | SpoolGap) -> str:
    """Record that the path has a gap, which nothing can close; return it as a sentence."""
    what = gap.what if isinstance(gap, SourceChanged) else "slot"
    reason = f"the new store's change stream has a gap ({what}), and the next fence begins another one"
    break_off(ledger, reason)
    return reason


def begun_since(path: Path, changes: Sequence[Authority]) -> frozenset[int]:
    """Return the epochs that began under this path (pure): an earlier one's positions may be those of another server."""
    return frozenset(change.epoch for change in changes if change.at >= path.opened)


def carried(path: Path | None, changes: Sequence[Authority]) -> frozenset[int]:
    """Return the epochs of the new store whose every event the path carries (pure)."""
    if path is None or path.broken:
        return frozenset()
    since = begun_since(path, changes)
    return frozenset(epoch for epoch, at in epochs_of(changes, NEW).items() if epoch in since and path.stream.l0 <= at)


def whole(ledger: Ledger) -> str | None:
    """Return why the old store does not get all that is written to the new one, which has authority; None where it does."""
    path = recorded(ledger)
    if path is None:
        return "there is no reverse path"
    if ledger.stage() == Stage.COMPLETE.value:
        return COMPLETED
    changes = ledger.authorities()
    if not {held.epoch for held in shares(changes) if held.store == NEW} <= carried(path, changes):
        return path.broken or "the reverse path does not reach back to the fence"
    stopped = [load for load in loads(ledger) if load.target == OLD_STORE and load.stopped]
    return f"{stopped[0].source}: {stopped[0].stopped}" if stopped else None


def lacking(spec: Spec, ledger: Ledger) -> str | None:
    """Return what `whole` does, the new store's server asked too: capture, which tells of a gap by itself, may be down (driver)."""
    path = recorded(ledger)
    if (reason := whole(ledger)) is not None or path is None:
        return reason
    try:
        _require(spec, ledger, path)
    except (SourceChanged, SpoolGap) as gap:
        return break_at_gap(ledger, gap)
    return None


@dataclass(frozen=True)
class State:
    """The path as a person wants it told: `lacking` is why the old store does not get everything while the new one has authority.

    `slot` says whether capture reads the stream; bytes are of the new store's write-ahead log. `behind_bytes` is how far the
    slowest load is behind, None while nothing has to come back.
    """

    watched_from: str | None
    lacking: str | None
    slot: str
    spool_end: str | None
    behind_bytes: int | None
    alarm: str | None
    loads: tuple[ReverseLoad, ...]

    @property
    def line(self) -> str:
        """Return it as a sentence."""
        if self.lacking == COMPLETED:
            return self.lacking
        if self.lacking is not None:
            return f"the mirror alone keeps the old store up to date: {self.lacking}"
        if self.watched_from is None:
            return "opened by the fence"
        if self.behind_bytes is None:
            return f"open, at rest; the new store is watched from {self.watched_from}"
        return f"{self.behind_bytes:,} bytes behind, the stream is {CAPTURED[self.slot]}"


CAPTURED = {"active": "captured", "inactive": "not captured", "missing": "gone", "lost": "lost"}


def state(spec: Spec, ledger: Ledger) -> State | None:
    """Return how the path stands, None without a flag (driver; looks only)."""
    if spec.flag is None:
        return None
    path, application = recorded(ledger), application_name(spec.name, "status")
    with connect(new_dsn(spec), application) as new:
        row = new.execute(SLOT, [slot_of(spec)]).fetchone()
        alarm = slot_alarm(new, slot_of(spec))
        at_new = any(held.store == NEW for held in shares(ledger.authorities()))
        if at_new:
            lacking = whole(ledger) or ("its slot is gone" if row and row[1] in ("missing", "lost") else None)
        else:
            with connect(spec.source.dsn.resolve(), application) as old:
                lacking = next(iter(obstacles(spec, old, new, slot_of(spec))), None)
    assert row is not None
    here = tuple(loads(ledger))
    comes_back = path is not None and at_new
    try:
        end = None if path is None else max(spool_of(spec).end(), path.stream.l0)
    except StepOrder:  # the work folder is elsewhere
        end = None
    watched_from = format_lsn(path.stream.l0) if path is not None and not path.broken else None
    behind = max((max(0, parse_lsn(row[0]) - load.applied) for load in here), default=0) if comes_back else None
    return State(watched_from, lacking, row[1], None if end is None else format_lsn(end), behind, alarm, here)


SLOT = """
SELECT pg_current_wal_insert_lsn()::text, CASE WHEN s.slot_name IS NULL THEN 'missing' WHEN s.wal_status = 'lost' THEN 'lost'
    WHEN s.active THEN 'active' ELSE 'inactive' END
FROM (SELECT) AS one LEFT JOIN pg_replication_slots s ON s.slot_name = %s
"""


# -- making and removing it


def open_path(spec: Spec, ledger: Ledger) -> Path | None:
    """Open the path unless it is open and whole; None, with the reasons in the log, where there can be none.

    Waits for open transactions of the new store's server, so it comes before a fence's pause. Raises SlotBlocked, which names the
    oldest of them, LockNotGranted, and SpecError.
    """
    path = recorded(ledger)
    if path is not None and not path.broken and not any(load.stopped for load in loads(ledger)) and _intact(spec, ledger, path):
        return path
    dsn, application = new_dsn(spec), application_name(spec.name, "reverse")
    with connect(spec.source.dsn.resolve(), application) as old, connect(dsn, application) as new:
        reasons = obstacles(spec, old, new, slot_of(spec))
        if reasons:
            log.warning("no reverse path, the mirror alone keeps the old store up to date: %s", "; ".join(reasons))
            break_off(ledger, reasons[0])
            return None
        system_id, timeline = snapshot.identify(dsn, application)
        _remove(new, slot_of(spec))
        seen = [source_table(new, target_as_source(table)) for table in spec.tables]
        tables = {one.source: one for one in seen if one is not None}
        with speaking_to(dsn, "creating the publication"):
            _publish(new, slot_of(spec), [tuple(name.split(".", 1)) for name in tables])
        made = snapshot.create_slot(dsn, application, slot_of(spec))
        made.session.close()
    stream = Stream(made.l0, system_id, timeline, slot_of(spec), slot_of(spec), "", "")
    if _goes_on(spec, path, stream):
        spool_of(spec).create()
        _record(spec, ledger, stream, tables)
    else:
        _begin_afresh(spec, ledger, stream, tables)
    log.info("the reverse path is open: slot %s of the new store, from %s", slot_of(spec), format_lsn(made.l0))
    return recorded(ledger)


def _intact(spec: Spec, ledger: Ledger, path: Path) -> bool:
    try:
        _require(spec, ledger, path)
    except (SourceChanged, SpoolGap) as error:
        log.warning("the reverse path is opened anew: %s", error)
        return False
    return True


def roots(spec: Spec, ledger: Ledger, path: Path) -> NewRoots:
    """Return what the partitions in the new store's stream belong to; those that are born are put on record."""

    def record(name: str, parts: Sequence[Partition]) -> None:
        ledger.connection.execute(
            "UPDATE changeover.reverse_stream SET tables = jsonb_set(tables, ARRAY[%s, 'partitions'], %s) WHERE migration = %s",
            [name, json.dumps([part.__dict__ for part in parts]), ledger.migration],
        )

    return NewRoots(spec, new_dsn(spec), path.parts, record)


def parted(spec: Spec, ledger: Ledger, new: Connection) -> str | None:
    """Return that a partition of the new store came or went without an event, which breaks the path off; else None."""
    path = recorded(ledger)
    try:
        if path is not None and path.broken is None:
            roots(spec, ledger, path).look(new)
    except SourceChanged as gap:
        return break_at_gap(ledger, gap)
    return None


def _require(spec: Spec, ledger: Ledger, path: Path) -> None:
    """Raise SourceChanged or SpoolGap unless the new store's stream is whole from the end of its spool on."""
    if path.parts:
        with connect(new_dsn(spec), application_name(spec.name, "reverse")) as new:
            roots(spec, ledger, path).look(new)
    spool = spool_of(spec)
    while True:
        end = spool.end()
        try:
            return require_stream(new_dsn(spec), application_name(spec.name, "reverse"), path.stream, max(end, path.stream.l0))
        except SpoolGap:
            if spool.end() == end:  # else capture has spooled and acknowledged meanwhile
                raise


def _goes_on(spec: Spec, path: Path | None, stream: Stream) -> bool:
    """Return whether a new stream's positions go on where those of the spool end: it is the same server, and its log the same."""
    if path is not None and (path.stream.system_id, path.stream.timeline) != (stream.system_id, stream.timeline):
        return False
    try:
        return spool_of(spec).end() <= stream.l0  # a server that was restored as it stood has another log under the same name
    except StepOrder:
        return path is None


def _begin_afresh(spec: Spec, ledger: Ledger, stream: Stream, tables: Mapping[str, SourceTable]) -> None:
    """Put a path on record that has nothing in common with the one before it: neither a spooled event nor a position."""
    break_off(ledger, "the new store is another server than the one that the reverse path was opened on")
    with ledger.lease("capture-new", wait_seconds=LEASE_SECONDS):
        log.warning("what was spooled of the new store before is removed: its log is another one now")
        shutil.rmtree(spool_of(spec).path, ignore_errors=True)
        spool_of(spec).create()
        _record(spec, ledger, stream, tables, afresh=True)


def _publish(new: Connection, name: str, tables: Sequence[tuple[str, ...]]) -> None:
    """Create the publication; its lock is asked for briefly, the caller may try again."""
    with new.transaction():
        new.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
        listed = sql.SQL(", ").join(sql.Identifier(*table) for table in tables)
        new.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE ONLY {}").format(sql.Identifier(name), listed))


def _record(spec: Spec, ledger: Ledger, stream: Stream, tables: Mapping[str, SourceTable], *, afresh: bool = False) -> None:
    """Put an opened path on record in one transaction, each load at its beginning, or where it is beyond that unless `afresh`."""
    looks = {
        name: {
            "columns": [column.__dict__ for column in table.columns],
            "partitions": None if table.partitions is None else [part.__dict__ for part in table.partitions],
        }
        for name, table in tables.items()
    }
    with ledger.connection.transaction():
        ledger.connection.execute(
            "INSERT INTO changeover.reverse_stream (migration, l0, system_id, timeline, slot, tables)"
            " VALUES (%s, %s, %s, %s, %s, %s)"
            " ON CONFLICT (migration) DO UPDATE SET l0 = excluded.l0, system_id = excluded.system_id, timeline = excluded.timeline,"
            " tables = excluded.tables, opened = now(), broken = NULL",
            [spec.name, format_lsn(stream.l0), stream.system_id, stream.timeline, stream.slot, json.dumps(looks)],
        )
        for table in spec.tables:
            for target in targets_of(spec):
                ledger.connection.execute(
                    "INSERT INTO changeover.reverse_load (migration, source, target, applied) VALUES (%s, %s, %s, %s)"
                    " ON CONFLICT (migration, source, target) DO UPDATE SET stopped = NULL,"
                    " applied = CASE WHEN %s THEN excluded.applied ELSE greatest(reverse_load.applied, excluded.applied) END",
                    [spec.name, table.source, target, format_lsn(stream.l0), afresh],
                )


def remove(spec: Spec, ledger: Ledger | None) -> list[str]:
    """Take the path away: its record first, so that capture lets go of it; return what was removed."""
    if spec.flag is None:
        return []
    if ledger is not None:
        ledger.connection.execute("DELETE FROM changeover.reverse_stream WHERE migration = %s", [spec.name])
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


def columns_of(path: Path, table: Table) -> tuple[Column, ...]:
    """Return the new table's columns as frames carry them."""
    return store_columns(path.tables[".".join(table.target_name)])


def leftovers(spec: Spec) -> list[str]:
    """Return what is left of the path in the new store (looks only)."""
    if spec.flag is None:
        return []
    with connect(new_dsn(spec), application_name(spec.name, "leftovers")) as new:
        found = [f"replication slot {slot_of(spec)}"] if has_slot(new, slot_of(spec)) else []
        rows = new.execute("SELECT 'publication ' || pubname FROM pg_publication WHERE pubname = %s", [slot_of(spec)]).fetchall()
    return found + [row[0] for row in rows]
