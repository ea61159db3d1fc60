"""Retention: row versions that no write can need any more are deleted beside replay, by position and never by time.

Once a table is closed and every event below a position was offered, nothing older than the position
has anything to say. So the floor may go up to there and stand for all versions below it
(`floors.collectable`). Its epoch is the earliest that any tenant still writes under. Replay looks
after so many events whether enough rows have gathered, deletes some of them in a run under the
target's lease, and offers changes before the next batch. What a killed run leaves is right, and is
deleted by the next. Runs on the driver.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from changeover.jobs.apply.floors import collectable, collection_bound
from changeover.jobs.ledger.epochs import OLD, histories
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED, Authority
from changeover.jobs.load.prepared import Prepared
from changeover.jobs.transform.transform import Transform
from changeover.position import Version
from changeover.spec import Spec
from changeover.stores import open_store

log = logging.getLogger(__name__)

ENOUGH = 250_000
"""Row versions from which on a collection pays, and events after which it is worth a look whether there are as many."""


@dataclass
class Collecting:
    """The collections of one target, table by table (driver).

    `due` may be asked at any time; `collect` runs under the target's lease, so that of collection,
    TRUNCATE and batches one runs at a time.
    """

    spec: Spec
    ledger: Ledger
    prepared: Prepared
    target: str
    starts: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)
    unseen: int = ENOUGH  # so that the first look finds what an earlier run left

    def due(self, events: int) -> bool:
        """Return whether a run is worth its lease, after so many more events.

        Args:
            events: How many events were offered since the last call.

        Returns:
            Whether `collect` has something to do.
        """
        self.unseen += events
        if self.unseen >= ENOUGH and not self.starts:
            self.unseen = 0
            self._look()
        return bool(self.starts)

    def _look(self) -> None:
        """Begin with the tables in which enough rows have gathered."""
        with open_store(self.spec, self.spec.targets[self.target], "collect") as store:
            for source, transform in self._transforms():
                if store.row_versions(transform.target) >= ENOUGH:
                    self.starts[source] = self.removed[source] = 0

    def _transforms(self) -> Iterable[tuple[str, Transform]]:
        return [(source, planned) for (source, target), planned in self.prepared.transforms.items() if target == self.target]

    def collect(self) -> None:
        """Delete some rows of each table that has enough; the caller holds the target's lease."""
        with open_store(self.spec, self.spec.targets[self.target], "collect") as store:
            for source, transform in self._transforms():
                start = self.starts.pop(source, None)
                upto = self._bound(source)
                if start is None or upto is None:
                    continue
                collected = store.collect(transform.target, upto, start)
                self.removed[source] += collected.rows
                if collected.following is not None:
                    self.starts[source] = collected.following
                    continue
                detail = {"target": self.target, "table": source, "rows": self.removed[source], "upto": str(upto)}
                self.ledger.audit("collect", "done", detail)
                log.info("collected %s row versions of %s in %s up to %s", self.removed[source], source, self.target, upto)

    def _bound(self, source: str) -> Version | None:
        """Return the version up to which a table's rows may go, None while none may."""
        load = self.ledger.load(source, self.target)
        upto = collection_bound(epoch_to_come(self.ledger.authorities(), load.applied), load.applied)
        return upto if collectable(load.state == CLOSED, load.applied, upto) else None


def epoch_to_come(changes: Sequence[Authority], applied: int) -> int:
    """Return the epoch that no event of the old store's stream from a position on can be below (pure).

    The table's floor is one for all tenants: raised to a later epoch, it would refuse what those still write whose epoch is an
    earlier one. So it stays at the least of them, and row versions of later epochs stay until all have come so far.
    """
    here = [t for log, _ in histories(changes) for t in log if t.store == OLD]
    begun = max((t.epoch for t in here if t.since <= applied), default=0)
    return min([t.epoch for t in here if t.until > applied] + [begun])
