"""Capture by a trigger log: tick after tick brought into the spool, each once and whole, with the guarantees of the slot.

A tick is on record in the source, with its snapshot, before its first event is spooled. The spool's
end names the last one that is durable, and only what that one shows is taken out of the log. So a
kill at any point loses nothing and repeats nothing: the next run reads the same tick again and
leaves out what the spool holds of it. A tick of any size passes through by parts. A table that no
longer looks as it was prepared gets an event that says so before the tick's changes. Its own
changes are left out, while the others go on. Runs on one machine, without Spark.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import psycopg
from psycopg import pq, sql
from psycopg.adapt import Transformer

from changeover.errors import FolderFailed, RowRefused, ServerUnavailable, SourceChanged
from changeover.jobs.capture.feed import Feed
from changeover.jobs.decode import pgoutput
from changeover.jobs.decode.relations import Shape, not_utf8
from changeover.jobs.decode.transactions import ADDED_ANEW, added_anew, additions, difference
from changeover.jobs.guarantee.assumptions import Moment
from changeover.jobs.ledger.records import SourceColumn
from changeover.jobs.source import ticks, triggerlog
from changeover.jobs.source.ticks import Row, TableState, Tick
from changeover.jobs.source.triggerlog import Log
from changeover.jobs.spool import writer
from changeover.jobs.spool.events import ADDED, RELATION, Event, Image
from changeover.jobs.spool.writer import CaptureResult, Intake, Patience
from changeover.names import joined, qualified
from changeover.position import format_lsn
from changeover.session import Connection, application_name, speaking_to
from changeover.spec import Spec

POLL_SECONDS = 0.1
BATCH_EVENTS = 20_000

RECORD = 2249

log = logging.getLogger(__name__)


class LogRun:
    """One run of capture: session after session, and tick after tick in each."""

    def __init__(
        self, spec: Spec, feed: Feed, stop: threading.Event, until: Callable[[], bool], patience: float, result: CaptureResult
    ) -> None:
        self.spec, self.feed, self.stream, self.stop, self.until = spec, feed, feed.stream, stop, until
        self.patience = Patience(patience, stop)
        self.result = result
        self.log = Log(spec.name)
        self.dsn, self.spool = feed.dsn, feed.spool
        self.intake = Intake(feed.spool, result, self.patience)
        names = [table.source_relation for table in spec.tables]
        self.sources = [Source(name, feed.tables[name]) for name in names]
        self.watch_at = 0.0
        self.asked = False
        """Whether somebody waits for a position that only another tick passes (`triggerlog.ask_for_a_tick`)."""

    def run(self) -> None:
        """Follow the log until the run is ended, over as many sessions as it takes."""
        while not self.stop.is_set():
            try:
                with self._session() as connection:
                    self._follow(connection)
                return
            except (ServerUnavailable, FolderFailed) as error:
                self.patience.wait(error)

    @contextmanager
    def _session(self) -> Iterator[Connection]:
        """Prove that this is the prepared log, whole from the spool's end on, and take out of it what a killed run left."""
        self.intake.reopen()
        with ticks.log_session(self.dsn, application_name(self.spec.name, "capture")) as connection:
            self._ask(Moment.CONNECT, connection)
            connection.add_notify_handler(self._hear)
            with speaking_to(self.dsn, "checking the trigger log"):
                connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self.log.channel)))
                ticks.require(connection, self.stream, self.log, self._durable())
                ticks.prune(connection, self.log, ticks.ticks(connection, self.log, self._durable())[0])
            self.result.connections += 1
            log.info("following the trigger log %s from %s", self.log, format_lsn(self._durable()))
            yield connection

    def _hear(self, notice: psycopg.Notify) -> None:
        self.asked = True

    def _durable(self) -> int:
        return max(self.intake.end(), self.stream.l0)

    def _follow(self, connection: Connection) -> None:
        with speaking_to(self.dsn, "reading the trigger log"):
            try:
                self._ticks(connection)
            except psycopg.errors.UndefinedTable as error:
                raise SourceChanged("trigger log", str(self.log), "missing") from error

    def _ticks(self, connection: Connection) -> None:
        last = ticks.ticks(connection, self.log, self._durable())[0]
        while True:
            following = ticks.ticks(connection, self.log, last.end + 1)
            self.patience.answered()
            if following:
                self._spool(connection, last, following[0])
                ticks.prune(connection, self.log, following[0], last)
                last = following[0]
            self._watch(connection)
            if self.stop.is_set() or self.until():
                return
            if following:
                continue
            some, position = ticks.waiting(connection, self.log, last)
            if some or self.asked or position - last.end >= writer.IDLE_STEP:
                self.asked = False  # what asked before the tick is answered by it
                ticks.cut(connection, self.log)
            else:
                self.stop.wait(POLL_SECONDS)

    def _spool(self, connection: Connection, last: Tick, tick: Tick) -> None:
        """Bring a tick into the spool, by parts where it is large; only the last of them moves the spool's end."""
        batch: list[Event] = []
        size = 0
        xids = set()
        held = self.spool.held()
        with ticks.reading(connection, self.log, last, tick) as rows:
            for event, length in self._events(rows, last, tick):
                if (event.lsn, event.ordinal) > held:
                    batch.append(event)
                    size += length
                    xids.add(event.xid)
                if len(batch) >= BATCH_EVENTS or size >= writer.BATCH_BYTES:
                    self.intake.append(batch, last.end)
                    batch, size = [], 0
        self.intake.append(batch, tick.end)
        self.result.transactions += len(xids)

    def _events(self, rows: Iterable[Row], last: Tick, tick: Tick) -> Iterator[tuple[Event, int]]:
        """Yield a tick's events, each with the length of its texts: how tables have changed, then the log's rows in order."""
        at = int(tick.at.timestamp() * 1_000_000)
        for source, state in zip(self.sources, tick.tables, strict=True):
            if alteration := source.look(state):
                op, note = alteration
                yield Event(source.name, last.end, -1, op, None, None, (), 0, at, note), 0
        for index, row in enumerate(rows):
            table = self.sources[row.tab] if row.tab is not None else None
            if table is not None and table.stopped:
                continue
            length = len(row.image or b"") + len(row.gone or b"")
            try:
                name, whole, key = ("", None, None) if table is None else (table.name, *table.images(row.image, row.gone))
            except UnicodeDecodeError:
                if table is None:
                    raise
                yield table.not_text(last.end, 2 * index, row.xid, at), length
                continue
            yield Event(name, last.end, 2 * index, row.op, whole, key, (), row.xid, at, row.note), length

    def _watch(self, connection: Connection) -> None:
        """Ask whether all is as it was, and raise the alarm when the log grows beyond measure."""
        if time.monotonic() >= self.watch_at:
            self.watch_at = time.monotonic() + writer.WATCH_SECONDS
            self._ask(Moment.WATCH, connection)
            if alarm := triggerlog.state(connection, self.spec.name)[2]:
                log.warning("%s", alarm)

    def _ask(self, moment: Moment, connection: Connection) -> None:
        for stopped in self.feed.ask(moment, connection):
            log.warning("%s", stopped)


