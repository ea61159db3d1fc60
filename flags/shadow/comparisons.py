"""Comparisons: reads of one process that wait to be compared, the thread that compares them, and what came of it.

A caller puts its read down when it has the authority's answer, and goes on. Under overload reads are dropped and counted, by
their number and by the bytes of their answers. Secondaries have threads of their own. All but `run_if` and the estimate of an
answer's bytes runs on the thread here; how a read is judged is said in `judge`. That thread also asks the flag's check ratio, and
puts on record what mismatched.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import psycopg
from ldclient.migrations.types import Origin

from changeover.errors import ServerUnavailable
from changeover.flags.alarm import Alarm, reason_of
from changeover.flags.shadow.experiment import HookRaised, Result, hooked, ordered
from changeover.flags.shadow.judge import LAG_WAITS, Comparison, Judge, nothing
from changeover.flags.shadow.positions import Positions, Store
from changeover.flags.shadow.room import Room, size_of
from changeover.flags.shadow.sampling import Sampling
from changeover.flags.shadow.secondaries import Secondaries
from changeover.flags.shadow.tally import Tally
from changeover.flags.stages import other
from changeover.jobs.ledger import readdifferences
from changeover.jobs.ledger.readdifferences import ReadDifference
from changeover.position import format_lsn

BESIDES_SECONDS = 0.5
"""How often the flag's check ratio is asked, and what mismatched is put on record."""
DRAIN_SECONDS = 0.005
KEPT_PART = 4
"""Which part of the bytes is for mismatches that are kept; the others are for what waits."""


