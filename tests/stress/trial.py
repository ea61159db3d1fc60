"""One trial: everybody at once on one gated table, in any order, and the judge.

Each event of the source is offered at least once, in batches and alone, some twice, in an order of its own; direct writes of the
same rows are late, early or never there. Beside them a loader brings the snapshot's images, the table is closed, TRUNCATEs are
offered, and row versions are collected up to the position below which everything was offered. Whatever the order, every key must
end with the row that the source ended with.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import psycopg

from changeover.errors import DatabaseFailed, RowRefused
from changeover.jobs.apply import floors
from changeover.position import Version, format_lsn
from changeover.session import Connection
from changeover.stores.postgres import batches
from tests.stress.field import GATED, NAME, SHARE, STATEMENT, TABLE, WRITERS, Field, hesitate
from tests.stress.source import L0, Source, Write

KEYS, TRANSACTIONS = (12, 40, 80), 50
"""Few keys meet again and again; of many, most are written once, so that nothing heals what went wrong."""

IMAGES_PER_CHUNK = 12
BEFORE_COMMIT = ((SHARE, STATEMENT), (SHARE, STATEMENT), (0.5, 0.1))
"""How many of a writer's transactions wait before they commit, and seconds at most; in a third of the trials longer than a load."""

RETRIED = (psycopg.errors.DeadlockDetected,)
FUNCTION = f'SELECT changeover."gate_public.{NAME}"(%s, %s, %s, %s, ROW(%s, %s)::{NAME})'.encode()

