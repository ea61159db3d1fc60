"""Replay in the background: a thread of the demo's that follows the change stream into all targets.

It stands for `changeover replay --follow`, which runs for days beside everything else. An error ends the thread and is
raised where the demo looks next, so that nothing goes on without it.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from changeover.errors import LeaseHeld
from changeover.jobs.apply.rounds import replay
from changeover.spec import Spec

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


log = logging.getLogger(__name__)


class Follower:
    """Replays from `start` to `stop`."""

    def __init__(self, spec: Spec, spark: SparkSession) -> None:
        self.spec = spec
        self.spark = spark
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the batch at hand; raises what ended the thread before."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.require_alive()

    def require_alive(self) -> None:
        """Raise what ended the thread, if something did."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                replay(self.spec, self.spark, follow=True, stop=self._stop)
            except LeaseHeld as held:  # a batch or a verification goes on for long: on a slow machine that is progress
                log.info("replay goes on: %s", held)
            except Exception as error:  # kept for the demo's own thread, which raises it
                self._error = error
                return
