"""Operations, as LaunchDarkly's own migration dashboards show them: which store was asked, for how long, and how it ended.

A caller only puts down what was measured. A thread evaluates the flag for the tracker, which takes longer than the router may take
from a caller, and hands the event to the SDK, which samples and sends it. A write that is mirrored, and a read that is compared,
are told once the other store has ended too. Under overload the oldest are left out.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from ldclient import Context, LDClient
from ldclient.migrations.tracker import MigrationOpEvent, OpTracker
from ldclient.migrations.types import Operation, Origin, Stage

KEPT = 10_000
"""Operations that wait to be told of."""

EVERY_SECONDS = 0.2


@dataclass(frozen=True)
class Asked:
    """What one store did in an operation; seconds, and whether it failed."""

    origin: Origin
    seconds: float
    failed: bool = False


@dataclass(frozen=True)
class Done:
    """One operation: of which tenant, what each store did, and whether both gave the same answer, None where that is not known."""

    operation: Operation
    tenant: str
    asked: Sequence[Asked]
    consistent: bool | None = None


class Operations:
    """Tells one SDK client of the operations of a process; `context` returns the context by which a tenant's flag is asked.

    `default` is the stage that an event names where the flag has no usable answer.
    """

    def __init__(self, client: LDClient, key: str, context: Callable[[str], Context], default: Stage) -> None:
        self.client = client
        self.key = key
        self.context = context
        self.default = default
        self._waiting: deque[Done] = deque(maxlen=KEPT)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="changeover-operations", daemon=True)
        self._thread.start()

    def record(self, done: Done) -> None:
        """Put an operation down (caller's thread).

        Args:
            done: The operation.
        """
        self._waiting.append(done)

    def close(self) -> None:
        """Tell of what is left, and end the thread."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(EVERY_SECONDS):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        while self._waiting:
            done = self._waiting.popleft()
            _, tracker = self.client.migration_variation(self.key, self.context(done.tenant), self.default)
            self._measure(tracker.operation(done.operation), done)
            self.client.track_migration_op(tracker if done.consistent is None else Checked(tracker, done.consistent))

    def _measure(self, tracker: OpTracker, done: Done) -> None:
        """Put into an event what was measured of each store."""
        for asked in done.asked:
            tracker.invoked(asked.origin).latency(asked.origin, timedelta(seconds=asked.seconds))
            if asked.failed:
                tracker.error(asked.origin)


class Checked(OpTracker):
    """A tracker's event with the outcome of a comparison, which the router has sampled by the flag's ratio already.

    The tracker samples what it is told by the same ratio, once more. So the outcome is put into the event that it has built, with
    the ratio, by which LaunchDarkly counts one for as many.
    """

    def __init__(self, tracker: OpTracker, consistent: bool) -> None:
        self._event = tracker.build()
        if isinstance(self._event, MigrationOpEvent):
            self._event.consistent = consistent
            self._event.consistent_ratio = max(1, ratio_of(self._event))

    def build(self) -> MigrationOpEvent | str:
        """Return the event."""
        return self._event


def ratio_of(event: MigrationOpEvent | str) -> int:
    """Return the check ratio of an event's flag: of how many reads one is compared (pure).

    The SDK offers it nowhere else. What it takes for no ratio is 1, and below 0 it compares none.

    Args:
        event: What a tracker has built.

    Returns:
        The ratio; 1 where the flag has none, or there is no flag.
    """
    flag = event.flag if isinstance(event, MigrationOpEvent) else None
    ratio = flag.migrations.check_ratio if flag is not None and flag.migrations is not None else None
    return 1 if ratio is None else max(0, ratio)
