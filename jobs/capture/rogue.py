"""Rogue writes: what somebody wrote to a store that had no authority, past the router and past the refusal.

Each transaction of ours bears a mark, so whatever else stands in a store's stream outside of its authority epochs is rogue. It
is kept in the spool, never offered to another store and never dropped; it is told until a verdict, at a later moment, finds
both stores equal. While tenants are at both stores each change is held against its own tenant's authority epochs. The old store
is watched from `prepare` on, the new one from where its reverse path was opened. Runs on the driver, without Spark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from changeover.errors import StepOrder
from changeover.jobs.ledger.epochs import NEW, OLD, absences
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Authority, Stream, VerdictRow
from changeover.jobs.reverse import path as reverse
from changeover.jobs.spool.events import SCHEMA, TRUNCATE
from changeover.jobs.spool.table import Spool, spool_of
from changeover.jobs.transform.tenancy import new_column, old_column, required
from changeover.position import format_lsn, parse_lsn
from changeover.spec import Spec, Table
from changeover.tenants import EVERY, Tenants


@dataclass(frozen=True)
class Rogue:
    """Rogue changes of one table in one store: how many, by how many transactions, and where and when the first and the last."""

    store: str
    table: str
    changes: int
    transactions: int
    first: str
    last: str
    last_at: datetime

    def __str__(self) -> str:
        return (
            f"{self.table} in the {self.store} store, which had no authority: {self.changes:,} change{'s' * (self.changes > 1)} of"
            f" {self.transactions:,} transaction{'s' * (self.transactions > 1)} by somebody else, at {self.first}"
            f"{f' to {self.last}' if self.last != self.first else ''}, the last at {self.last_at:%Y-%m-%d %H:%M:%S}: find who wrote"
            f" them, make the stores equal, and run `changeover verify`"
        )


PLACES = pa.schema([SCHEMA.field("lsn"), SCHEMA.field("committed_at")])
"""What is remembered of a rogue change."""


Gaps = Callable[[int], list[tuple[int, int, Tenants]]]
"""Where a store had no authority from a position on, and over which tenants."""


@dataclass
class Watch:
    """The rogue writes of one migration, for a process that looks again and again: it reads nothing twice (driver).

    What was found is exact whenever it is asked: where authority has moved since, it is read anew from there.
    """

    spec: Spec
    changes: Sequence[Authority] = ()
    scanned: dict[tuple[str, str, int], tuple[int, pa.Table]] = field(default_factory=dict)
    """By store, table and where its stream begins: up to where it was read, and what was found."""

    def look(self, ledger: Ledger) -> list[Rogue]:
        """Return the rogue writes since a verdict last found both stores equal (driver).

        Args:
            ledger: The migration's ledger, open.

        Returns:
            One a store and table in which there are any.
        """
        if self.spec.flag is None or not ledger.exists():
            return []
        self._take(ledger.authorities())
        path = reverse.recorded(ledger)
        # positions from before the path was opened may be those of another server
        here = reverse.begun_since(path, self.changes) if path is not None else frozenset[int]()
        equal = _equal(ledger.verdicts(), self.spec.flag.target, path)
        rogues: list[Rogue] = []
        for store, spool, since in _watched(self.spec, ledger, path):
            gaps = partial(absences, self.changes, store, counted=None if store == OLD else here)
            for table in self.spec.tables:
                rows = self._read(store, spool, table, since, equal.get(table.source, {}).get(store, 0), gaps)
                rogues += _summary(store, _relation(store, table), rows)
        return rogues

    def _take(self, changes: Sequence[Authority]) -> None:
        """Forget what was found where the authority log says something else by now."""
        known, more = self.changes, changes[len(self.changes) :]
        if changes[: len(known)] != known or any(one.anew for one in more):
            self.scanned = {}
        for (store, table, since), (upto, writes) in self.scanned.items():
            start = min([upto, *(one.from_lsn if store == OLD else one.new_lsn for one in more)])
            self.scanned[store, table, since] = start, writes.filter(pc.less(writes["lsn"], start))
        self.changes = changes

    def _read(self, store: str, spool: Spool, table: Table, since: int, equal: int, gaps: Gaps) -> pa.Table:
        """Return what is rogue in one store's table from a position on, reading what is new."""
        upto, writes = self.scanned.get((store, table.source, since), (since, PLACES.empty_table()))
        start, end = max(upto, equal), spool.end()
        parts = [writes.filter(pc.greater_equal(writes["lsn"], equal))]
        for first, last, tenants in gaps(start):
            if first < end:
                parts += self._of(spool, store, table, (first, min(last, end)), tenants)
        self.scanned[store, table.source, since] = max(start, end), pa.concat_tables(parts)
        return self.scanned[store, table.source, since][1]

    def _of(self, spool: Spool, store: str, table: Table, bounds: tuple[int, int], tenants: Tenants) -> Iterator[pa.Table]:
        """Yield what somebody wrote there to rows of these tenants; whose a row is, is only read where it is the question."""
        if tenants == EVERY:
            events = spool.unmarked(*bounds)
            yield events.filter(pc.equal(events["relation"], _relation(store, table))).select(PLACES.names)
            return
        column = required(old_column(self.spec) if store == OLD else new_column(self.spec, table), self.spec)
        for part in spool.unmarked_rows(*bounds, _relation(store, table)):
            yield part.filter(of_tenants(part, column, tenants)).select(PLACES.names)


