"""The passage of what is under way: by the streams' positions and the counts of every mirror's queue, and never by seconds.

A moment is taken in the logs of the stores that have authority, and in the queues of the routers' processes. It has passed when
all below it was offered to the other store. Runs on the driver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from changeover.jobs.apply.rounds import Replay
from changeover.jobs.ledger import epochs
from changeover.jobs.ledger.lease import LEASE_SECONDS, lease_of
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import NEW, OLD, OLD_STORE, Heartbeat
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source.changes import change_source
from changeover.jobs.source.marker import emit_marker, mark
from changeover.jobs.spool.waiting import await_spool
from changeover.jobs.transform.tenancy import new_column, required
from changeover.jobs.transform.transform import Transform
from changeover.session import application_name, connect
from changeover.spec import Spec
from changeover.verifiers.compare.keyhistory import History
from changeover.verifiers.compare.recheck import History as KeyHistory
from changeover.verifiers.compare.recheck import Key, Leading
from changeover.verifiers.compare.split_authority import Split
from changeover.verifiers.moment import Moment

POLL_SECONDS = 0.05

Queue = tuple[str, str]
"""A process and the store that it mirrors to."""


class Queues:
    """The mirrors' queues of all processes, as their heartbeats tell.

    A process that is not heard of any more brings nothing more. Where a stream brings the same, the version gate refuses what comes
    after it. Where none does, `history` lets nothing differ while anything is queued, and then a queue has passed when it is empty.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._wanted: Mapping[Queue, int] = {}
        self._offers: Mapping[Queue, int] | None = None

    def mark(self) -> None:
        """Wait until each process has told what it had queued, counted after this moment."""
        moment, first = self.ledger.now(), dict[str, datetime]()

        def counted(beat: Heartbeat) -> bool:
            # one that arrives after the moment may have been counted before it, the next one was not
            if beat.at <= moment:
                return False
            return first.setdefault(beat.process, beat.at) < beat.at

        while not all([counted(beat) for beat in self._alive()]):
            time.sleep(POLL_SECONDS)
        self._wanted = {queue: counts["mirrored"] for beat in self.ledger.heartbeats() for queue, counts in _mirrors(beat)}

    def through(self) -> None:
        """Wait until each process has dealt with all that it had queued by then; its workers may be ahead with later ones."""
        while any(counts["settled"] < self._wanted.get(queue, 0) for beat in self._alive() for queue, counts in _mirrors(beat)):
            time.sleep(POLL_SECONDS)

    def history(self, keys: Sequence[Key]) -> Iterator[None]:
        """Tell that any key may have been written, where a process has queued anything since this was asked last.

        That is all that is told where no stream tells of commits.

        Args:
            keys: The keys that are asked for.

        Yields:
            None where anything was.
        """
        offers = {q: counts["mirrored"] + counts["dropped"] for beat in self.ledger.heartbeats() for q, counts in _mirrors(beat)}
        before, self._offers = self._offers, offers
        if offers != before:
            yield None

    def _alive(self) -> list[Heartbeat]:
        now = self.ledger.now()
        return [beat for beat in self.ledger.heartbeats() if beat.alive(now)]


def _mirrors(beat: Heartbeat) -> list[tuple[Queue, Mapping[str, Any]]]:
    """Return the counts of a process's queues."""
    return [((beat.process, store), beat.counters[name]) for store in (OLD, NEW) if (name := f"mirror_{store}") in beat.counters]


@dataclass(frozen=True)
class Passage:
    """What is under way of one table between the old store and the one that takes over.

    `before` is called before anything is let through.
    """

    spec: Spec
    ledger: Ledger
    replay: Replay
    transform: Transform
    target: str
    split: Split
    moment: Moment
    before: Callable[[], object]

    @cached_property
    def queues(self) -> Queues:
        """Return the routers' queues."""
        return Queues(self.ledger)

    def leading(self, key: Sequence[str]) -> Callable[[Key], Leading]:
        """Return what tells which store has authority over a key.

        Args:
            key: The target key's columns.

        Returns:
            A function from a key to the side that leads.
        """
        spark, replay, source = self.replay.spark, self.replay, self.transform.table.source
        old = Leading(0, History(spark, self.transform, replay.spool, self.moment.source_lsn).changes)
        at_new = epochs.at(self.split.changes, NEW)
        if at_new is None:
            return lambda _: old
        history: KeyHistory = self.queues.history
        if self.moment.new_lsn is not None:
            its = replay.back.transform(source, self.target)
            history = History(spark, its, replay.back.checkpoint.spool, self.moment.new_lsn).changes
        new = Leading(1, history)
        if not self.split.at_old:
            return lambda _: new
        column = required(new_column(self.spec, self.transform.table), self.spec)
        place = key.index(column)
        return lambda one: new if one[place] in at_new else old

    def mark(self) -> None:
        """Take a position of each log, and wait until it is in the spool and all processes were heard."""
        application, marked = application_name(self.spec.name, "verify"), dict[str, int]()
        if self.split.at_old:
            with connect(self.spec.source.dsn.resolve(), application) as old:
                marked[OLD] = change_source(self.spec).position("verify", old)
                emit_marker(old, "verify")
        if self.moment.new_lsn is not None:
            with connect(reverse.new_dsn(self.spec), application) as new:
                marked[NEW] = mark(new, "verify")
        if OLD in marked:
            await_spool(self.ledger, self.replay.spool, marked[OLD], "the source's stream")
        if NEW in marked:
            spool = self.replay.back.checkpoint.spool
            await_spool(self.ledger, spool, marked[NEW], "the new store's stream", step="capture-new")
        self.queues.mark()

    def through(self) -> None:
        """Offer what is in the spools, and wait for the queues."""
        self.before()
        if self.split.at_old:
            self.replay.round(targets=[self.target])
        if self.moment.new_lsn is not None:
            with self.ledger.lease(lease_of(OLD_STORE), wait_seconds=LEASE_SECONDS):
                self.replay.bring_back()
        self.queues.through()