Offer = tuple[Version, Write]
Task = Callable[[Connection], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Ended:
    """How a trial ended: gated writes offered, row versions collected, and what is wrong with each wrong key."""

    writes: int
    collected: int
    wrong: Sequence[str]


@dataclass
class Trial:
    """One run over a field; `chance` decides what is done, the machine decides when."""

    place: Field
    chance: random.Random
    source: Source = field(init=False)
    closed: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    pending: dict[Version, int] = field(default_factory=dict)
    writes: int = 0
    collected: int = 0
    pause: tuple[float, float] = (0.0, 0.0)

    def run(self) -> Ended:
        """Let everybody work to the end, then judge."""
        self.source = Source.run(self.chance, self.chance.choice(KEYS), TRANSACTIONS, self.chance.choice((0, 1, 1, 2)))
        self.pause = self.chance.choice(BEFORE_COMMIT)
        self.place.reset()
        tasks, late = self._tasks()
        with ThreadPoolExecutor(WRITERS + 3) as pool:
            work: list[Callable[[], None]] = [partial(self._truncate, tasks), self._load]
            work += [partial(self._write, writer, tasks) for writer in self.place.writers]
            done = [pool.submit(self._guarded, one) for one in work]
            collecting = pool.submit(self._guarded, self._collect)
            try:
                wait(done)
            finally:
                self.over.set()
            failures = _failures([*done, collecting])
        if not failures:
            self._collect_once()
            for task in late:  # what comes when nobody expects it any more
                task(self.place.writers[0])
        return Ended(self.writes, self.collected, failures or self._wrong())

    # -- what is offered

    def _tasks(self) -> tuple[list[Task], list[Task]]:
        """Return what the writers share, in an order that is the log's in the large alone, and what comes at the very end."""
        # what may come when nobody has announced it: repetitions, direct writes late or early, and those from before the snapshot
        loose = [(write.direct, write) for write in self.source.writes if self.chance.random() < 0.6]
        loose += [(write.event, write) for write in self.source.writes if self.chance.random() < 0.2]
        loose += [(write.direct, write) for write in self.source.older if self.chance.random() < 0.3]
        self.chance.shuffle(loose)
        late, loose = loose[: len(loose) // 3], loose[len(loose) // 3 :]
        tasks = [(offer[0].lsn, partial(self._offer_one, [offer])) for offer in loose]
        for group in self._groups([(write.event, write) for write in self.source.writes]):
            for version, _ in group:
                self.pending[version] = self.pending.get(version, 0) + 1
            alone = len(group) == 1 and self.chance.random() < 0.6
            tasks.append((group[0][0].lsn, partial(self._offer_one if alone else self._offer_batch, group)))
        self.pending |= dict.fromkeys(self.source.truncates, 1)
        spread = (self.source.lsn - L0) / 4
        tasks.sort(key=lambda task: task[0] + self.chance.uniform(-spread, spread))
        return [task for _, task in tasks], [partial(self._offer_one, [offer]) for offer in late]

    def _groups(self, offers: Sequence[Offer]) -> list[list[Offer]]:
        """Cut the events into batches."""
        cut, place = [], 0
        while place < len(offers):
            size = self.chance.choice((1, 1, 2, 5))
            cut.append([*offers[place : place + size]])
            place += size
        return cut

    def _offer_one(self, group: list[Offer], session: Connection) -> None:
        """Offer one row as an application does."""
        [(version, write)] = group
        parameters = [version.epoch, format_lsn(version.lsn), version.ordinal, write.note is None, write.key, write.note]
        _again(session, lambda: session.execute(FUNCTION, parameters), self.pause)
        self._offered(group)

    def _offer_batch(self, group: list[Offer], session: Connection) -> None:
        """Offer a batch as a task of replay does: the last change of each key."""
        last = {write.key: (version, write) for version, write in group}

        def offer() -> None:
            with session.cursor() as cursor:
                batches.prepare_batch(cursor, GATED, versions=True)
                cursor.executemany(
                    "INSERT INTO pg_temp.changeover_batch VALUES (%s, %s, %s, %s, %s, %s)",
                    [(v.epoch, format_lsn(v.lsn), v.ordinal, w.note is None, w.key, w.note) for v, w in last.values()],
                )
                batches.apply_batch(cursor, GATED)

        _again(session, offer, self.pause)
        self._offered(group)

    def _offered(self, group: Sequence[Offer]) -> None:
        with self.lock:
            self.writes += len(group)
            for version, write in group:
                if version == write.event and version in self.pending:
                    del self.pending[version]

    # -- who works

    def _guarded(self, work: Callable[[], None]) -> None:
        """Do one's part; whoever can't, ends the trial for those who would wait for him."""
        try:
            work()
        except BaseException:
            self.over.set()
            raise

    def _write(self, session: Connection, tasks: list[Task]) -> None:
        while True:
            with self.lock:
                if not tasks:
                    return
                task = tasks.pop(0)
            task(session)

    def _load(self) -> None:
        """Load the images in chunks, then close the table."""
        images = [*self.source.images.items()]
        self.chance.shuffle(images)
        pause = self.chance.choice((0.005, 0.03, 0.12))
        for start in range(0, len(images), IMAGES_PER_CHUNK):
            time.sleep(random.random() * pause)
            self._load_chunk(images[start : start + IMAGES_PER_CHUNK])
        self._once(lambda: self.place.closer.close(TABLE))
        self.closed.set()

    def _load_chunk(self, images: list[tuple[int, str]]) -> None:
        """Load a chunk as a task of the backfill does, again after a deadlock."""
        session = self.place.loader

        def load() -> None:
            with session.cursor() as cursor:
                batches.prepare_batch(cursor, GATED, versions=False)
                cursor.executemany("INSERT INTO pg_temp.changeover_batch VALUES (%s, %s)", images)
                batches.load_batch(cursor, GATED)

        try:
            _again(session, load, (0.7, 0.05))
        except RowRefused:
            session.rollback()
            raise

    def _truncate(self, tasks: list[Task]) -> None:
        """Offer each TRUNCATE about when what stands beside it in the log is offered, or well before or after."""
        whole = len(tasks)
        for version in self.source.truncates:
            share = (version.lsn - L0) / (self.source.lsn - L0) + self.chance.uniform(-0.3, 0.3)
            while len(tasks) > whole * max(0.0, 1 - share) and not self.over.is_set():
                time.sleep(0.002)
            self._once(partial(self.place.truncater.truncate, TABLE, version))
            with self.lock:
                del self.pending[version]

    def _collect(self) -> None:
        while not self.over.is_set():
            self._collect_once()
            time.sleep(random.random() * 0.004)

    def _collect_once(self) -> None:
        applied = self._position()
        upto = floors.collection_bound(0, applied)
        if floors.collectable(self.closed.is_set(), applied, upto):
            self.collected += self._once(lambda: self.place.collector.collect(TABLE, upto, 0)).rows

    def _once(self, work: Callable[[], T]) -> T:
        """Do what the product does once, so that a deadlock fails the trial; one that a mutant made says nothing."""
        while True:
            try:
                return work()
            except DatabaseFailed as error:
                if not (self.place.mutated and isinstance(error.__cause__, psycopg.errors.DeadlockDetected)):
                    raise

    def _position(self) -> int:
        """Return the place below which everything was offered."""
        with self.lock:
            return min((version.lsn for version in self.pending), default=self.source.lsn + 1)

    # -- the judge

    def _wrong(self) -> list[str]:
        """Return what is wrong: rows that are not the source's, rows beside their tombstones, a floor that lets something pass."""
        found = self.place.rows()
        keys = sorted(found.keys() | self.source.rows.keys())
        wrong = [
            f"key {key} is {found.get(key)!r} and was last {self.source.rows.get(key)!r} in the source"
            for key in keys
            if found.get(key) != self.source.rows.get(key)
        ]
        wrong += [f"key {key} lives beside its tombstone" for key in self.place.ghosts()]
        row = self.place.admin.execute(FUNCTION, [*self.place.floor(), False, max(KEYS), "below the floor"]).fetchone()
        return wrong + (["the floor lets its own version pass"] if row is None or row[0] else [])


def _again(session: Connection, work: Callable[[], object], pause: tuple[float, float]) -> None:
    """Do a transaction, again after a deadlock."""
    while True:
        try:
            work()
            hesitate(*pause)
            session.commit()
            return
        except RETRIED:
            session.rollback()


def _failures(done: Sequence[Future[None]]) -> list[str]:
    """Wait, and return what stopped somebody: a load that meets a row that it can't explain; anything else is raised."""
    failures = []
    for one in done:
        with suppress(RowRefused):
            one.result()
            continue
        failures.append(f"the load stopped: {one.exception()}")
    return failures
