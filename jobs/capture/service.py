"""Capture: the one long-lived service, which brings the source's changes into the spool in commit order.

The service reads from a slot (`slot`) or from a log of triggers (`trigger`). The server forgets
what was read only when the spool holds it durably, so a kill at any point loses nothing and repeats
nothing. Each session first proves that this is still the prepared stream, with no gap before the
spool's end; else it stops with the reason. A table that no longer looks as it was prepared gets an
event that says so, at its place in the stream, while the others go on. Runs on one machine, without
Spark.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import psycopg
from deltalake.exceptions import DeltaError

from changeover.errors import ChangeoverError, CouldNotFinish, SourceChanged, SpoolGap
from changeover.files import folders
from changeover.interrupt import asked_to_stop
from changeover.jobs.capture.feed import feed_of
from changeover.jobs.capture.rogue import Watch
from changeover.jobs.capture.slot import SlotRun
from changeover.jobs.capture.trigger import LogRun
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import NEW
from changeover.jobs.reverse import path as reverse
from changeover.jobs.spool.writer import CaptureResult
from changeover.spec import SLOT, TRIGGER, Spec, load

LEASE_SECONDS = 5.0
STARTED, WAITING = "started", "waiting"
"""What stands on record of a capture before it ends."""

RUNS: dict[str, type[SlotRun] | type[LogRun]] = {SLOT: SlotRun, TRIGGER: LogRun}
"""By what a run of capture follows each kind of change source."""

ROGUE_SECONDS = 5.0
"""How often to look for writes to a store without authority."""

NEW_STORE_SECONDS = 0.5
"""How often to look whether the new store has a stream to follow by now."""

log = logging.getLogger(__name__)


def capture(
    spec: Spec,
    *,
    until: Callable[[], bool] | None = None,
    stop: threading.Event | None = None,
    patience: float = 30.0,
) -> CaptureResult:
    """Bring changes into the spool until it is told to end; what is whole then is durable (driver).

    A broken connection is opened anew for up to `patience` seconds. A work folder that takes
    nothing is tried again for as long as it takes, at the start for `patience`. It needs no Spark.

    Args:
        spec: The migration's spec.
        until: Ends it; asked after each append and 5 times a second.
        stop: Ends it, as Ctrl-C and SIGTERM do.
        patience: How long a broken connection is tried again, in seconds.

    Returns:
        What the run did: counts, the spool's end as an LSN, seconds.

    Raises:
        StepOrder: Prepare did not run.
        LeaseHeld: Another capture runs.
        SourceChanged: This is not the prepared stream any more.
        SpoolGap: The stream does not go back to the spool's end.
        ServerUnavailable: The server can't be reached for longer than `patience`.
        DatabaseFailed: The server sent what can't be read, or failed otherwise.
        RowRefused: A row can't be represented in the spool.
        FolderFailed: The work folder takes nothing from the start on.
    """
    stop = stop or threading.Event()
    started = time.monotonic()
    with Ledger.open(spec, "capture") as ledger, ledger.lease("capture", wait_seconds=LEASE_SECONDS):
        stream = ledger.stream("capture")
        result = CaptureResult()
        feed = feed_of(spec, ledger, stream)
        run = RUNS[spec.source.capture](spec, feed, stop, until or (lambda: False), patience, result)
        with ledger.recorded("capture") as report, asked_to_stop(stop) as asked, new_store_beside(spec):
            ledger.audit("capture", STARTED, {})  # it may run for weeks, and a kill leaves no other trace
            run.patience.tell = partial(_tell_waiting, spec)
            try:
                run.run()
            finally:
                result.interrupted = asked()
                result.seconds = time.monotonic() - started
                report.update(result.recorded())
    log.info("capture ended: %s", result)
    return result


def _tell_waiting(spec: Spec, why: str | None) -> None:
    """Put on record for what capture waits, and that it goes on; where the ledger can't be reached either, the log has it."""
    with suppress(ChangeoverError, psycopg.Error), Ledger.open(spec, "capture") as ledger:
        ledger.audit("capture", STARTED if why is None else WAITING, {} if why is None else {"error": why})


@contextmanager
def new_store_beside(spec: Spec) -> Iterator[None]:
    """Bring the new store's changes into a spool of their own while the block lasts, from when its stream is there.

    Whatever goes wrong with it is in the log and tried again: the old store's stream goes on meanwhile.
    """
    if spec.flag is None:
        yield
        return
    ended = threading.Event()
    beside = [threading.Thread(target=work, args=(spec, ended), name=work.__name__) for work in (_follow_new_store, _tell_rogue)]
    for thread in beside:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in beside:
            thread.join()


def _tell_rogue(spec: Spec, ended: threading.Event) -> None:
    """Raise the alarm for writes to a store without authority, each state of affairs once."""
    reported: set[str] = set()
    watch = Watch(spec)
    while not ended.wait(ROGUE_SECONDS):
        try:
            with Ledger.open(spec, "capture") as ledger:
                lines = {str(one) for one in watch.look(ledger)}
        except (ChangeoverError, psycopg.Error, DeltaError, OSError) as error:
            lines = {f"rogue writes can't be looked for: {str(error).splitlines()[0]}"}
        for line in sorted(lines - reported):
            log.warning("%s", line)
        reported = lines


def _follow_new_store(spec: Spec, ended: threading.Event) -> None:
    reported = ""
    while not ended.is_set():
        try:
            with Ledger.open(spec, "capture") as ledger:  # one session, however long there is nothing to follow
                while not ended.wait(NEW_STORE_SECONDS):
                    path = reverse.recorded(ledger)
                    if path is not None and not path.broken:
                        capture_new(spec, ended)
        except (ChangeoverError, psycopg.Error, DeltaError, OSError) as error:
            message = str(error).splitlines()[0]
            if message != reported:
                log.warning("the new store's stream: %s", message)
            reported = message
        ended.wait(NEW_STORE_SECONDS)


def capture_new(spec: Spec, stop: threading.Event, until: Callable[[], bool] = lambda: False) -> CaptureResult | None:
    """Bring the new store's changes into its spool until `stop` or `until()`; None where no stream of it is on record (driver)."""
    with Ledger.open(spec, "capture") as ledger:
        path = reverse.recorded(ledger)
        if path is None or path.broken:
            return None
        with ledger.lease("capture-new"):
            run = SlotRun(spec, feed_of(spec, ledger, path, NEW), stop, until, 0.0, CaptureResult())
            try:
                run.run()
            except (SourceChanged, SpoolGap) as gap:
                reverse.break_at_gap(ledger, gap)
                raise CouldNotFinish(f"its change stream has a gap, so {spec.without_stream}") from gap
    return run.result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run capture from a command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="capture.py", description="Bring the source's changes into the spool.")
    parser.add_argument("spec", metavar="SPEC", help="the migration's TOML file")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        spec = load(parser.parse_args(arguments).spec)
        folders.keep_private(spec)
        result = capture(spec)
    except ChangeoverError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    from changeover.jobs.capture.service import main as entry  # the same module object as everybody else's

    sys.exit(entry())
