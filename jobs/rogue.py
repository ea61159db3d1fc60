"""Rogue writes: what somebody wrote to a store that had no authority, past the router and past the refusal.

Each transaction of ours bears a mark, so whatever else stands in a store's stream outside of its tenures is rogue. It is kept in
the spool, never offered to another store and never dropped; it is told until a verdict, at a later moment, finds both stores
equal. The old store is watched from `prepare` on, the new one from where its reverse path was opened. Runs on the driver, without
Spark.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

from changeover.errors import StepOrder
from changeover.jobs import reverse
from changeover.jobs.entries import VerdictRow
from changeover.jobs.ledger import Ledger
from changeover.jobs.prepare import spool_of
from changeover.jobs.spool import Spool
from changeover.jobs.tenure import NEW, OLD, tenures, without
from changeover.position import format_lsn, parse_lsn
from changeover.spec import Spec


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


def rogue(spec: Spec, ledger: Ledger) -> list[Rogue]:
    """Return the rogue writes since the last moment at which a verdict found both stores equal (driver; looks only)."""
    if spec.flag is None or not ledger.exists():
        return []
    path, changes = reverse.recorded(ledger), ledger.authorities()
    # positions from before the path was opened may be those of another server
    here = reverse.begun_since(path, changes) if path is not None else frozenset[int]()
    log = [tenure for tenure in tenures(changes) if tenure.store == OLD or tenure.epoch in here]
    equal = _equal(ledger.verdicts(), spec.flag.target, path)
    found: list[Rogue] = []
    for store, spool, since in _watched(spec, ledger, path):
        for table in spec.tables:
            relation = ".".join(table.source_name if store == OLD else table.target_name)
            start = max(since, equal.get(table.source, {}).get(store, 0))
            found += _in_table(store, relation, spool, without(log, store, start))
    return found


def _watched(spec: Spec, ledger: Ledger, path: reverse.Path | None) -> Iterator[tuple[str, Spool, int]]:
    """Yield each store whose stream there is, its spool, and since where it is read."""
    places = [(OLD, spool_of(spec, ledger.stream("status").epoch), 0)]  # it had authority from the beginning
    places += [(NEW, reverse.spool_of(spec), path.stream.l0)] if path is not None else []
    for place in places:
        try:
            place[1].end()
        except StepOrder:  # finalized, or the work folder is elsewhere
            continue
        yield place


def _in_table(store: str, relation: str, spool: Spool, gaps: Sequence[tuple[int, int]]) -> list[Rogue]:
    parts = [spool.unmarked(since, until) for since, until in gaps]
    found = pa.concat_tables(parts) if parts else None
    rows = [row for row in found.to_pylist() if row["relation"] == relation] if found is not None else []
    if not rows:
        return []
    lsns = [row["lsn"] for row in rows]
    last = max(row["committed_at"] for row in rows)
    return [Rogue(store, relation, len(rows), len(set(lsns)), format_lsn(min(lsns)), format_lsn(max(lsns)), last)]


def _equal(verdicts: Sequence[VerdictRow], target: str, path: reverse.Path | None) -> Mapping[str, Mapping[str, int]]:
    """Return for each table the positions in both stores' logs at which it was last found equal (pure).

    What was found before the path was opened says nothing of the new store's log as it is now.
    """
    newest: dict[str, dict[str, int]] = {}
    for one in verdicts:
        if one.verdict == "equal" and one.target == target:
            positions = one.detail["positions"]
            here = path is not None and one.at >= path.opened
            found = {OLD: positions["source_lsn"], **({NEW: parse_lsn(positions["target"])} if here else {})}
            newest.setdefault(one.source, found)
    return newest
