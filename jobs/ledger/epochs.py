"""Epochs: which store had authority over a row, from where to where in its own log, and what that makes of an event.

The authority log has a row per tenant and move. It stamps every event with the epoch of its
interval. What a store's log holds outside of its store's intervals is never offered to another
store. It is the echo of our own marked write, or a rogue write, which is kept and alarmed.
Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import NamedTuple

from changeover.errors import CouldNotFinish
from changeover.jobs.ledger.records import NEW as NEW
from changeover.jobs.ledger.records import OLD as OLD
from changeover.jobs.ledger.records import Authority
from changeover.position import Version
from changeover.tenants import EVERY, Tenants

FOR_EVER = 2**63 - 1


class AuthorityEpoch(NamedTuple):
    """A tenant's authority of one store: the epoch, and the commit LSNs since <= lsn < until in that store's own log."""

    tenant: str
    epoch: int
    store: str
    since: int
    until: int = FOR_EVER


class Standing(Enum):
    """What an event of a store's log is."""

    OFFERED = "offered"
    ECHO = "echo"
    """Our own write, made through the gate of a store without authority: its origin has offered it already."""
    ROGUE = "rogue"
    """Somebody's write to a store without authority: kept and alarmed, never offered, never dropped."""


def epoch_of(log: Iterable[AuthorityEpoch], tenant: str, store: str, lsn: int) -> int | None:
    """Return the epoch under which a store had authority over a tenant at a position in its log (pure).

    Args:
        log: A tenant's authority log.
        tenant: The tenant; `EVERYTHING` stands for those that no move has named.
        store: `OLD` or `NEW`.
        lsn: The commit LSN, in that store's own log.

    Returns:
        The epoch, None where the store had no authority.
    """
    return next((t.epoch for t in log if (t.tenant, t.store) == (tenant, store) and t.since <= lsn < t.until), None)


def standing(log: Iterable[AuthorityEpoch], tenant: str, store: str, lsn: int, marked: bool) -> Standing:
    """Return what an event is, by its position and by the mark of its transaction (pure).

    Args:
        log: A tenant's authority log.
        tenant: The tenant; `EVERYTHING` stands for those that no move has named.
        store: `OLD` or `NEW`.
        lsn: The event's commit LSN, in that store's own log.
        marked: Whether the event's transaction bears the mark of our own writes.

    Returns:
        Whether it is offered, an echo of ours, or a rogue write.
    """
    if marked:
        return Standing.ECHO
    return Standing.ROGUE if epoch_of(log, tenant, store, lsn) is None else Standing.OFFERED


def stamped(log: Iterable[AuthorityEpoch], tenant: str, store: str, version: Version) -> Version | None:
    """Return an event's version with the epoch that the log gives it (pure).

    Args:
        log: A tenant's authority log.
        tenant: The tenant; `EVERYTHING` stands for those that no move has named.
        store: `OLD` or `NEW`.
        version: The event's version, its LSN in that store's own log; its epoch is replaced.

    Returns:
        The version, None where the event is never offered.
    """
    epoch = epoch_of(log, tenant, store, version.lsn)
    return None if epoch is None else version._replace(epoch=epoch)


def moved(log: Iterable[AuthorityEpoch], tenant: str, to: str, epoch: int, fence: int, since: int) -> tuple[AuthorityEpoch, ...]:
    """Return the log after a tenant's authority has moved: it ends at `fence` in the losing log, begins at `since` in the other.

    The epoch is a later one, and `position.epoch_floor` of it the tenant's floor in the gaining store.
    """
    entries = list(log)
    last = max((t for t in entries if t.tenant == tenant), key=lambda t: t.epoch)
    entries[entries.index(last)] = last._replace(until=fence)
    return (*entries, AuthorityEpoch(tenant, epoch, to, since))


EVERYTHING = ""
"""The one tenant while all rows move at once; else those that no move has named. No tenant of a spec is called so."""


@dataclass(frozen=True)
class Interval:
    """A part of a store's stream that is offered: its events' epoch, and the commit LSNs since <= lsn < until in that store's log.

    Of an `echo` our own marked writes are offered, and what came with them; else what others wrote, and nothing of ours. It is
    the rows of some tenants alone.
    """

    epoch: int
    since: int
    until: int
    store: str = OLD
    echo: bool = False
    tenants: Tenants = EVERY


Section = tuple[Interval, ...]
"""Intervals of one store and the same positions, each of other tenants."""


def named(changes: Iterable[Authority]) -> frozenset[str]:
    """Return the tenants that have ever moved by name.

    Args:
        changes: The moves of authority on record, oldest first.

    Returns:
        The tenants' names; empty while all rows have moved at once.
    """
    return frozenset(name for change in changes for name in change.tenants or ())


