"""The reverse path: the stream by which a store that took over tells the others what was written to it.

`setup` opens it in front of the fence; capture brings it into a spool of its own, and replay offers from there. What stands on
record is where the stream began, how its tables looked, and how far each load has come, in the new store's own log. Where a path
can't be, `obstacles` says why in sentences, and nothing but a router's mirror keeps the old store up to date. Everything here runs
on the driver and starts no JVM.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from ldclient.migrations.types import Stage

from changeover.errors import CouldNotFinish, SourceChanged, SpoolGap, StepOrder
from changeover.jobs.ledger.epochs import NEW, epochs_of, shares
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import OLD_STORE, Authority, Load, Stream
from changeover.jobs.preflight.obstacles import obstacles
from changeover.jobs.source.replication import slot_alarm, slot_of, slot_state
from changeover.jobs.spool.table import Spool
from changeover.jobs.transform import tenancy
from changeover.position import format_lsn, parse_lsn
from changeover.session import application_name, connect
from changeover.spec import Spec, Target

log = logging.getLogger(__name__)

COMPLETED = "the last stage was reached, from which the old store gets nothing any more"


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


def recorded(ledger: Ledger) -> Stream | None:
    """Return the path on record: the new store's stream.

    Args:
        ledger: The migration's ledger, open.

    Returns:
        The stream, its positions LSNs of the new store's log; None where there is none.
    """
    return ledger.recorded_stream(NEW)


def require_recorded(ledger: Ledger) -> Stream:
    """Return the path on record, where there must be one.

    Args:
        ledger: The open ledger.

    Returns:
        The stream.

    Raises:
        CouldNotFinish: No path was opened yet.
    """
    path = recorded(ledger)
    if path is None:
        raise CouldNotFinish("the ledger has no reverse path: a fence to the new store opens it")
    return path


def break_off(ledger: Ledger, reason: str) -> None:
    """Record that the path is of no use any more; the next fence opens a new one.

    Args:
        ledger: The migration's ledger, open.
        reason: Why, as a sentence for people.
    """
    ledger.connection.execute(
        "UPDATE changeover.stream SET broken = coalesce(broken, %s) WHERE migration = %s AND store = 'new'",
        [reason, ledger.migration],
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


def begun_since(path: Stream, changes: Sequence[Authority]) -> frozenset[int]:
    """Return the epochs that began under this path (pure): an earlier one's positions may be those of another server.

    Args:
        path: The path on record.
        changes: The moves of authority on record, oldest first.

    Returns:
        The epochs.
    """
    return frozenset(change.epoch for change in changes if path.opened is not None and change.at >= path.opened)


def carried(path: Stream | None, changes: Sequence[Authority]) -> frozenset[int]:
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
    return frozenset(epoch for epoch, at in epochs_of(changes, NEW).items() if epoch in since and path.l0 <= at)


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
    stopped = [load for load in ledger.loads(NEW) if load.target == OLD_STORE and load.stopped]
    return f"{stopped[0].source}: {stopped[0].stopped}" if stopped else None


@dataclass(frozen=True)
class State:
    """The path as a person wants it told: `lacking` is why the old store does not get everything while the new one has authority.

    `slot` says whether capture reads the stream; bytes are of the new store's write-ahead log. `behind_bytes` is how far the
    slowest load is behind, None while nothing has to come back. `without` is what keeps the old store up to date where the path
    does not.
    """

    watched_from: str | None
    lacking: str | None
    slot: str
    spool_end: str | None
    behind_bytes: int | None
    alarm: str | None
    loads: tuple[Load, ...]
    without: str = "nothing keeps the old store up to date"

    @property
    def line(self) -> str:
        """Return it as a sentence."""
        if self.lacking == COMPLETED:
            return self.lacking
        if self.lacking is not None:
            return f"{self.without}: {self.lacking}"
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
    into = tuple(ledger.loads(NEW))
    comes_back = path is not None and at_new
    try:
        end = None if path is None else max(spool_of(spec).end(), path.l0)
    except StepOrder:  # the work folder is elsewhere
        end = None
    watched_from = format_lsn(path.l0) if path is not None and not path.broken else None
    behind = max((max(0, parse_lsn(here) - load.applied) for load in into), default=0) if comes_back else None
    return State(watched_from, lacking, slot, None if end is None else format_lsn(end), behind, alarm, into, spec.without_stream)
