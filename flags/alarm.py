"""An alarm: every occurrence counted, and a warning in the log at most once a minute.

What goes wrong beside the caller's path never reaches the caller, so it has to be loud in another way without flooding
the log. The reason names a class of error and never a row's values. Thread-safe; runs in the application.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import UTC, datetime

import psycopg

log = logging.getLogger("changeover.flags")

WARN_EVERY_SECONDS = 60.0


class Alarm:
    """Counts one kind of failure."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.count = 0
        self._last: tuple[float, str] | None = None
        self._warned = float("-inf")
        self._lock = threading.Lock()

    @property
    def last(self) -> tuple[str, str] | None:
        """Return (time in ISO form, reason) of the newest one, None where there was none."""
        if self._last is None:
            return None
        at, reason = self._last
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds"), reason

    def raise_for(self, reason: str) -> None:
        """Count one occurrence, and warn if the last warning is long enough ago.

        Args:
            reason: Why, without a value of a row.
        """
        with self._lock:
            self.count += 1
            self._last = (time.time(), reason)
            due = time.monotonic() - self._warned > WARN_EVERY_SECONDS
            if due:
                self._warned = time.monotonic()
        if due:
            log.warning("%s (%s; %d so far)", self.what, reason, self.count)


def reason_of(error: BaseException) -> str:
    """Return an error's class and SQLSTATE: a server's message may hold a row's values.

    Args:
        error: The error.

    Returns:
        The class, and the SQLSTATE where a server gave one.
    """
    state = error.sqlstate if isinstance(error, psycopg.Error) else None
    return f"{type(error).__name__} {state}" if state else type(error).__name__
