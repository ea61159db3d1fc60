"""A circuit breaker: a candidate that fails again and again is left alone for a while, so that comparing costs no more.

After some failures in a row it opens, and nothing is asked for a pause. Then the next read is a trial: an answer closes the
breaker, a failure opens it for twice as long. The clock decides when to ask again, and never how answers compare. One thread
asks the candidate and tells of it; any thread may look.
"""

from __future__ import annotations

import time
from collections.abc import Callable

FAILURES = 5
"""Failures in a row that open it: fewer may be one restart of a pooler."""
PAUSE_SECONDS = 1.0
LONGEST_SECONDS = 60.0
"""The pause doubles up to here, so that a candidate that is back is noticed within a minute."""


class Breaker:
    """The breaker of one candidate."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._failures = 0
        self._pause = PAUSE_SECONDS
        self._until = float("-inf")

    @property
    def open(self) -> bool:
        """Return whether it is open, a trial under way or not."""
        return self._failures >= FAILURES

    @property
    def resting(self) -> bool:
        """Return whether nothing is to be asked now."""
        return self._now() < self._until

    def answered(self) -> None:
        """Take an answer."""
        self._failures = 0
        self._pause = PAUSE_SECONDS
        self._until = float("-inf")

    def failed(self) -> None:
        """Take a failure."""
        self._failures += 1
        if self.open:
            self._until = self._now() + self._pause
            self._pause = min(2 * self._pause, LONGEST_SECONDS)
