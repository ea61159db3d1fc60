"""The flow: set-up, the tour's steps one by one, the outcome, and an orderly end whatever happens.

Everything that is started or made here is ended by what holds it, on an error and on Ctrl-C too: application, capture,
replay, Spark, server. Nothing stays but report and logs, unless it is to be kept.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from changeover.demo import place as places
from changeover.demo import tour as tours
from changeover.demo.follow import Follower
from changeover.demo.outcome import Outcome
from changeover.demo.processes import ApplicationProcess
from changeover.demo.schema import LEAST_ROWS, ROWS_BY_DEFAULT, Shape
from changeover.demo.screen import Reading, Screen
from changeover.errors import Interrupted, UsageError
from changeover.files.runlog import log_file
from changeover.interrupt import STOPPING
from changeover.spark import java
from changeover.spark.launch import spark_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from rich.console import Console

CORES = 2


def demo(
    *,
    rows: int = ROWS_BY_DEFAULT,
    broken: Sequence[str] = (),
    keep: bool = False,
    work: Path | None = None,
    console: Console | None = None,
) -> Outcome:
    """Move the demo's table and tell about it (driver).

    Whatever is raised, all processes are ended, but for a server that is to be kept.

    Args:
        rows: How many rows the table has at first.
        broken: What is to go wrong, some of `damage.KINDS`.
        keep: Whether servers and folder are kept afterwards.
        work: The folder, which must be empty; None makes one.
        console: Where it tells; None is standard error.

    Returns:
        What came of it: verdicts, both stores, figures, and seconds by step.

    Raises:
        UsageError: The rows are too few, or the folder holds anything; nothing was made.
        JavaMissing: Spark can't start; nothing was made.
        EmbeddedServerFailed: There is no server to start, or it does not start.
        Interrupted: Ctrl-C or SIGTERM came.
    """
    from rich.console import Console

    if rows < LEAST_ROWS:
        raise UsageError(f"demo: {rows} rows are too few for a race to happen: {LEAST_ROWS} at least")
    java.require()
    left = places.Left()
    try:
        with _interruptible():
            return _moved(Shape(rows), broken, keep, work, console or Console(stderr=True), left)
    except KeyboardInterrupt as error:
        raise Interrupted("demo", left.sentence()) from error


def _moved(
    shape: Shape, broken: Sequence[str], keep: bool, work: Path | None, console: Console, left: places.Left
) -> Outcome:  # fmt: skip
    started = time.monotonic()
    screen = Screen(console)
    with ExitStack() as held:
        with screen.step("set-up"):
            screen.at(Reading(f"a PostgreSQL server with {shape.rows:,} rows"))
            place = held.enter_context(places.made(work, shape, keep, left))
            screen.at(Reading("Spark starts"))
            spark = held.enter_context(_session())
            screen.at(Reading("the application starts to write"))
            tour = begin(place, spark, shape, screen)
            held.callback(tours.end, tour)
            held.enter_context(log_file(tour.spec, "demo"))
        set_up = time.monotonic() - started
        screen.line(f"{'set-up':<12} {set_up:6.1f} s  {shape.rows:,} rows in the old store, which the application writes to;"
                    f" everything is in {place.root}")  # fmt: skip
        for step in tours.steps(broken):
            line = tour.run(step)
            screen.line(f"{step.name:<12} {tour.seconds[step.name]:6.1f} s  {line}")
        outcome = Outcome.of(tour, set_up, keep)
        outcome.write_report()
        outcome.show(console)
        return outcome


def begin(place: places.Place, spark: SparkSession, shape: Shape, screen: Screen) -> tours.Tour:
    """Start the application, before anything of the migration exists."""
    spec = place.spec()
    application = ApplicationProcess.start(place.spec_file, place.root, shape.rows)
    return tours.Tour(place, spec, spark, shape, application, Follower(spec, spark), screen)


@contextmanager
def _session() -> Iterator[SparkSession]:
    """Start Spark, its first job done."""
    from py4j.protocol import Py4JError

    handler = signal.getsignal(signal.SIGINT)
    spark = spark_session("changeover demo", cores=CORES, brief=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)  # Spark's own would first speak to a JVM that may be busy or gone
    try:
        spark.range(1).count()
        yield spark
    finally:
        with suppress(Py4JError, OSError):  # a signal to the whole group ends its JVM first
            spark.stop()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM unwind, so that no process is left, and none after it disturb that; main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
