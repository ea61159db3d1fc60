"""Capture: the one long-lived service, which brings the source's changes into the spool in commit order.

The slot is told to forget only what the spool holds durably, and every connection goes on from the spool's end, so a kill at any
point loses nothing and repeats nothing. A transaction that outgrows one batch goes in by parts, so memory does not grow with it;
one that is cut off there is sent again, and what the spool holds of it is left out. Each connection first proves that this is
still the prepared stream, with no gap between slot and spool; else it stops with the reason. A table that no longer looks as it
was prepared gets an event that says so, at its place in the stream, while the others go on. Runs on one machine, without Spark.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pyarrow as pa
from deltalake.exceptions import DeltaError

from changeover.errors import (
    ChangeoverError,
    CouldNotFinish,
    DatabaseFailed,
    LeaseHeld,
    ServerUnavailable,
    SourceChanged,
    SpoolGap,
)
from changeover.interrupt import asked_to_stop
from changeover.jobs import pgoutput, reverse, triggerlog
from changeover.jobs.chunks import acknowledged
from changeover.jobs.entries import SourceColumn, Stream
from changeover.jobs.ledger import Ledger
from changeover.jobs.logcapture import LogRun
from changeover.jobs.partitions import Roots
from changeover.jobs.replication import (
    FEEDBACK_SECONDS,
    Replication,
    answer_interval,
    check_publication,
    check_slot,
    column_numbers,
    generated_columns,
    slot_alarm,
)
from changeover.jobs.rogue import rogue
from changeover.jobs.spool import SCHEMA, Spool, spool_path
from changeover.jobs.transactions import MARKER_PREFIX, Assembler, Partitions, Unpartitioned
from changeover.position import format_lsn
from changeover.session import Connection, application_name, connect, server_name, speaking_to
from changeover.spec import SLOT, Spec, load, qualified

BATCH_EVENTS = 50_000
BATCH_BYTES = 32 << 20
BATCH_SECONDS = 0.2
TAKE_BYTES = 1 << 20
"""How much of the stream is taken at once: each message then costs little, and the server is answered in time."""

UNTIL_SECONDS = 0.2
LEASE_SECONDS = 5.0
WATCH_SECONDS = 60.0
"""How often to look whether the server is about to drop the slot."""

COMPACT_EVERY = 50
"""Appends after which their small files become one."""

ROGUE_SECONDS = 5.0
"""How often to look for writes to a store without authority."""

NEW_STORE_SECONDS = 0.5
"""How often to look whether the new store has a stream to follow by now."""

IDLE_STEP = 1 << 20
"""Bytes of other tables' WAL after which an idle stream moves the spool's end, so that the slot lets that WAL go."""

log = logging.getLogger(__name__)


@dataclass
class CaptureResult:
    """What a run of capture did; `end_lsn` is the spool's end, `interrupted` whether Ctrl-C or SIGTERM ended it."""

    events: int = 0
    transactions: int = 0
    appends: int = 0
    connections: int = 0
    end_lsn: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    def recorded(self) -> dict[str, Any]:
        """Return what goes on record."""
        told = {"events": self.events, "transactions": self.transactions, "end": format_lsn(self.end_lsn)}
        return {**told, "seconds": round(self.seconds, 1), **({"outcome": "interrupted"} if self.interrupted else {})}


def capture(
    spec: Spec,
    *,
    until: Callable[[], bool] | None = None,
    stop: threading.Event | None = None,
    patience: float = 30.0,
) -> CaptureResult:
    """Bring changes into the spool until `until()`, `stop`, Ctrl-C or SIGTERM; what is whole then is durable (driver).

    A broken connection is opened anew for up to `patience` seconds. `until` is asked after each append and 5 times a
    second. Raises StepOrder before prepare, LeaseHeld beside another run, SourceChanged or SpoolGap when this is not
    the prepared stream any more, ServerUnavailable, DatabaseFailed, RowRefused.
    """
    stop = stop or threading.Event()
    started = time.monotonic()
    with Ledger.open(spec, "capture") as ledger, ledger.lease("capture", wait_seconds=LEASE_SECONDS):
        stream = ledger.stream("capture")
        tables = {".".join(qualified(table.source)): ledger.source_table(table.source)[1] for table in spec.tables}
        result = CaptureResult()
        feed = Feed(spec.source.dsn.resolve(), stream, tables, Spool(spool_path(spec.work, stream.epoch)), Roots(spec, ledger))
        follow = _Run if spec.source.capture == SLOT else LogRun
        run = follow(spec, feed, stop, until or (lambda: False), patience, result)
        with ledger.recorded("capture") as told, asked_to_stop(stop) as asked, new_store_beside(spec):
            ledger.audit("capture", "started", {})  # it may run for weeks, and a kill leaves no other trace
            try:
                run.run()
            finally:
                result.interrupted = asked()
                result.seconds = time.monotonic() - started
                told.update(result.recorded())
    log.info("capture ended: %s", result)
    return result


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
    said: set[str] = set()
    while not ended.wait(ROGUE_SECONDS):
        try:
            with Ledger.open(spec, "capture") as ledger:
                told = {str(one) for one in rogue(spec, ledger)}
        except (ChangeoverError, psycopg.Error, DeltaError, OSError) as error:
            told = {f"rogue writes can't be looked for: {str(error).splitlines()[0]}"}
        for line in sorted(told - said):
            log.warning("%s", line)
        said = told


