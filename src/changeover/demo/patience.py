"""How long the demo waits: for as long as anything moves, however slow the machine is.

A wait names what moves while there is progress. It ends by an error that says what was waited for where nothing has moved
for long. Runs on the driver, and in the application's process without Spark.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from changeover.errors import CouldNotFinish

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

STILL_SECONDS = 600.0
"""How long nothing may move: longer than Spark plans one query on a machine with much other work."""


@dataclass
class Patience:
    """One wait: `moves` returns what changes while there is progress."""

    moves: Callable[[], object]
    since: float = field(default_factory=time.monotonic)
    last: object = None

    def ends(self, still: float) -> bool:
        """Return whether nothing has moved for so many seconds.

        Args:
            still: Seconds without any movement.
        """
        now = self.moves()
        if now != self.last:
            self.last, self.since = now, time.monotonic()
            return False
        return time.monotonic() - self.since > still

    def require(self, why: str) -> None:
        """Look once more, and go on waiting.

        Args:
            why: What is being waited for, as a sentence.

        Raises:
            CouldNotFinish: Nothing has moved for long.
        """
        if self.ends(STILL_SECONDS):
            raise CouldNotFinish(f"{why}, and nothing has moved for {STILL_SECONDS:g} s")


def tasks_done(spark: SparkSession) -> list[int]:
    """Return the stages that Spark works on, and how many tasks of them are done (driver).

    Args:
        spark: The session.
    """
    tracker = spark.sparkContext.statusTracker()
    active = [(stage, tracker.getStageInfo(stage)) for stage in tracker.getActiveStageIds()]
    return [number for stage, info in active if info is not None for number in (stage, info.numCompletedTasks)]


def cpu_seconds(pid: int) -> float:
    """Return how much processor time a process has had, in seconds; 0 once it is gone.

    Args:
        pid: The process. The figures are the kernel's (proc(5), utime and stime).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
