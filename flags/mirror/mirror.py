"""The mirror: units that the authority has committed, offered to the other store off the caller's thread.

Each row goes through the store's version gate, a unit's rows in one transaction and in their order. So late, repeated and
overtaken offers are harmless. Units are shared out to workers by the key of their first row. One that is larger than a batch
goes to a worker of its own. What waits is bounded in rows and bytes. A full queue makes a caller wait for a moment, and only where
the store keeps up. What is dropped or fails is counted and never counts as equal: the change stream brings it. Lives in one process
of the application.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

from changeover.flags.mirror.books import Books
from changeover.flags.mirror.offer import Bounds, Ended, Offer, unheard
from changeover.flags.mirror.worker import Way, Worker
from changeover.flags.mirror.written import Told
from changeover.position import Version


class Mirror:
    """Mirrors units to one store; `offer` runs on the caller's thread."""

    def __init__(self, way: Way, bounds: Bounds) -> None:
        self.bounds = bounds
        self._books = Books(way.endpoint.name, bounds)
        self._workers = [Worker(self._books, way, str(number)) for number in range(bounds.workers)]
        self._bulks = Worker(self._books, way, "bulks")

    def offer(self, version: Version, changes: Sequence[Told], share: str = "", ended: Ended = unheard) -> bool:
        """Queue the rows of one transaction; False, and counted, when there is no room.

        Args:
            version: The unit's version.
            changes: Its rows, in their order.
            share: By what it is given to a worker: units that share it are brought in their order.
            ended: What hears of its end, once.

        Returns:
            Whether they were queued.
        """
        offer = Offer.of(version, changes, ended)
        worker = self._bulks if offer.bulk else self._workers[crc32(share.encode()) % len(self._workers)]
        return self._books.enter(offer, worker.take)

    def counters(self) -> dict[str, Any]:
        """Return the counts: transactions mirrored and dropped; rows applied, refused, skipped, failed, and under way (`depth`).

        `lost` has the rows that were dropped or failed, by the epoch in which they were written, `queued` those under way.

        Returns:
            The counts by name, as JSON takes them.
        """
        return self._books.counters()

    def under_way(self) -> Callable[[], bool]:
        """Return what tells, whenever it is asked, whether anything of what is offered by now is still to be dealt with.

        Returns:
            The function that is asked.
        """
        return self._books.under_way()

    def drain(self, seconds: float) -> bool:
        """Wait until everything that was offered has been dealt with; False when the time is over first.

        Args:
            seconds: How long to wait at most.

        Returns:
            Whether all was dealt with.
        """
        return self._books.drain(seconds)

    def close(self, seconds: float) -> None:
        """Deal with what is queued; the rest is counted as dropped.

        Args:
            seconds: How long to deal with it at most.
        """
        workers = [*self._workers, self._bulks]
        with self._books.lock:
            self._books.closing = True
            for worker in workers:
                worker.wake.notify()
        self.drain(seconds)
        with self._books.lock:
            left = [offer for worker in workers for offer in worker.give_up()]
        self._books.give_up(left)
        for worker in workers:
            worker.join(self.bounds.deadline + 1)