class Comparisons:
    """Compares reads of one process; `offer` runs on the caller's thread and never waits."""

    def __init__(
        self, endpoints: Mapping[Origin, Store], application: str, *, limit: int, deadline: float, limit_bytes: int = 32 << 20,
        waits: Sequence[float] = LAG_WAITS, under_way: Callable[[Origin], Callable[[], bool]] = lambda _: nothing,
        positions: Positions | None = None, sampling: Sampling | None = None,
    ) -> None:  # fmt: skip
        self.limit = limit
        self.deadline = deadline
        self.sampling = sampling or Sampling()
        kept_bytes = limit_bytes // KEPT_PART
        self.room = Room(limit_bytes - kept_bytes)
        self.tally = Tally(kept_bytes)
        self.judge = Judge(
            endpoints, application, self.room, limit=limit, deadline=deadline, waits=waits, under_way=under_way, positions=positions
        )
        self.secondaries = Secondaries(self.room, limit=limit, deadline=deadline)
        self.drops = Alarm("comparisons of reads are dropped, there is no room")
        self.errors = Alarm("comparisons of reads have no answer")
        self.skips = Alarm("comparisons of reads are left out, the other store failed several times in a row")
        self.unrecorded = Alarm("reads that mismatched can't be put on record")
        self._offered: deque[tuple[int, Comparison]] = deque()
        """What callers have put down, with its bytes; they take no lock that the thread holds for long."""
        self._heap: list[tuple[float, int, Comparison]] = []
        """What is to be looked at, by the time when; the thread's own."""
        self._differences: deque[ReadDifference] = deque(maxlen=readdifferences.KEPT)
        """What is to be put on record; the thread's own."""
        self._besides_at = time.monotonic() + BESIDES_SECONDS
        self._order = count()
        self._wake = threading.Event()
        self._busy = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="changeover-experiment", daemon=True)
        self._thread.start()

    def offer(self, comparison: Comparison) -> bool:
        """Queue a comparison, and ask the secondaries.

        Args:
            comparison: The read, with what the authority answered.

        Returns:
            Whether the other store will be asked: not where `run_if` says no, and not where there is no room or its breaker is
            open, which is counted.
        """
        experiment, control = comparison.experiment, comparison.control
        try:
            if not experiment.run_if():
                return False
        except Exception as error:  # Scientist's rule: a hook's failure goes to the one method that may be overridden
            experiment.raised("run_if", error)
            return False
        try:
            weight = size_of(control.value)
        except Exception as error:  # a type of the application's own, whose code raises
            self.drops.raise_for(f"no size: {reason_of(error)}")
            return False
        if comparison.beside:
            self.secondaries.offer(experiment, comparison.stage, control, comparison.beside, weight)
        if self.judge.breakers[other(comparison.authority)].resting:
            self.skips.raise_for("breaker open")
            return False
        if self._closing or self._depth() >= self.limit or not self.room.take(weight):
            self.drops.raise_for("closing" if self._closing else "no room")
            return False
        self._offered.append((weight, comparison))
        if not self._wake.is_set():
            self._wake.set()
        return True

    def _depth(self) -> int:
        return len(self._offered) + len(self._heap) + self._busy

    def counters(self) -> dict[str, Any]:
        """Return the counts, ready for JSON.

        Returns:
            The counts by name; those of secondaries are under `beside`.
        """
        breakers = self.judge.breakers
        return {
            **self.tally.counts(),
            "errors": self.errors.count,
            "dropped": self.drops.count,
            "sampled_out": self.sampling.left_out,
            "skipped_by_breaker": self.skips.count,
            "breakers_open": [origin.value for origin in Origin if breakers[origin].open],
            "unrecorded": self.unrecorded.count,
            "depth": self._depth(),
            "bytes": self.room.taken,
            "last_error": self.errors.last,
            "beside": self.secondaries.counts(),
        }

    def drain(self, seconds: float) -> bool:
        """Wait until every comparison has ended.

        Args:
            seconds: How many seconds to wait at most.

        Returns:
            False where the time was over first.
        """
        until = time.monotonic() + seconds
        while self._depth() or self.secondaries.depth:
            if time.monotonic() >= until:
                return False
            time.sleep(DRAIN_SECONDS)
        return True

    def close(self) -> None:
        """End the threads; open comparisons count as dropped."""
        self._closing = True
        self._wake.set()
        self._thread.join(self.deadline + 1)
        self.secondaries.close(self.deadline + 1)
        for comparison in (*(one for _, one in self._offered), *(one for _, _, one in self._heap)):
            self.drops.raise_for("closing")
            comparison.tell(None)
        self._offered.clear()
        self._heap.clear()

    # -- the worker's thread

    def _run(self) -> None:
        while (comparison := self._next()) is not None:
            waits = False
            try:
                waits = self._look(comparison)
            # A hook failed, or `raised` itself did: this comparison has no end, the next one may.
            except Exception as error:
                self.errors.raise_for(reason_of(error))
            finally:
                if not waits:
                    self.room.give(comparison.weight)
                self._busy = False
        self._record()
        self.judge.close()

    def _next(self) -> Comparison | None:
        while not self._closing:
            self._wake.clear()
            while self._offered:  # it is in one of the two at any moment
                weight, comparison = self._offered[0]
                self._push(time.monotonic(), comparison.weighing(weight))
                self._offered.popleft()
            now = time.monotonic()
            if now >= self._besides_at:
                self._besides_at = now + BESIDES_SECONDS
                self.sampling.refresh()
                self._record()
            if self._heap and self._heap[0][0] <= now:
                self._busy = True
                return heapq.heappop(self._heap)[2]
            self._wake.wait(min(self._heap[0][0] if self._heap else self._besides_at, self._besides_at) - now)
        return None

    def _push(self, due: float, comparison: Comparison) -> None:
        heapq.heappush(self._heap, (due, next(self._order), comparison))

    def _look(self, comparison: Comparison) -> bool:
        """Look at a comparison; return whether it is to be looked at again."""
        try:
            came = self.judge.look(comparison, (one for _, _, one in self._heap if one.looks))
        except Exception:  # the read itself was answered
            comparison.tell(None)
            raise
        if isinstance(came, tuple):
            self._push(*came)
            return True
        if came is None:
            self.skips.raise_for("breaker open")
            comparison.tell(None)
        else:
            self._finish(comparison, came)
        return False

    def _finish(self, comparison: Comparison, result: Result) -> None:
        failure = result.control.error or result.candidate.error
        if failure is not None:
            self.errors.raise_for(reason_of(failure))
        else:
            self.tally.add(result)
        comparison.tell(result)
        if result.mismatched and self.judge.positions is not None:
            self._differences.append(self._named(comparison, result))
        hooked(comparison.experiment, "publish", result)

    @staticmethod
    def _named(comparison: Comparison, result: Result) -> ReadDifference:
        """Return what goes on record of a mismatched read: of its values nothing but what the experiment says itself."""
        experiment = comparison.experiment
        try:
            both = [hooked(experiment, "clean", one.value) for one in ordered(result.control, result.candidate)]
            description = hooked(experiment, "describe", *both)
        except HookRaised:  # `raised` was told, and the read is on record without a name
            description = None
        position = format_lsn(comparison.position) if comparison.position is not None else None
        return ReadDifference(
            experiment.name, result.stage.value, comparison.authority.value, result.looks, position,
            None if description is None else str(description),
        )  # fmt: skip

    def _record(self) -> None:
        """Put on record what mismatched; while the ledger is away the newest wait for it."""
        positions, waiting = self.judge.positions, list(self._differences)
        if positions is None or not waiting:
            return
        try:
            positions.record(waiting)
        except (psycopg.Error, ServerUnavailable) as error:
            self.unrecorded.raise_for(reason_of(error))
        else:
            self._differences.clear()