class Source:
    """How the log's rows of one table become a spool event's row and key, and whether it still looks as it was prepared."""

    def __init__(self, name: str, prepared: Sequence[SourceColumn]) -> None:
        self.name, self.prepared = name, prepared
        self.stopped = False
        schema, table = qualified(name)
        columns = tuple(pgoutput.Column(c.name, c.oid, -1, c.key) for c in prepared)
        self.shape = Shape(name, pgoutput.Relation(0, schema, table, "d", columns), prepared)
        self.key = tuple(self.shape.columns[index] for index in self.shape.keys)
        self._load = Transformer().get_loader(RECORD, pq.Format.TEXT).load
        self._last_note: str | None = None

    def look(self, now: TableState) -> tuple[str, str] | None:
        """Return (kind of event, what is to be told) where the table looks otherwise than when it was last told."""
        problem, added = self._compared(now)
        self.stopped = bool(problem)
        note = "; ".join(filter(None, (problem, added)))
        if not note or note == self._last_note:
            return None
        self._last_note = note
        log.warning("%s: %s", self.name, note)
        return (RELATION if problem else ADDED), note

    def _compared(self, now: TableState) -> tuple[str, str]:
        if now.relation is None:
            return "the table was dropped", ""
        name = joined(now.relation.schema, now.relation.name)
        problems = [] if name == self.name else [f"the table was renamed to {name}"]
        if not now.enabled:
            problems.append("its trigger of the log was disabled or dropped, so that changes are missing")
        different = difference(now.relation, self.prepared, frozenset())
        names = [column.name for column in now.relation.columns[: len(self.prepared)]]
        if not different and (names != [column.name for column in self.prepared] or added_anew(self.prepared, now.numbers)):
            different = ADDED_ANEW
        return "; ".join([*problems, *filter(None, [different])]), additions(now.relation, self.prepared)

    def not_text(self, lsn: int, ordinal: int, xid: int, at: int) -> Event:
        """Return that a row came which is no text, in its place; nothing that follows it counts."""
        self.stopped = True
        note = not_utf8(())
        log.warning("%s: %s", self.name, note)
        return Event(self.name, lsn, ordinal, RELATION, None, None, (), xid, at, note)

    def images(self, image: bytes | None, gone: bytes | None) -> tuple[Image | None, Image | None]:
        """Return the new row and the old key; a column that was added since prepare is left out."""
        shape = self.shape
        row = (shape.columns, self._values(image)) if image is not None else None
        if gone is None:
            return row, None
        values = self._values(gone)
        return row, (self.key, tuple(values[index] for index in shape.keys))

    def _values(self, image: bytes) -> tuple[str | None, ...]:
        """Return a composite text's values as the slot's events have them, of which arrays are JSON."""
        values: list[str | None] = list(self._load(image.decode().encode()))
        for column in self.shape.arrays:
            if column < len(values) and (array := values[column]) is not None:
                values[column] = self.shape.as_json(column, array)
        if len(values) < len(self.prepared):
            raise RowRefused(
                self.name, "a row of the trigger log", f"it has {len(values)} columns, {len(self.prepared)} were prepared"
            )
        return tuple(values[: len(self.prepared)])
