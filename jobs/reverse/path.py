"""The reverse path: the stream by which a store that took over tells the others what was written to it.

`setup` opens it in front of the fence; capture brings it into a spool of its own, and replay offers from there. What stands on
record is where the stream began, how its tables looked, and how far each load has come, in the new store's own log. Where a path
can't be, `obstacles` says why in sentences, and the mirror alone keeps the old store up to date. Everything here runs on the driver
and starts no JVM.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from ldclient.migrations.types import Stage

from changeover.errors import CouldNotFinish, SourceChanged, SpoolGap, StepOrder
from changeover.jobs.ledger.epochs import NEW, epochs_of, shares
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Authority, Partition, SourceColumn, Stream
from changeover.jobs.preflight.obstacles import obstacles
from changeover.jobs.source.catalog import store_columns
from changeover.jobs.source.replication import slot_alarm, slot_of, slot_state
from changeover.jobs.spool.table import Spool
from changeover.jobs.transform import tenancy
from changeover.position import format_lsn, parse_lsn
from changeover.session import application_name, connect
from changeover.spec import Spec, Table, Target
from changeover.stores.base.pgtypes import Column

log = logging.getLogger(__name__)

OLD_STORE = "old store"
"""The old store as a target of reverse replication; no target of a spec can bear a name with a space."""

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


def spool_of(spec: Spec) -> Spool:
    """Return the spool of the new store's stream.

    Args:
        spec: The migration's spec.

    Returns:
        The spool, which is not opened yet (driver, capture).
    """
    return Spool(spec.work / "spool-new")


def new_dsn(spec: Spec) -> str:
    """Return the DSN of the store that takes over; there is one wherever the spec has a flag.

    Args:
        spec: The migration's spec.

    Returns:
        The DSN, which may hold a password.

    Raises:
        SecretMissing: The environment variable of the DSN is not set.
    """
    return spec.targets[tenancy.flag_of(spec).target].dsn_value


def old_target(spec: Spec) -> Target:
    """Return the old store as a target (pure).

    Args:
        spec: The migration's spec.

    Returns:
        The target, named `OLD_STORE`.
    """
    return Target(OLD_STORE, "postgres", dsn=spec.source.dsn)


def targets_of(spec: Spec) -> list[str]:
    """Return the targets that the new store's stream is offered to: the old store, and every one beside the new store.

    Args:
        spec: The migration's spec.

    Returns:
        The targets' names, the old store's first.
    """
    return [OLD_STORE, *sorted(set(spec.targets) - {tenancy.flag_of(spec).target})]


# -- the record


def recorded(ledger: Ledger) -> Path | None:
    """Return the path on record, None where there is none.

    Args:
        ledger: The migration's ledger, open.

    Returns:
        The path, its positions LSNs of the new store's log; None where there is none.
    """
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


def require_recorded(ledger: Ledger) -> Path:
    """Return the path on record, where there must be one.

    Args:
        ledger: The open ledger.

    Returns:
        The path.

    Raises:
        CouldNotFinish: No path was opened yet.
    """
    path = recorded(ledger)
    if path is None:
        raise CouldNotFinish("the ledger has no reverse path: a fence to the new store opens it")
    return path


def loads(ledger: Ledger) -> list[ReverseLoad]:
    """Return how far each table has come back into each target.

    Args:
        ledger: The migration's ledger, open.

    Returns:
        One a table and target, with its position as an LSN of the new store's log.
    """
    rows = ledger.connection.execute(
        "SELECT source, target, applied::text, events, stopped FROM changeover.reverse_load WHERE migration = %s"
        " ORDER BY source, target",
        [ledger.migration],
    ).fetchall()
    return [ReverseLoad(r[0], r[1], parse_lsn(r[2]), r[3], r[4]) for r in rows]


def advance(ledger: Ledger, source: str, target: str, applied: int, events: int) -> None:
    """Record that every event below a position was offered, and that nothing stands in the way.

    The position never goes back.

    Args:
        ledger: The migration's ledger, open.
        source: The source table, as the spec names it.
        target: The target's name.
        applied: The position, an LSN of the new store's log.
        events: How many more events were offered.
    """
    ledger.connection.execute(
        "UPDATE changeover.reverse_load SET applied = greatest(applied, %s), events = events + %s, stopped = NULL"
        " WHERE migration = %s AND source = %s AND target = %s",
        [format_lsn(applied), events, ledger.migration, source, target],
    )


def stop(ledger: Ledger, target: str, reason: str, source: str | None = None) -> None:
    """Record why changes do not come back into a target, of one table or of all.

    The next batch that does come takes it away.

    Args:
        ledger: The migration's ledger, open.
        target: The target's name.
        reason: Why, as a sentence for people.
        source: The source table; all unless given.
    """
    ledger.connection.execute(
        "UPDATE changeover.reverse_load SET stopped = %s WHERE migration = %s AND target = %s AND source = coalesce(%s, source)",
        [reason, ledger.migration, target, source],
    )


def break_off(ledger: Ledger, reason: str) -> None:
    """Record that the path is of no use any more; the next fence opens a new one.

    Args:
        ledger: The migration's ledger, open.
        reason: Why, as a sentence for people.
    """
    ledger.connection.execute(
        "UPDATE changeover.reverse_stream SET broken = coalesce(broken, %s) WHERE migration = %s", [reason, ledger.migration]
    )


def break_at_gap(ledger: Ledger, gap: SourceChanged | SpoolGap) -> str:
    """Record that the path has a gap, which nothing can close.

    Args:
        ledger: The migration's ledger, open.
        gap: The gap.

    Returns:
        The reason on record, a sentence.
    """
    what = gap.what if isinstance(gap, SourceChanged) else "slot"
    reason = f"the new store's change stream has a gap ({what}), and the next fence begins another one"
    break_off(ledger, reason)
    return reason


def begun_since(path: Path, changes: Sequence[Authority]) -> frozenset[int]:
    """Return the epochs that began under this path (pure): an earlier one's positions may be those of another server.

    Args:
        path: The path on record.
        changes: The moves of authority on record, oldest first.

    Returns:
        The epochs.
    """
    return frozenset(change.epoch for change in changes if change.at >= path.opened)


def carried(path: Path | None, changes: Sequence[Authority]) -> frozenset[int]:
    """Return the epochs of the new store whose every event the path carries (pure).

    Args:
        path: The path on record, None where there is none.
        changes: The moves of authority on record, oldest first.

    Returns:
        The epochs.
    """
    if path is None or path.broken:
        return frozenset()
    since = begun_since(path, changes)
    return frozenset(epoch for epoch, at in epochs_of(changes, NEW).items() if epoch in since and path.stream.l0 <= at)


def whole(ledger: Ledger) -> str | None:
    """Return why the old store does not get all that is written to the new one (driver).

    It is asked while the new store has authority.

    Args:
        ledger: The migration's ledger, open.

    Returns:
        A sentence, None where the old store gets everything.
    """
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
    """Return how the path stands (driver; looks only).

    Args:
        spec: The migration's spec.
        ledger: The migration's ledger, open.

    Returns:
        The state, None without a flag.
    """
    if spec.flag is None:
        return None
    path, application = recorded(ledger), application_name(spec.name, "status")
    with connect(new_dsn(spec), application) as new:
        here, slot, _ = slot_state(new, spec.name, slot_of(spec))
        alarm = slot_alarm(new, slot_of(spec))
        at_new = any(held.store == NEW for held in shares(ledger.authorities()))
        if at_new:
            lacking = whole(ledger) or ("its slot is gone" if slot in ("missing", "lost") else None)
        else:
            with connect(spec.source.dsn.resolve(), application) as old:
                lacking = next(iter(obstacles(spec, old, new, slot_of(spec))), None)
    into = tuple(loads(ledger))
    comes_back = path is not None and at_new
    try:
        end = None if path is None else max(spool_of(spec).end(), path.stream.l0)
    except StepOrder:  # the work folder is elsewhere
        end = None
    watched_from = format_lsn(path.stream.l0) if path is not None and not path.broken else None
    behind = max((max(0, parse_lsn(here) - load.applied) for load in into), default=0) if comes_back else None
    return State(watched_from, lacking, slot, None if end is None else format_lsn(end), behind, alarm, into)


def columns_of(path: Path, table: Table) -> tuple[Column, ...]:
    """Return the new table's columns as frames carry them (pure).

    Args:
        path: The path on record.
        table: The table of the spec.

    Returns:
        The columns, in order.
    """
    return store_columns(path.tables[table.target_relation])
