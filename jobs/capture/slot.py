"""Capture by a slot: connection after connection, each proved to be the prepared stream, read in rounds or streamed.

The slot is told to forget only what the spool holds durably, and every connection goes on from the
spool's end. So a kill at any point loses nothing and repeats nothing. A connection that finds the
slot far behind catches up in rounds, until it is near; the next one proves all anew and streams. A
transaction that outgrows one batch goes in by parts, so memory does not grow with it. One that is
cut off there comes again, and what the spool holds of it is left out. Runs on one machine, without
Spark.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager

import psycopg

from changeover import failpoints
from changeover.errors import DatabaseFailed, FolderFailed, LeaseHeld, ServerUnavailable
from changeover.jobs.capture import catchup
from changeover.jobs.capture.catchup import CatchupReader
from changeover.jobs.capture.feed import Feed
from changeover.jobs.decode import pgoutput
from changeover.jobs.decode.columns import Wire
from changeover.jobs.decode.transactions import Assembler
from changeover.jobs.guarantee.assumptions import Moment
from changeover.jobs.ledger.chunks import acknowledged
from changeover.jobs.source.replication import check_slot, column_numbers, generated_columns, slot_alarm
from changeover.jobs.source.stream import FEEDBACK_SECONDS, Replication, answer_interval
from changeover.jobs.spool import writer
from changeover.jobs.spool.writer import CaptureResult, Intake, Patience
from changeover.position import format_lsn
from changeover.session import Connection, application_name, connect, has_no_encoding, server_name, speaking_to
from changeover.spec import Spec

TAKE_BYTES = 1 << 20
"""How much of the stream is taken at once: each message then costs little, and the server is answered in time."""

GATHER_SECONDS = 0.02
"""How long the frames of a slow stream gather, beside the BATCH_SECONDS after which they are durable."""

UNTIL_SECONDS = 0.2
log = logging.getLogger(__name__)

Generated = Mapping[str, frozenset[str]]


class SlotRun:
    """One run of capture: connection after connection, and what each takes."""

    def __init__(
        self, spec: Spec, feed: Feed, stop: threading.Event, until: Callable[[], bool], patience: float, result: CaptureResult
    ) -> None:
        self.spec, self.feed, self.stream, self.tables, self.roots = spec, feed, feed.stream, feed.tables, feed.roots
        self.stop, self.until, self.patience = stop, until, Patience(patience, stop)
        self.ask_at, self.finished = 0.0, False
        self.dsn, self.result = feed.dsn, result
        self.intake = Intake(feed.spool, result, self.patience)
        self.answer_at = self.watch_at = float("inf")
        self.answer_every = FEEDBACK_SECONDS
        self.in_rounds = True

    def run(self) -> None:
        """Follow the stream until the run is ended, over as many connections as it takes."""
        while not self._ended():
            try:
                with self._proved() as (replication, generated, far):
                    if far is None:
                        self._stream(replication, generated)
                    else:  # after which all is proved anew
                        self._catch_up(far, generated)
            except (ServerUnavailable, LeaseHeld, FolderFailed) as error:
                self.patience.wait(error)
            except DatabaseFailed:
                self._require_unchanged()  # before PostgreSQL 18 decoding ends where the publication is gone
                raise

    def _require_unchanged(self) -> None:
        """Raise what is wrong with the stream, which a refusal of the server may come from."""
        with closing(connect(self.dsn, application_name(self.spec.name, "capture"))) as connection:
            self._watch(connection)

    @contextmanager
    def _proved(self) -> Iterator[tuple[Replication, Generated, int | None]]:
        """Prove that this is the prepared stream; yield a connection for it, the columns left out, and where a far round ends."""
        name = application_name(self.spec.name, "capture")
        self.intake.reopen()
        with closing(connect(self.dsn, name)) as connection, speaking_to(self.dsn, "checking the change stream"):
            self._watch(connection, Moment.CONNECT)
            check_slot(connection, self.stream, self._position())
            self.answer_every = answer_interval(connection)
            generated = generated_columns(connection, self.stream.publication)
            in_rounds = self.in_rounds and not has_no_encoding(connection)  # whose bytes the stream alone brings as they are
            far = catchup.round_end(connection, self.stream.slot, self._position(), catchup.FAR_BYTES) if in_rounds else None
        with closing(connect(self.dsn, name, replication=True)) as connection:
            replication = Replication(connection, self.dsn)
            with speaking_to(self.dsn, "starting the change stream"):
                replication.identify(self.stream)
            yield replication, generated, far

    def _position(self) -> int:
        """Return where the stream goes on: where the spool ends, or where the stream began."""
        return max(self.intake.durable, self.stream.l0)

    def _assembler(self, generated: Generated) -> Assembler:
        """Return what reads one decoding of the log, which describes the tables anew; it leaves out what the spool holds."""
        return Assembler(self.tables, generated, self.intake.spool.held(), roots=self.roots, numbers=self._numbers)

    def _numbers(self) -> Mapping[str, Mapping[str, int]]:
        with closing(connect(self.dsn, application_name(self.spec.name, "capture"))) as connection:
            return column_numbers(connection, self.tables)

    def _catch_up(self, upto: int | None, generated: Generated) -> None:
        """Bring what is far behind into the spool, round by round, the first one up to `upto`, until the stream may take over.

        Where the server refuses, for whatever reason, the stream brings it: that says what is wrong with the slot, if anything is.
        """
        log.info("catching up of slot %s from %s", self.stream.slot, format_lsn(self.intake.durable))
        with speaking_to(self.dsn, "catching up"), catchup.reading(self.dsn, self.spec.name, self.stream) as reader:
            try:
                while upto is not None:
                    self._round(reader, upto, generated)
                    if self._ended():
                        break  # the round may be broken off
                    upto = catchup.round_end(reader.connection, self.stream.slot, self._position(), catchup.NEAR_BYTES)
            except psycopg.Error as error:
                if not catchup.refused(error):
                    raise
                log.warning("the slot can't be caught up with in rounds, the stream brings it: %s", str(error).splitlines()[0])
                self.in_rounds = False

    def _round(self, reader: CatchupReader, upto: int, generated: Generated) -> None:
        """Bring a round into the spool, and then let the server forget it; one that is broken off is read again."""
        assembler = self._assembler(generated)
        with self._decoding(), closing(reader.read(upto)) as parts:
            for messages in parts:
                if messages is not None:
                    self._took(assembler, messages)
                    failpoints.reach("catchup-read", format_lsn(self.intake.durable))
                if self.intake.due:
                    self._flush(assembler)
                if self.stop.is_set():  # else to its end, which is near, so that it is acknowledged and never read again
                    return
                self._watch_now_and_then(reader)
            if assembler.open is not None:
                raise pgoutput.MalformedMessage("a round of catch-up that ends inside a transaction")
        self.intake.passed(upto)
        self._flush(assembler)
        self.patience.answered()
        failpoints.reach("catchup-durable", format_lsn(self.intake.durable))
        reader.acknowledge(acknowledged(self.intake.durable, upto))
        failpoints.reach("catchup-acknowledged", format_lsn(self.intake.durable))

    def _stream(self, replication: Replication, generated: Generated) -> None:
        """Follow the stream from where the spool ends until the run is ended."""
        self.intake.reopen()
        assembler = self._assembler(generated)
        with speaking_to(self.dsn, "starting the change stream"):
            replication.start(self.stream, self._position())
        self.result.connections += 1
        self.answer_at, self.in_rounds = 0.0, True
        log.info("following slot %s from %s", self.stream.slot, format_lsn(self.intake.durable))
        last = False
        while not last:
            with speaking_to(self.dsn, "reading the change stream"):
                self._take(replication, assembler)
                last = self._ended()
                if last or self.intake.due:
                    self._flush(assembler)
                    replication.answer(acknowledged(self.intake.durable, replication.received))
                if time.monotonic() >= self.answer_at:
                    self._stay_in_touch(replication, assembler)

    def _take(self, replication: Replication, assembler: Assembler) -> None:
        """Take the frames that are there, as far as one batch goes."""
        frames = replication.frames(0.05, min(TAKE_BYTES, writer.BATCH_BYTES), gather_seconds=GATHER_SECONDS)
        if not frames:
            return
        self.patience.answered()
        with self._decoding():
            for frame in [frame for frame in frames if frame[0] == pgoutput.KEEPALIVE]:
                alive = pgoutput.keepalive(frame)
                replication.received = max(replication.received, alive.wal_end)
                if alive.reply:
                    self.answer_at = 0.0
            messages = [frame for frame in frames if frame[0] != pgoutput.KEEPALIVE]
            if messages:
                self._took(assembler, Wire(messages))

    def _took(self, assembler: Assembler, messages: Wire) -> None:
        """Have messages read, and see whether a batch is full."""
        self.patience.answered()
        self.intake.committed(assembler.read(messages), marker=assembler.marker)
        self.intake.took(len(messages.bytes), assembler.count)

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        try:
            yield
        except pgoutput.MalformedMessage as error:
            raise DatabaseFailed(server_name(self.dsn), "decoding the change stream", str(error)) from error

    def _flush(self, assembler: Assembler) -> None:
        if self.intake.flush(assembler.taken()):
            self.ask_at = 0.0

    def _ended(self) -> bool:
        if self.stop.is_set():
            self.finished = True
        if not self.finished and time.monotonic() >= self.ask_at:
            self.finished = self.until()
            self.ask_at = time.monotonic() + UNTIL_SECONDS
        return self.finished

    def _watch(self, connection: Connection, moment: Moment = Moment.WATCH) -> None:
        """Ask whether all is as it was, and raise the alarm while the server still keeps what the slot needs."""
        for stopped in self.feed.ask(moment, connection):
            log.warning("%s", stopped)
        if alarm := slot_alarm(connection, self.stream.slot):
            log.warning("%s", alarm)
        self.watch_at = time.monotonic() + writer.WATCH_SECONDS

    def _watch_now_and_then(self, reader: CatchupReader | None = None) -> None:
        if time.monotonic() >= self.watch_at:
            with closing(connect(self.dsn, application_name(self.spec.name, "capture"))) as connection:
                self._watch(connection)
                if reader is not None:
                    reader.check_alive(connection)

    def _stay_in_touch(self, replication: Replication, assembler: Assembler) -> None:
        replication.check_alive()
        self._watch_now_and_then()
        idle = assembler.open is None and self.intake.whole == self.intake.durable
        if idle and replication.received - self.intake.durable >= writer.IDLE_STEP:
            self.intake.passed(replication.received)
            self._flush(assembler)
        replication.answer(acknowledged(self.intake.durable, replication.received), ping=True)
        self.answer_at = time.monotonic() + self.answer_every
