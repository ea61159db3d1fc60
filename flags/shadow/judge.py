"""The judge: what one comparison does at each look, until it has an end (the thread of comparisons).

A difference is judged by the logs and not by the clock (attacks, rule 8). The authority's position is marked after it was read.
The other store is read once it has all below that, and a mirror has dealt with what it had. Then the authority is read again, and
its position marked. What agrees with either answer matches. A difference counts as a mismatch if the authority repeated its
answer, and the streams, once past the second mark, have told of no change behind the first. So does one of which both stores
repeat their answers at every look. What changes from look to look is inconclusive, which is no match. So is what authority moved
over, what there is no room to keep, or where a commit may wait for a standby. An error on either side is an error. Without a
ledger, and towards a store that no stream goes to, there are no positions: a difference that stays over growing waits is a
mismatch. A store that fails again and again is left alone for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ldclient.migrations.types import Origin, Stage

from changeover.flags.shadow.breaker import Breaker
from changeover.flags.shadow.experiment import Answer, Experiment, Observation, Read, Result, judged, repeated
from changeover.flags.shadow.positions import Positions, Store
from changeover.flags.shadow.room import Room, size_of
from changeover.flags.stages import other
from changeover.session import Connection

LAG_WAITS = (0.05, 0.1, 0.2, 0.4, 0.8)
"""Seconds before each further look at a difference; as many looks as there are waits."""
AGAIN_SECONDS = 0.05
"""How often to ask whether a position is reached."""


def nothing() -> bool:
    """Say that nothing is under way: there is no mirror.

    Returns:
        False.
    """
    return False


@dataclass(frozen=True)
class Comparison:
    """One read on its way: what the authority answered, and how to ask again."""

    experiment: Experiment
    stage: Stage
    authority: Origin
    control: Observation
    reads: Mapping[Origin, Read]
    beside: Mapping[str, Answer] = field(default_factory=dict)
    """What else is asked, by its name."""
    weight: int = 0
    """About how many bytes its answers take."""
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
    tell: Callable[[Result | None], None] = lambda result: None
    """What is told of its end, once, beside the experiment: None where the other store was never asked, or nothing came of it."""

    def weighing(self, weight: int) -> Comparison:
        """Return it with its bytes.

        Args:
            weight: The bytes.

        Returns:
            The comparison.
        """
        return replace(self, weight=weight)


Due = tuple[float, Comparison]
"""A comparison, and when to look at it (seconds on the monotonic clock)."""


class Judge:
    """Looks at comparisons, one at a time; it has the sessions of their thread. `waits` are those by the clock."""

    def __init__(
        self, endpoints: Mapping[Origin, Store], application: str, room: Room, *, limit: int, deadline: float,
        waits: Sequence[float], under_way: Callable[[Origin], Callable[[], bool]], positions: Positions | None,
    ) -> None:  # fmt: skip
        self.endpoints = endpoints
        self.application = application
        self.room = room
        self.limit = limit
        self.deadline = deadline
        self.waits = waits
        self.under_way = under_way
        self.positions = positions
        self.breakers = {origin: Breaker() for origin in Origin}
        self._connections: dict[Origin, Connection] = {}

    def look(self, comparison: Comparison, waiting: Iterable[Comparison]) -> Result | Due | None:
        """Read the other store, and the authority again on a further look.

        Args:
            comparison: What is looked at.
            waiting: The other comparisons that were looked at already.

        Returns:
            How it ends; or when to come back to what; or None where the other store is left alone and was never asked.

        Raises:
            HookRaised: A hook of the experiment raised.
            ServerUnavailable: The ledger can't be asked for a position.
        """
        first, candidate_origin = comparison.control, other(comparison.authority)
        breaker = self.breakers[candidate_origin]
        if breaker.resting:
            return _open(comparison.last) if comparison.last is not None else None
        reached = (
            self.positions.reached(candidate_origin) if self.positions is not None and comparison.position is not None else None
        )
        if reached is not None and comparison.last is not None and reached.epoch != comparison.epoch:
            return _open(comparison.last)
        if comparison.lags() or (reached is not None and reached.applied < (comparison.position or 0)):
            return time.monotonic() + AGAIN_SECONDS, comparison
        if reached is not None and comparison.open is not None and reached.told <= comparison.before:
            return comparison.open
        candidate = self._observe(candidate_origin, comparison)
        if candidate.error is None:
            breaker.answered()
        else:
            breaker.failed()
        control = self._observe(comparison.authority, comparison) if comparison.looks else first
        result = self._judge(comparison, control, candidate)
        if result.mismatched and comparison.looks:
            earlier = self._judge(comparison, first, candidate)
            result = earlier if earlier.matched or earlier.ignored else result
        if not result.mismatched:
            return result
        if comparison.looks < len(self.waits):
            return self._again(comparison, result, waiting)
        # by positions: neither store ever gave another answer, or nobody knows
        known = comparison.position is None or (comparison.steady and self._repeated(comparison, result))
        return result if known else _open(result)

    def close(self) -> None:
        """End the sessions."""
        for connection in self._connections.values():
            connection.close()
        if self.positions is not None:
            self.positions.close()

    def _again(self, comparison: Comparison, result: Result, waiting: Iterable[Comparison]) -> Result | Due:
        """Come back to a difference once the other store has what the authority has by now."""
        candidate_origin, wait = other(comparison.authority), self.waits[comparison.looks]
        same = comparison.looks == 0 or repeated(comparison.experiment, comparison.control, result.control)
        weight = size_of(result.control.value) + size_of(result.candidate.value)
        again = replace(
            comparison, control=result.control, looks=comparison.looks + 1, lags=self.under_way(candidate_origin), last=result,
            steady=comparison.steady and (comparison.last is None or self._repeated(comparison, result)), open=None, weight=weight,
        )  # fmt: skip
        # differences leave half of the places, and of the room, to reads that were not looked at yet
        weights = [one.weight for one in waiting]
        crowded = sum(weights) + weight > self.room.limit // 2
        # where no stream goes to the other store the clock has to do
        if self.positions is not None and self.positions.reached(candidate_origin) is not None:
            crowded = crowded or len(weights) >= self.limit // 2
            position, doubtful = self.positions.mark(comparison.authority)
            may_end = comparison.looks > 0 and same and not doubtful
            again = replace(
                again, position=position, before=comparison.position or 0, open=result if may_end else None,
                steady=again.steady and not doubtful,
            )  # fmt: skip
            wait = 0.0
        if crowded or not self.room.take(weight - comparison.weight):
            return _open(result)
        return time.monotonic() + wait, again

    def _repeated(self, comparison: Comparison, result: Result) -> bool:
        """Return whether both stores answered as at the last look."""
        last = comparison.last
        return last is not None and all(
            repeated(comparison.experiment, one, again)
            for one, again in ((last.control, result.control), (last.candidate, result.candidate))
        )

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

    @staticmethod
    def _judge(comparison: Comparison, control: Observation, candidate: Observation) -> Result:
        matched, ignored = judged(comparison.experiment, control, candidate)
        return Result(
            comparison.experiment.name, comparison.stage, control, candidate, matched, ignored, comparison.looks + 1,
            comparison.apart,
        )  # fmt: skip


def _open(result: Result) -> Result:
    """Return a difference of which nobody knows whether it is one."""
    return replace(result, inconclusive=True)