def _follow_new_store(spec: Spec, ended: threading.Event) -> None:
    said = ""
    while not ended.is_set():
        try:
            capture_new(spec, ended)
        except (ChangeoverError, psycopg.Error, DeltaError, OSError) as error:
            told = str(error).splitlines()[0]
            if told != said:
                log.warning("the new store's stream: %s", told)
            said = told
        ended.wait(NEW_STORE_SECONDS)


def capture_new(spec: Spec, stop: threading.Event, until: Callable[[], bool] = lambda: False) -> CaptureResult | None:
    """Bring the new store's changes into its spool until `stop` or `until()`; None where no stream of it is on record (driver)."""
    with Ledger.open(spec, "capture") as ledger:
        path = reverse.recorded(ledger)
        if path is None or path.broken:
            return None
        with ledger.lease("capture-new"):
            roots = reverse.roots(spec, ledger, path)
            feed = Feed(reverse.new_dsn(spec), path.stream, path.tables, reverse.spool_of(spec), roots)
            run = _Run(spec, feed, stop, until, 0.0, CaptureResult())
            try:
                run.run()
            except (SourceChanged, SpoolGap) as gap:
                reverse.break_at_gap(ledger, gap)
                raise CouldNotFinish("its change stream has a gap, so the mirror alone keeps the old store up to date") from gap
    return run.result


def emit_marker(connection: Connection, note: str) -> None:
    """Write a marker into a store's logs; it reaches the spools when the caller's transaction commits."""
    connection.execute("SELECT pg_logical_emit_message(true, %s::text, %s::text)", [MARKER_PREFIX, note])
    triggerlog.mark(connection, note)


@dataclass(frozen=True)
class Feed:
    """A store's stream: where it is read, what must still be true of it, its tables' columns and partitions, and where it goes."""

    dsn: str
    stream: Stream
    tables: Mapping[str, Sequence[SourceColumn]]
    spool: Spool
    roots: Partitions = field(default_factory=Unpartitioned)