def authority_epochs(changes: Iterable[Authority], tenant: str = EVERYTHING) -> tuple[AuthorityEpoch, ...]:
    """Return a tenant's authority log of both stores, first to last, from the moves on record.

    A move without names is one of all rows, of which those that are there already have nothing to
    do. From the old store to the old store it may be a new epoch of the tables as well: nothing
    from before it counts.

    Args:
        changes: The moves of authority on record, oldest first.
        tenant: The tenant; `EVERYTHING` stands for those that no move has named.

    Returns:
        The epochs of both stores, first to last; positions are commit LSNs of each store's own log.
    """
    log: tuple[AuthorityEpoch, ...] = (AuthorityEpoch(tenant, 0, OLD, 0),)
    for change in changes:
        if change.tenants is not None and tenant not in change.tenants:
            continue
        if change.anew:
            log = (AuthorityEpoch(tenant, change.epoch, OLD, 0),)
        elif change.store != log[-1].store:
            positions = {OLD: change.from_lsn, NEW: change.new_lsn}
            log = moved(log, tenant, change.store, change.epoch, positions[log[-1].store], positions[change.store])
    return log


def shares(changes: Sequence[Authority]) -> dict[AuthorityEpoch, Tenants]:
    """Return who has authority now (pure).

    Args:
        changes: The moves of authority on record, oldest first.

    Returns:
        Each present epoch, its tenant left out, and the tenants that it is over.
    """
    names = named(changes)
    held_by: dict[AuthorityEpoch, set[str]] = {}
    for tenant, alike in _alike(changes).items():
        held_by.setdefault(authority_epochs(changes, tenant)[-1]._replace(tenant=EVERYTHING), set()).update(alike)
    return {period: _together(tenants, names) for period, tenants in held_by.items()}


def moving(changes: Sequence[Authority], to: str, names: Collection[str] | None) -> Tenants | None:
    """Return which rows a move concerns: of the tenants named, or of all, those that are not there yet (pure).

    Args:
        changes: The moves of authority on record, oldest first.
        to: The store that is to have authority.
        names: The tenants to move, None for all rows.

    Returns:
        The rows that are not there yet, None where all are.
    """
    there = [tenants for held, tenants in shares(changes).items() if held.store == to]
    if names is not None:
        left = frozenset(name for name in names if not any(name in tenants for tenants in there))
        return Tenants(left, others=False) if left else None
    known = named(changes)
    elsewhere = {name for name in (EVERYTHING, *known) if not any(name in tenants for tenants in there)}
    return _together(elsewhere, known) if elsewhere else None


def epochs_of(changes: Sequence[Authority], store: str) -> dict[int, int]:
    """Return the epochs in which a store had authority over anything, and where in its log each began (pure).

    Args:
        changes: The moves of authority on record, oldest first.
        store: `OLD` or `NEW`.

    Returns:
        Epoch and the LSN at which it began, in that store's own log.
    """
    return {t.epoch: t.since for tenant in _alike(changes) for t in authority_epochs(changes, tenant) if t.store == store}


def _alike(changes: Iterable[Authority]) -> dict[str, set[str]]:
    """Return all tenants by one of those with the same moves: many move together, and few moves there are."""
    moves: dict[str, list[int]] = {EVERYTHING: []}
    for change in changes:
        for name in change.tenants or ():
            moves.setdefault(name, []).append(change.epoch)
    alike: dict[tuple[int, ...], set[str]] = {}
    for name, epochs in moves.items():
        alike.setdefault(tuple(epochs), set()).add(name)
    return {EVERYTHING if EVERYTHING in names else min(names): names for names in alike.values()}


def _logs(changes: Sequence[Authority]) -> list[tuple[tuple[AuthorityEpoch, ...], set[str]]]:
    return [(authority_epochs(changes, one), alike) for one, alike in _alike(changes).items()]


def _together(tenants: Collection[str], names: frozenset[str]) -> Tenants:
    """Return tenants as one, of all that have a name."""
    chosen = frozenset(tenants) - {EVERYTHING}
    return Tenants(names - chosen) if EVERYTHING in tenants else Tenants(chosen, others=False)


def histories(changes: Sequence[Authority]) -> list[tuple[tuple[AuthorityEpoch, ...], Tenants]]:
    """Return each authority log that there is and the tenants that share it (pure).

    Args:
        changes: The moves of authority on record, oldest first.

    Returns:
        Each log with its tenants; many tenants share one.
    """
    names = named(changes)
    return [(log, _together(alike, names)) for log, alike in _logs(changes)]


