"""Replay in the background: a thread of the demo's that follows the change stream into some of the targets.

It stands for `changeover replay --follow`, which runs for days beside everything else. An error ends the thread and is
raised where the demo looks next, so that nothing goes on without it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from changeover.jobs.replay import replay
from changeover.spec import Spec

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


class Follower:
    """Replays into the targets from `start` to `stop`, as often as asked for."""

    def __init__(self, spec: Spec, spark: SparkSession, targets: Sequence[str]) -> None:
        self.spec = spec
        self.spark = spark
        self.targets = tuple(targets)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begin to follow."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"replay-{'-'.join(self.targets)}", daemon=True)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread; an error that is already on its way goes first."""
        if error is None:
            self.stop()
        else:
            self._stop.set()
            if self._thread is not None:
                self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            replay(self.spec, self.spark, follow=True, stop=self._stop, targets=self.targets)
        except Exception as error:  # kept for the demo's own thread, which raises it
            self._error = error
