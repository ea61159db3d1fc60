"""The books of a mirror: what is under way, what came of the rest, and whether there is room for more.

Callers and workers write them under one lock. A row stays on the books until it was applied, refused by the gate, skipped or lost.
What is lost is counted by the epoch of the write. Lives in one process of the application.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from changeover.flags.alarm import Alarm, reason_of
from changeover.flags.mirror.offer import Bounds, Offer


@dataclass
class Waiting:
    """How much is under way, of small units or of bulks."""

    rows: int = 0
    bytes: int = 0


class Books:
    """What is under way to one store, and the counts."""

    def __init__(self, name: str, bounds: Bounds) -> None:
        self.bounds = bounds
        self.drops = Alarm(f"mirrored writes to {name} are dropped, the queue is full")
        self.failures = Alarm(f"mirrored writes to {name} fail")
        self.lock = threading.Lock()
        self.closing = False
        self._counts: Counter[str] = Counter()
        self._lost: Counter[int] = Counter()
        self._queued: Counter[int] = Counter()
        self._under_way: OrderedDict[int, Offer] = OrderedDict()
        self._number = 0
        self._waiting = {bulk: Waiting() for bulk in (False, True)}
        self._keeps_up = True
        self._dealt_with = threading.Condition(self.lock)

    def enter(self, offer: Offer, hand_over: Callable[[Offer], None]) -> bool:
        """Put an offer on the books and hand it over to its worker, under the lock; False, and counted, where there is no room."""
        with self.lock:
            taken = self._room(self._waiting[offer.bulk])
            if taken:
                self._number += 1
                offer.number = self._number
                self._under_way[offer.number] = offer
                self._count(offer, 1)
                self._counts["mirrored"] += 1
                hand_over(offer)
        if not taken:
            self._drop(offer)
            offer.ended(None)
        return taken

    def done(self, offers: Sequence[Offer], seconds: float, *, kept_up: bool | None = None) -> None:
        """Take offers off the books, dealt with in so many seconds, and note whether the store took what it was offered."""
        self._off(offers, kept_up)
        for offer in offers:
            offer.ended(seconds, failed=offer.lost > 0)

    def give_up(self, offers: Sequence[Offer]) -> None:
        """Take offers off the books that no worker comes to any more."""
        for offer in offers:
            self._drop(offer)
        self._off(offers, None)
        for offer in offers:
            offer.ended(None)

    def _off(self, offers: Sequence[Offer], kept_up: bool | None) -> None:
        with self.lock:
            for offer in offers:
                del self._under_way[offer.number]
                self._count(offer, -1)
            if kept_up is not None:
                self._keeps_up = kept_up
            self._dealt_with.notify_all()

    def oldest(self, number: int) -> bool:
        """Return whether no older offer is under way, but such as wait for older ones themselves (under the lock).

        So of those that wait one always goes first, and none waits for itself.
        """
        for one, offer in self._under_way.items():
            if one >= number:
                return True
            if not offer.not_before:
                return False
        return True

    def count(self, counts: Mapping[str, int]) -> None:
        """Add to the counts."""
        with self.lock:
            self._counts.update(counts)

    def fail(self, offer: Offer, error: Exception, rows: int) -> None:
        """Count rows that are lost because the store, or the application's mapping, refused them."""
        offer.lost += rows
        self._lose(offer.version.epoch, rows)
        for _ in range(rows):
            self.failures.raise_for(reason_of(error))

    def under_way(self) -> Callable[[], bool]:
        """Return what tells, whenever it is asked, whether anything of what is offered by now is still to be dealt with."""
        with self.lock:
            offered = self._number

        def still() -> bool:
            with self.lock:
                return next(iter(self._under_way), offered + 1) <= offered

        return still

    def drain(self, seconds: float) -> bool:
        """Wait until nothing is under way; False when the time is over first."""
        with self.lock:
            return self._dealt_with.wait_for(lambda: not self._under_way, seconds)

    def counters(self) -> dict[str, Any]:
        """Return the counts, ready for JSON; all of the first `settled` units are dealt with, in whichever order others were."""
        with self.lock:
            lost = {str(epoch): rows for epoch, rows in self._lost.items()}
            queued = {str(epoch): rows for epoch, rows in self._queued.items() if rows}
            counts = {name: self._counts[name] for name in ("mirrored", "applied", "refused_by_gate", "skipped")}
            depth = sum(waiting.rows for waiting in self._waiting.values())
            settled = next(iter(self._under_way), self._number + 1) - 1
        return {
            **counts, "settled": settled, "lost": lost, "queued": queued, "failed": self.failures.count,
            "dropped": self.drops.count, "depth": depth, "last_failure": self.failures.last, "last_drop": self.drops.last,
        }  # fmt: skip

    def _room(self, waiting: Waiting) -> bool:
        """Return whether there is room, after a moment where there is none and the store keeps up."""

        def room() -> bool:
            return waiting.rows < self.bounds.rows and waiting.bytes < self.bounds.bytes

        def settled() -> bool:
            return room() or self.closing or not self._keeps_up

        if not settled() and not self._dealt_with.wait_for(settled, self.bounds.wait):
            self._keeps_up = False  # who waited in vain spares the others that, until the store takes a batch again
        return room() and not self.closing

    def _count(self, offer: Offer, sign: int) -> None:
        rows = len(offer.changes) * sign
        self._waiting[offer.bulk].rows += rows
        self._waiting[offer.bulk].bytes += offer.bytes * sign
        self._queued[offer.version.epoch] += rows

    def _drop(self, offer: Offer) -> None:
        self._lose(offer.version.epoch, len(offer.changes))
        self.drops.raise_for("closing" if self.closing else "queue full")

    def _lose(self, epoch: int, rows: int) -> None:
        with self.lock:
            self._lost[epoch] += rows
