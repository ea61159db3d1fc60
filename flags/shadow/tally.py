"""The tally: what came of the comparisons of one process, all told and at its present stage, and the last mismatches.

Mismatches are kept with their values, at most a hundred, and no more of them than their bytes allow. A result is counted before
it is kept, so one that is too large to keep counts like any other. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from typing import Any

from ldclient.migrations.types import Stage

from changeover.flags.shadow.experiment import Result
from changeover.flags.shadow.room import size_of

KEPT_MISMATCHES = 100
OUTCOMES = ("compared", "matched", "mismatched", "ignored", "inconclusive")


class Tally:
    """The counts; `kept_bytes` bounds what the kept mismatches take."""

    def __init__(self, kept_bytes: int) -> None:
        self.kept_bytes = kept_bytes
        self._kept: deque[tuple[int, Result]] = deque()
        self._held = 0
        self._counts: Counter[str] = Counter()
        self._stage: Stage | None = None
        self._at_stage: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def mismatches(self) -> list[Result]:
        """Return the mismatches that are kept, oldest first."""
        with self._lock:
            return [result for _, result in self._kept]

    def begin(self, stage: Stage) -> None:
        """Say at which stage the process acts now: coming to one, what is said of reads there counts from nothing again.

        Args:
            stage: The stage.
        """
        with self._lock:
            if stage is not self._stage:
                self._stage = stage
                self._at_stage.clear()

    def add(self, result: Result) -> None:
        """Count a result that has an answer of both stores.

        Args:
            result: The result.
        """
        with self._lock:
            for name in (result.outcome,) if result.inconclusive else ("compared", result.outcome):
                self._counts[name] += 1
                self._at_stage[name] += result.apart or result.stage is self._stage
        if result.mismatched:
            self._keep(size_of(result.control.value) + size_of(result.candidate.value), result)

    def _keep(self, size: int, result: Result) -> None:
        with self._lock:
            if size > self.kept_bytes:
                return
            self._kept.append((size, result))
            self._held += size
            while len(self._kept) > KEPT_MISMATCHES or self._held > self.kept_bytes:
                self._held -= self._kept.popleft()[0]

    def counts(self) -> dict[str, Any]:
        """Return the counts; `compared` is the sum of matched, mismatched and ignored.

        `at_stage` has those of this stage, and those of tenants that stand apart meanwhile.

        Returns:
            The counts by name, ready for JSON.
        """
        with self._lock:
            counts: dict[str, Any] = {name: self._counts[name] for name in OUTCOMES}
            counts["at_stage"] = {
                "stage": self._stage.value if self._stage else None, **{name: self._at_stage[name] for name in OUTCOMES},
            }  # fmt: skip
        return counts
