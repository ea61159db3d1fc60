"""How long the demo waits: for as long as anything moves, however slow the machine is.

A wait names what moves while there is progress, and ends by an error that says what was waited for where nothing has moved for
long. Runs on the driver, and in the application's process without Spark.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from changeover.errors import CouldNotFinish

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

STILL_SECONDS = 120.0
"""How long nothing may move: longer than Spark plans one query on a machine with much other work."""


@dataclass
class Patience:
    """One wait: `moves` returns what changes while there is progress."""

    moves: Callable[[], object]
    since: float = field(default_factory=time.monotonic)
    last: object = None

    def require(self, why: str) -> None:
        """Raise CouldNotFinish, with what is waited for, where nothing has moved for long."""
        now = self.moves()
        if now != self.last:
            self.last, self.since = now, time.monotonic()
        elif time.monotonic() - self.since > STILL_SECONDS:
            raise CouldNotFinish(f"{why}, and nothing has moved for {STILL_SECONDS:g} s")


def tasks_done(spark: SparkSession) -> list[int]:
    """Return the stages that Spark works on, and how many tasks of them are done (driver)."""
    tracker = spark.sparkContext.statusTracker()
    active = [(stage, tracker.getStageInfo(stage)) for stage in tracker.getActiveStageIds()]
    return [number for stage, info in active if info is not None for number in (stage, info.numCompletedTasks)]
