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
from ldclient.migrations.tracker import OpTracker
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
            if done.consistent is not None:
                tracker.consistent(_said(done.consistent))
            self.client.track_migration_op(tracker)

    def _measure(self, tracker: OpTracker, done: Done) -> None:
        """Put into an event what was measured of each store."""
        for asked in done.asked:
            tracker.invoked(asked.origin).latency(asked.origin, timedelta(seconds=asked.seconds))
            if asked.failed:
                tracker.error(asked.origin)


def _said(consistent: bool) -> Callable[[], bool]:
    return lambda: consistent
