"""The demo: a live table moved end to end on one machine, with an application that never stops writing.

Everything that it shows is done by the functions behind the command line, on real servers; what it adds is the table, the
application, and damage on request. It leaves nothing behind but a report and logs, unless it is told to keep the rest.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from changeover import java
from changeover.demo import place as places
from changeover.demo import tour as tours
from changeover.demo.damage import KINDS
from changeover.demo.follow import Follower
from changeover.demo.outcome import Outcome
from changeover.demo.processes import ApplicationProcess
from changeover.demo.table import LEAST_ROWS, Shape
from changeover.errors import UsageError
from changeover.record import log_file
from changeover.session import spark_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from rich.console import Console

__all__ = ["KINDS", "Outcome", "demo"]

CORES = 2


def demo(
    *,
    rows: int = 200_000,
    broken: str | None = None,
    keep: bool = False,
    work: Path | None = None,
    console: Console | None = None,
) -> Outcome:
    """Move the demo's table and tell about it on `console`; `broken` is one of KINDS (driver).

    Raises UsageError, JavaMissing and EmbeddedServerFailed before anything is made; whatever is raised later, processes and
    servers are ended, and with `keep` the data stays.
    """
    from rich.console import Console

    if rows < LEAST_ROWS:
        raise UsageError(f"demo: {rows} rows are too few for a race to happen: {LEAST_ROWS} at least")
    java.require()
    said = console or Console(stderr=True)
    started = time.monotonic()
    with ExitStack() as held:
        held.enter_context(_sigterm_like_ctrl_c())
        place = held.enter_context(places.made(work, Shape(rows), keep))
        spark = held.enter_context(_session())
        tour = _begin(place, spark, Shape(rows))
        held.callback(tours.end, tour)
        held.enter_context(log_file(tour.spec, "demo"))
        set_up = time.monotonic() - started
        said.print(
            f"set-up {set_up:.1f} s: {rows:,} rows, the application is writing; everything is in {place.root}", **PLAIN
        )
        for step in tours.steps(broken):
            line = tour.run(step)
            said.print(f"{step.name:<12} {tour.seconds[step.name]:6.1f} s  {line}", **PLAIN)
        outcome = Outcome.of(tour, set_up, keep)
        outcome.write_report()
        outcome.show(said)
        return outcome


PLAIN = {"markup": False, "highlight": False, "soft_wrap": True}


def _begin(place: places.Place, spark: SparkSession, shape: Shape) -> tours.Tour:
    """Start the application, before anything of the migration exists."""
    spec = place.spec()
    application = ApplicationProcess.start(place.spec_file, place.root, shape.rows)
    store, lake = (Follower(spec, spark, [name]) for name in ("store", "lake"))
    return tours.Tour(place, spec, spark, shape, application, store, lake)


@contextmanager
def _session() -> Iterator[SparkSession]:
    """Start Spark, its first job done."""
    spark = spark_session("changeover demo", cores=CORES)
    try:
        spark.range(1).count()
        yield spark
    finally:
        spark.stop()


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that no process is left; signals belong to the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
