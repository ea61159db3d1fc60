"""Shadow reads: a read asked of both stores and compared, in the words of GitHub's Scientist.

The authority's answer has gone to the caller before the other store is asked, and what was written
comes there a little later. So a difference is looked at again, by the logs and not by the clock
(attacks, rule 8). The authority's position is marked after it was read. The other store is read
once it has all below that, and a mirror has dealt with what it had. Then the authority is read
again, and its position marked. What agrees with either answer matches. A difference counts as a
mismatch if the authority repeated its answer, and the streams, once past the second mark, have told
of no change behind the first. So does one of which both stores repeat their answers at every look.
What changes from look to look is inconclusive, which is no match. So is what authority moved over,
or where a commit may wait for a standby. An error on either side is an error. Without a ledger, and
towards a store that no stream goes to, there are no positions: a difference that stays over growing
waits is a mismatch. Under overload comparisons are dropped and counted. All but `run_if` runs on
one thread beside the callers.
"""

from __future__ import annotations

import heapq
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from ldclient.migrations.types import Origin, Stage

from changeover.flags.alarm import Alarm, reason_of
from changeover.flags.router.endpoint import Cursor, PgEndpoint
from changeover.flags.router.positions import Positions
from changeover.flags.stages import other
from changeover.session import Connection

log = logging.getLogger("changeover.flags")