def absences(
    changes: Sequence[Authority], store: str, since: int, *, counted: Collection[int] | None = None
) -> list[tuple[int, int, Tenants]]:
    """Return where in a store's log it had no authority, and over which tenants (pure).

    Args:
        changes: The moves of authority on record, oldest first.
        store: `OLD` or `NEW`.
        since: The LSN from which on it is asked, in that store's own log.
        counted: The epochs that give authority, where only some do; all unless given.

    Returns:
        (first LSN, LSN after the last, tenants); no position twice.
    """
    names = named(changes)
    gaps = [
        (without([t for t in log if counted is None or t.epoch in counted], store, since), alike) for log, alike in _logs(changes)
    ]
    cuts = sorted({position for ranges, _ in gaps for gap in ranges for position in gap})
    absent = []
    for start, end in pairwise(cuts):
        who = {name for ranges, alike in gaps for first, last in ranges if first <= start and end <= last for name in alike}
        absent += [(start, end, _together(who, names))] if who else []
    return absent


def without(log: Sequence[AuthorityEpoch], store: str, since: int) -> list[tuple[int, int]]:
    """Return where in a store's log, from `since` on, it had no authority: whatever is there and is not ours is a rogue write."""
    gaps = []
    for period in (t for t in log if t.store == store):
        if period.since > since:
            gaps.append((since, period.since))
        since = max(since, period.until)
    return [*gaps, (since, FOR_EVER)] if since < FOR_EVER else gaps


def sections(changes: Sequence[Authority], *, takes_over: bool, carried: Collection[int] = frozenset()) -> list[Section]:
    """Return `offered_intervals` of all tenants, cut where one of them begins or ends (pure).

    In front the old store's, then the new one's, once tenants have moved one by one: both streams
    go on then, of other rows each.

    Args:
        changes: The moves of authority on record, oldest first.
        takes_over: Whether the target is the store that takes over, which never gets its own
            writes.
        carried: The new store's epochs that its own stream carries.

    Returns:
        The sections in the order in which they are offered.
    """
    names = named(changes)
    if not names:
        return [(interval,) for interval in offered_intervals(changes, takes_over=takes_over, carried=carried)]
    alike = _alike(changes)
    alone = {one: offered_intervals(changes, takes_over=takes_over, carried=carried, tenant=one) for one in alike}
    parts = []
    for store in (OLD, NEW):
        of_store = [(tenant, one) for tenant, intervals in alone.items() for one in intervals if one.store == store]
        cuts = sorted({position for _, one in of_store for position in (one.since, one.until)})
        for since, until in pairwise(cuts):
            kinds: dict[tuple[int, bool], set[str]] = {}
            for tenant, one in of_store:
                if one.since <= since and until <= one.until:
                    kinds.setdefault((one.epoch, one.echo), set()).update(alike[tenant])
            section = [Interval(epoch, since, until, store, echo, _together(who, names)) for (epoch, echo), who in kinds.items()]
            parts += [tuple(section)] if section else []
    return parts


def offered_intervals(
    changes: Sequence[Authority], *, takes_over: bool, carried: Collection[int] = frozenset(), tenant: str = EVERYTHING
) -> list[Interval]:
    """Return the intervals of both stores' streams of which a target is offered a tenant, in the order of their epochs (pure).

    `carried` are the epochs of the new store that its own stream carries. The target that takes
    over never gets them, it made them itself. Any other target gets those that are carried. One
    that is not, it learns by the echo in the old store's stream once authority is back, because
    then the old store is the truth again.
    """
    log = authority_epochs(changes, tenant)
    intervals = []
    for before, period, after in zip([None, *log], log, [*log[1:], None], strict=False):
        if period.store == OLD:
            intervals.append(Interval(period.epoch, period.since, period.until))
        elif takes_over:
            continue
        elif period.epoch in carried:
            intervals.append(Interval(period.epoch, period.since, period.until, NEW))
        elif after is not None:
            if before is None:
                raise CouldNotFinish(
                    f"the ledger has epoch {period.epoch} of the new store first, and the old store has authority first"
                )
            # stamped as what follows it in the same log: a part of the epoch may have come from the other log, at other positions
            intervals.append(Interval(after.epoch, before.until, after.since, echo=True))
    return intervals


def at(changes: Sequence[Authority], store: str) -> Tenants | None:
    """Return whose rows a store has authority over now (pure).

    Args:
        changes: The moves of authority on record, oldest first.
        store: `OLD` or `NEW`.

    Returns:
        The tenants, None where it has none.
    """
    here = [tenants for held, tenants in shares(changes).items() if held.store == store]
    if not here:
        return None
    names = named(changes)
    others = any(EVERYTHING in tenants for tenants in here)
    mine = frozenset(name for name in names if any(name in tenants for tenants in here))
    return Tenants(names - mine if others else mine, others)


def apart(changes: Sequence[Authority]) -> list[str]:
    """Return the tenants that are not where those without a move of their own are (pure).

    Args:
        changes: The moves of authority on record, oldest first.

    Returns:
        Their names, sorted.
    """
    shared = shares(changes)
    rest = next(held.store for held, tenants in shared.items() if EVERYTHING in tenants)
    elsewhere = [tenants for held, tenants in shared.items() if held.store != rest]
    return sorted(name for tenants in elsewhere for name in tenants.names)