class _Run:
    """One run: connection after connection, where the last whole transaction ends, and the counts."""

    def __init__(
        self, spec: Spec, feed: Feed, stop: threading.Event, until: Callable[[], bool], patience: float, result: CaptureResult
    ) -> None:
        self.spec, self.stream, self.tables, self.roots = spec, feed.stream, feed.tables, feed.roots
        self.stop, self.until, self.patience = stop, until, patience
        self.ask_at = 0.0
        self.dsn, self.spool = feed.dsn, feed.spool
        self.result = result
        self.bytes = 0
        self.whole = self.durable = self.spool.end()
        self.flush_at = self.answer_at = self.watch_at = float("inf")
        self.answer_every = FEEDBACK_SECONDS
        self.failing_since: float | None = None

    def run(self) -> None:
        """Follow the stream until the run is ended, over as many connections as it takes."""
        delay = 0.1
        while not self._ended():
            try:
                with self._opened() as (replication, assembler):
                    delay = 0.1
                    self._follow(replication, assembler)
                return
            except (ServerUnavailable, LeaseHeld) as error:
                now = time.monotonic()
                self.failing_since = self.failing_since or now
                if now - self.failing_since > self.patience:
                    raise
                log.warning("%s; trying again in %g s", error, delay)
                self.stop.wait(delay)
                delay = min(2 * delay, 2.0)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Replication, Assembler]]:
        """Prove that this is the prepared stream, and start it where the spool ends."""
        self.bytes, self.flush_at = 0, float("inf")
        self.whole = self.durable = self.spool.end()
        name = application_name(self.spec.name, "capture")
        with closing(connect(self.dsn, name)) as connection, speaking_to(self.dsn, "checking the change stream"):
            check_slot(connection, self.stream, max(self.durable, self.stream.l0))
            check_publication(connection, self.stream.publication, self.tables)
            self.answer_every = answer_interval(connection)
            self._watch(connection)
            generated = generated_columns(connection, self.stream.publication)
            assembler = Assembler(self.tables, generated, self.spool.held(), roots=self.roots, numbers=self._numbers)
        with closing(connect(self.dsn, name, replication=True)) as connection:
            replication = Replication(connection, self.dsn)
            with speaking_to(self.dsn, "starting the change stream"):
                replication.identify(self.stream)
                replication.start(self.stream, max(self.durable, self.stream.l0))
            self.result.connections += 1
            self.answer_at = 0.0
            log.info("following slot %s from %s", self.stream.slot, format_lsn(self.durable))
            yield replication, assembler

    def _numbers(self) -> Mapping[str, Mapping[str, int]]:
        with closing(connect(self.dsn, application_name(self.spec.name, "capture"))) as connection:
            return column_numbers(connection, self.tables)

    def _follow(self, replication: Replication, assembler: Assembler) -> None:
        while True:
            with speaking_to(self.dsn, "reading the change stream"):
                self._take(replication, assembler)
                last = self._ended()
                if last or time.monotonic() >= self.flush_at:
                    self._flush(assembler)
                    replication.answer(acknowledged(self.durable, replication.received))
                if time.monotonic() >= self.answer_at:
                    self._stay_in_touch(replication, assembler)
            if last:
                return

    def _take(self, replication: Replication, assembler: Assembler) -> None:
        """Take the frames that are there, as far as one batch goes."""
        frames = replication.frames(0.05, min(TAKE_BYTES, BATCH_BYTES))
        if not frames:
            return
        self.failing_since = None
        try:
            for frame in [frame for frame in frames if frame[0] == pgoutput.KEEPALIVE]:
                alive = pgoutput.keepalive(frame)
                replication.received = max(replication.received, alive.wal_end)
                if alive.reply:
                    self.answer_at = 0.0
            self._committed(assembler.take([frame for frame in frames if frame[0] != pgoutput.KEEPALIVE]), assembler.marker)
        except pgoutput.MalformedMessage as error:
            raise DatabaseFailed(server_name(self.dsn), "decoding the change stream", str(error)) from error
        self.bytes += sum(map(len, frames))
        if assembler.count >= BATCH_EVENTS or self.bytes >= BATCH_BYTES:
            self.flush_at = 0.0

    def _committed(self, ends: Sequence[int], marker: bool) -> None:
        news = [end for end in ends if end > self.durable]
        if not news:
            return
        self.whole = news[-1]
        self.result.transactions += len(news)
        if marker:
            self.flush_at = 0.0
        elif self.flush_at == float("inf"):
            self.flush_at = time.monotonic() + BATCH_SECONDS

    def _flush(self, assembler: Assembler) -> None:
        """Make everything so far durable: the whole transactions, and what there is of the next one."""
        self.bytes, self.flush_at = 0, float("inf")
        batch = pa.concat_tables([SCHEMA.empty_table(), *assembler.taken()])
        if not len(batch) and self.whole <= self.durable:
            return
        self.spool.append(batch, self.whole)
        self.result.events += len(batch)
        self.result.appends += 1
        self.durable = self.result.end_lsn = self.whole
        if self.result.appends % COMPACT_EVERY == 0:
            self.spool.compact()
        self.ask_at = 0.0

    def _ended(self) -> bool:
        if self.stop.is_set():
            return True
        if time.monotonic() < self.ask_at:
            return False
        answer = self.until()
        self.ask_at = time.monotonic() + UNTIL_SECONDS
        return answer

    def _watch(self, connection: Connection) -> None:
        """Raise the alarm while the server still keeps what the slot needs, and where a table lost or got a partition."""
        for stopped in self.roots.look(connection):
            log.warning("%s", stopped)
        if alarm := slot_alarm(connection, self.stream.slot):
            log.warning("%s", alarm)
        self.watch_at = time.monotonic() + WATCH_SECONDS

    def _stay_in_touch(self, replication: Replication, assembler: Assembler) -> None:
        replication.check_alive()
        if time.monotonic() >= self.watch_at:
            with closing(connect(self.dsn, application_name(self.spec.name, "capture"))) as connection:
                self._watch(connection)
        idle = assembler.open is None and self.whole == self.durable
        if idle and replication.received - self.durable >= IDLE_STEP:
            # all that committed below has been sent, and whatever commits later lies above
            self.whole = replication.received
            self._flush(assembler)
        replication.answer(acknowledged(self.durable, replication.received), ping=True)
        self.answer_at = time.monotonic() + self.answer_every


def main(arguments: Sequence[str] | None = None) -> int:
    """Run capture from a command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="capture.py", description="Bring the source's changes into the spool.")
    parser.add_argument("spec", metavar="SPEC", help="the migration's TOML file")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        result = capture(load(parser.parse_args(arguments).spec))
    except ChangeoverError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 130 if result.interrupted else 0


if __name__ == "__main__":
    from changeover.jobs.capture import main as entry  # the same module object as everybody else's

    sys.exit(entry())