Read = Callable[[Cursor], Any]
LAG_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds before each further look at a difference; as many looks as there are waits."""
AGAIN_SECONDS = 0.05
"""How often to ask whether a position is reached."""
DRAIN_SECONDS = 0.005
KEPT_MISMATCHES = 100
OUTCOMES = ("compared", "matched", "mismatched", "ignored", "inconclusive")


def nothing() -> bool:
    """Say that nothing is under way: there is no mirror."""
    return False


@dataclass(frozen=True)
class Observation:
    """What one store answered: a value or an error, and how long that took."""

    origin: Origin
    value: Any
    error: BaseException | None
    seconds: float


@dataclass(frozen=True)
class Result:
    """The end of one comparison; `control` is the authority. It matched, mismatched, was ignored, stayed open, or failed.

    `apart` says that it was of a tenant at another store than all the others, and so at another stage.
    """

    experiment: str
    stage: Stage
    control: Observation
    candidate: Observation
    matched: bool
    ignored: bool
    looks: int
    apart: bool = False
    inconclusive: bool = False

    @property
    def failed(self) -> bool:
        """Return whether a store had no answer: nothing was compared."""
        return self.control.error is not None or self.candidate.error is not None

    @property
    def mismatched(self) -> bool:
        """Return whether the two stores differ for good."""
        return not (self.matched or self.ignored or self.failed or self.inconclusive)


class Experiment:
    """The hooks of one kind of read; override what differs. `compare` gets the old store's answer and the new one's."""

    name = "read"

    def clean(self, value: Any) -> Any:
        """Return what is to be compared of a store's answer.

        Args:
            value: What a read function returned.

        Returns:
            What is compared in its place.
        """
        return value

    def compare(self, old: Any, new: Any) -> bool:
        """Return whether two cleaned answers are the same.

        Args:
            old: The old store's answer, cleaned.
            new: The new store's answer, cleaned.

        Returns:
            Whether they count as equal.
        """
        return bool(old == new)

    def ignore(self, old: Any, new: Any) -> bool:
        """Return whether this difference is known and doesn't count.

        Args:
            old: The old store's answer, cleaned.
            new: The new store's answer, cleaned.

        Returns:
            Whether the difference is left out of the counts.
        """
        return False

    def run_if(self) -> bool:
        """Return whether this read is compared at all (caller's thread: be quick).

        Returns:
            Whether the other store is asked.
        """
        return True

    def publish(self, result: Result) -> None:
        """Take the end of one comparison.

        Args:
            result: Both answers, and how they compare; it may hold values of rows.
        """

    def raised(self, operation: str, error: Exception) -> None:
        """Take a failure of one of the hooks above; raising here would hurt the caller in `run_if` alone.

        Args:
            operation: The hook that raised.
            error: What it raised.
        """
        log.error("experiment %s: %s raised %s", self.name, operation, reason_of(error))


@dataclass(frozen=True)
class Comparison:
    """One read on its way: what the authority answered, and how to ask again."""

    experiment: Experiment
    stage: Stage
    control: Observation
    reads: Mapping[Origin, Read]
    looks: int = 0
    apart: bool = False
    lags: Callable[[], bool] = nothing
    """Whether a mirror is still to bring the other store what it had when it was looked at last."""
    epoch: int = 0
    """The newest move of authority when the authority was read: after another one nothing can be said."""
    position: int | None = None
    """The authority's position after it was read last; the other store is looked at once it has all below it."""
    open: Result | None = None
    """A difference whose authority repeated its answer: a mismatch, if nothing was told since `before`."""
    before: int = 0
    last: Result | None = None
    """What the last look gave."""
    steady: bool = True
    """Whether both stores repeated their answers at every look."""
    tell: Callable[[Result], None] = lambda result: None
    """What is told of its end, beside the experiment."""


class HookRaised(Exception):
    """A hook failed and `raised` was told; the comparison has no end to publish."""


class Comparisons:
    """Compares reads of one process; `offer` runs on the caller's thread and never waits."""

    def __init__(
        self, endpoints: Mapping[Origin, PgEndpoint], application: str, *,
        limit: int, deadline: float, waits: Sequence[float] = LAG_WAITS,
        under_way: Callable[[Origin], Callable[[], bool]] = lambda _: nothing, positions: Positions | None = None,
    ) -> None:  # fmt: skip
        self.endpoints = endpoints
        self.application = application
        self.limit = limit
        self.deadline = deadline
        self.waits = waits
        self.under_way = under_way
        self.positions = positions
        self.mismatches: deque[Result] = deque(maxlen=KEPT_MISMATCHES)
        self.drops = Alarm("comparisons of reads are dropped, the queue is full")
        self.errors = Alarm("comparisons of reads have no answer")
        self._counts: Counter[str] = Counter()
        self._stage: Stage | None = None
        self._at_stage: Counter[str] = Counter()
        self._offered: deque[Comparison] = deque()
        """What callers have put down; they take no lock that the thread holds."""
        self._heap: list[tuple[float, int, Comparison]] = []
        """What is to be looked at, by the time when; the thread's own."""
        self._order = count()
        self._counting = threading.Lock()
        self._wake = threading.Event()
        self._busy = False
        self._closing = False
        self._connections: dict[Origin, Connection] = {}
        self._thread = threading.Thread(target=self._run, name="changeover-experiment", daemon=True)
        self._thread.start()

    def offer(self, comparison: Comparison) -> bool:
        """Queue a comparison; False when there is no room, counted, or `run_if` says no."""
        try:
            if not comparison.experiment.run_if():
                return False
        except Exception as error:  # Scientist's rule: a hook's failure goes to the one method that may be overridden
            comparison.experiment.raised("run_if", error)
            return False
        if self._closing or self._depth() >= self.limit:
            self.drops.raise_for("closing" if self._closing else "queue full")
            return False
        self._offered.append(comparison)
        if not self._wake.is_set():
            self._wake.set()
        return True

    def _depth(self) -> int:
        return len(self._offered) + len(self._heap) + self._busy

    def begin(self, stage: Stage) -> None:
        """Say at which stage the process acts now: coming to one, what is said of reads there counts from nothing again."""
        with self._counting:
            if stage is not self._stage:
                self._stage = stage
                self._at_stage.clear()

    def counters(self) -> dict[str, Any]:
        """Return the counts; `compared` is the sum of matched, mismatched and ignored.

        `at_stage` has those of this stage, and those of tenants that stand apart meanwhile.
        """
        with self._counting:
            counts: dict[str, Any] = {name: self._counts[name] for name in OUTCOMES}
            counts["at_stage"] = {
                "stage": self._stage.value if self._stage else None, **{name: self._at_stage[name] for name in OUTCOMES},
            }  # fmt: skip
            depth = self._depth()
        return {
            **counts,
            "errors": self.errors.count,
            "dropped": self.drops.count,
            "depth": depth,
            "last_error": self.errors.last,
        }

    def drain(self, seconds: float) -> bool:
        """Wait until every comparison has ended; False when the time is over first."""
        until = time.monotonic() + seconds
        while self._depth():
            if time.monotonic() >= until:
                return False
            time.sleep(DRAIN_SECONDS)
        return True

    def close(self) -> None:
        """End the thread; open comparisons count as dropped."""
        self._closing = True
        self._wake.set()
        self._thread.join(self.deadline + 1)
        for _ in range(len(self._offered) + len(self._heap)):
            self.drops.raise_for("closing")
        self._offered.clear()
        self._heap.clear()

    def _push(self, due: float, comparison: Comparison) -> None:
        heapq.heappush(self._heap, (due, next(self._order), comparison))

    # -- the worker's thread

    def _run(self) -> None:
        while (comparison := self._next()) is not None:
            try:
                self._look(comparison)
            # A hook failed, or `raised` itself did: this comparison has no end, the next one may.
            except Exception as error:
                self.errors.raise_for(reason_of(error))
            finally:
                self._busy = False
        for connection in self._connections.values():
            connection.close()
        if self.positions is not None:
            self.positions.close()

    def _next(self) -> Comparison | None:
        while not self._closing:
            self._wake.clear()
            while self._offered:  # it is in one of the two at any moment
                self._push(time.monotonic(), self._offered[0])
                self._offered.popleft()
            early = self._heap[0][0] - time.monotonic() if self._heap else None
            if early is not None and early <= 0:
                self._busy = True
                return heapq.heappop(self._heap)[2]
            self._wake.wait(early)
        return None

    def _look(self, comparison: Comparison) -> None:
        """Read the other store, and the authority again on a further look; end the comparison or come back to it later."""
        first, candidate_origin = comparison.control, other(comparison.control.origin)
        reached = (
            self.positions.reached(candidate_origin) if self.positions is not None and comparison.position is not None else None
        )
        if reached is not None and comparison.last is not None and reached.epoch != comparison.epoch:
            self._finish(comparison, replace(comparison.last, inconclusive=True))
            return
        if comparison.lags() or (reached is not None and reached.applied < (comparison.position or 0)):
            self._push(time.monotonic() + AGAIN_SECONDS, comparison)
            return
        if reached is not None and comparison.open is not None and reached.told <= comparison.before:
            self._finish(comparison, comparison.open)
            return
        candidate = self._observe(candidate_origin, comparison)
        control = self._observe(first.origin, comparison) if comparison.looks else first
        result = self._judge(comparison, control, candidate)
        if result.mismatched and comparison.looks:
            earlier = self._judge(comparison, first, candidate)
            result = earlier if earlier.matched or earlier.ignored else result
        if not result.mismatched:
            self._finish(comparison, result)
        elif comparison.looks < len(self.waits):
            self._again(comparison, result)
        else:
            # by positions: neither store ever gave another answer, or nobody knows
            known = comparison.position is None or (comparison.steady and self._repeated(comparison, result))
            self._finish(comparison, replace(result, inconclusive=not known))

    def _again(self, comparison: Comparison, result: Result) -> None:
        """Come back to a difference once the other store has what the authority has by now."""
        candidate_origin, wait = result.candidate.origin, self.waits[comparison.looks]
        repeats = comparison.looks == 0 or self._same(comparison, comparison.control, result.control)
        again = replace(
            comparison, control=result.control, looks=comparison.looks + 1, lags=self.under_way(candidate_origin), last=result,
            steady=comparison.steady and (comparison.last is None or self._repeated(comparison, result)), open=None,
        )  # fmt: skip
        # where no stream goes to the other store the clock has to do
        if self.positions is not None and self.positions.reached(candidate_origin) is not None:
            if self._waiting() >= self.limit // 2:
                self._finish(comparison, replace(result, inconclusive=True))
                return
            position, doubtful = self.positions.mark(result.control.origin)
            may_end = comparison.looks > 0 and repeats and not doubtful
            again = replace(
                again, position=position, before=comparison.position or 0, open=result if may_end else None,
                steady=again.steady and not doubtful,
            )  # fmt: skip
            wait = 0.0
        self._push(time.monotonic() + wait, again)

    def _waiting(self) -> int:
        """Return how many differences wait: they leave half of the places to reads that were not looked at yet."""
        return sum(comparison.looks > 0 for _, _, comparison in self._heap)

    def _repeated(self, comparison: Comparison, result: Result) -> bool:
        """Return whether both stores answered as at the last look."""
        last = comparison.last
        return last is not None and all(
            self._same(comparison, one, other_one)
            for one, other_one in ((last.control, result.control), (last.candidate, result.candidate))
        )

    def _same(self, comparison: Comparison, one: Observation, again: Observation) -> bool:
        """Return whether a store gave the same answer twice."""
        both = [self._hook(comparison.experiment, "clean", answer.value) for answer in (one, again)]
        return bool(self._hook(comparison.experiment, "compare", *both))

    def _observe(self, origin: Origin, comparison: Comparison) -> Observation:
        started = time.monotonic()
        try:
            connection = self._connection(origin)
            with connection.transaction(), connection.cursor() as cursor:
                value = comparison.reads[origin](cursor)
        except Exception as error:  # the read is the application's code: whatever it raises is this store's answer
            return Observation(origin, None, error, time.monotonic() - started)
        return Observation(origin, value, None, time.monotonic() - started)

    def _connection(self, origin: Origin) -> Connection:
        """Return this thread's session: read-only, so that a shadow read can't write, and with a deadline."""
        connection = self._connections.get(origin)
        if connection is None or connection.closed:
            settings = {"statement_timeout": f"{int(self.deadline * 1000)}ms", "idle_session_timeout": "0"}
            connection = self.endpoints[origin].open(self.application, settings)
            connection.read_only = True
            self._connections[origin] = connection
        return connection

    def _judge(self, comparison: Comparison, control: Observation, candidate: Observation) -> Result:
        experiment = comparison.experiment
        matched = ignored = False
        if control.error is None and candidate.error is None:
            observed = {observation.origin: observation for observation in (control, candidate)}
            both = [self._hook(experiment, "clean", observed[origin].value) for origin in (Origin.OLD, Origin.NEW)]
            matched = bool(self._hook(experiment, "compare", *both))
            ignored = not matched and bool(self._hook(experiment, "ignore", *both))
        looks = comparison.looks + 1
        return Result(experiment.name, comparison.stage, control, candidate, matched, ignored, looks, comparison.apart)

    @staticmethod
    def _hook(experiment: Experiment, name: str, *values: Any) -> Any:
        try:
            return getattr(experiment, name)(*values)
        except Exception as error:  # Scientist's rule, as above
            experiment.raised(name, error)
            raise HookRaised(name) from error

    def _finish(self, comparison: Comparison, result: Result) -> None:
        failure = result.control.error or result.candidate.error
        if failure is not None:
            self.errors.raise_for(reason_of(failure))
        else:
            flags = {"matched": result.matched, "ignored": result.ignored, "inconclusive": result.inconclusive}
            outcome = next((name for name, holds in flags.items() if holds), "mismatched")
            with self._counting:
                for name in (outcome,) if result.inconclusive else ("compared", outcome):
                    self._counts[name] += 1
                    self._at_stage[name] += result.apart or result.stage is self._stage
                if result.mismatched:
                    self.mismatches.append(result)
        comparison.tell(result)
        self._hook(comparison.experiment, "publish", result)