def rogue(spec: Spec, ledger: Ledger) -> list[Rogue]:
    """Return the rogue writes since a verdict last found both stores equal (driver; looks only).

    Args:
        spec: The migration's spec.
        ledger: The migration's ledger, open.

    Returns:
        One a store and table in which there are any.
    """
    return Watch(spec).look(ledger)


def of_tenants(events: pa.Table, column: str, tenants: Tenants) -> pa.ChunkedArray:
    """Return which events are of some tenants' rows: by the new row, by the old key, or as a TRUNCATE, which is of all (pure)."""
    mask = pc.equal(events["op"], TRUNCATE)
    names = pa.array(sorted(tenants.names), pa.string())
    for image in ("row", "key"):
        tenant = pc.map_lookup(events[image], column, "first")
        inside = pc.is_in(tenant, names)
        mine = pc.and_(pc.is_valid(tenant), pc.invert(inside) if tenants.others else inside)
        mask = pc.or_(mask, mine)
    return mask


def _relation(store: str, table: Table) -> str:
    return table.source_relation if store == OLD else table.target_relation


def _watched(spec: Spec, ledger: Ledger, path: Stream | None) -> Iterator[tuple[str, Spool, int]]:
    """Yield each store whose stream there is, its spool, and since where it is read."""
    streams = [(OLD, spool_of(spec, ledger.stream("status").epoch), 0)]  # it had authority from the beginning
    streams += [(NEW, reverse.spool_of(spec), path.l0)] if path is not None else []
    for stream in streams:
        try:
            stream[1].end()
        except StepOrder:  # finalized, or the work folder is elsewhere
            continue
        yield stream


def _summary(store: str, relation: str, writes: pa.Table) -> list[Rogue]:
    if not len(writes):
        return []
    first, last = (format_lsn(end(writes["lsn"]).as_py()) for end in (pc.min, pc.max))
    transactions = pc.count_distinct(writes["lsn"]).as_py()
    return [Rogue(store, relation, len(writes), transactions, first, last, pc.max(writes["committed_at"]).as_py())]


def _equal(verdicts: Sequence[VerdictRow], target: str, path: Stream | None) -> Mapping[str, Mapping[str, int]]:
    """Return for each table the positions in both stores' logs at which it was last found equal (pure).

    What was found before the path was opened says nothing of the new store's log as it is now.
    """
    newest: dict[str, dict[str, int]] = {}
    for one in verdicts:
        if one.verdict == "equal" and one.target == target:
            positions = one.detail["positions"]
            here = path is not None and path.opened is not None and one.at >= path.opened
            verified = {OLD: positions["source_lsn"], **({NEW: parse_lsn(positions["target"])} if here else {})}
            newest.setdefault(one.source, verified)
    return newest
