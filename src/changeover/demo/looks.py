"""The looks: how far a step is that works without a pause, as the ledger and Spark say it.

A look runs in the screen's thread, beside the step, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from changeover.demo.screen import Reading
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.progress import chunk_progress
from changeover.session import one_row

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def backfilled(ledger: Ledger) -> Reading:
    """Return how many chunks are loaded, and as the rate the rows of both targets.

    Args:
        ledger: A session of its own, since the step's is in use.
    """
    chunks, loaded, rows = chunk_progress(ledger)
    begun, loads = one_row(
        ledger.connection.execute(
            "SELECT count(DISTINCT (source, target)), (SELECT count(*) FROM changeover.load WHERE migration = %(m)s)"
            " FROM changeover.chunk WHERE migration = %(m)s",
            {"m": ledger.migration},
        )
    )
    if begun:
        chunks = chunks // begun * loads  # the next target has as many, and its chunks come on record when it begins
    return Reading("the snapshot is loaded", loaded, chunks or None, "chunks", rows, "rows")


class Tasks:
    """Spark's tasks: how many are done of all that were seen, since what is to come is not planned yet."""

    def __init__(self, spark: SparkSession, waiting: Callable[[], str]) -> None:
        self._tracker = spark.sparkContext.statusTracker()
        self._waiting = waiting
        self._seen: dict[int, tuple[int, int]] = {}

    def __call__(self) -> Reading:
        """Return how far the tasks are; those of replay, which goes on beside the step, are among them."""
        active = self._tracker.getActiveStageIds()
        for stage in active:
            if (info := self._tracker.getStageInfo(stage)) is not None:
                self._seen[stage] = (info.numCompletedTasks, info.numTasks)
        for stage in self._seen.keys() - set(active):
            self._seen[stage] = (self._seen[stage][1],) * 2
        done, total = (sum(counts[place] for counts in self._seen.values()) for place in (0, 1))
        return Reading(self._waiting(), done, total or None, "tasks")
