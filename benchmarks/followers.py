"""The parties of the catchup benchmark: capture and replay, and a subscription of PostgreSQL's own."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import NamedTuple

from psycopg import sql

from changeover.position import parse_lsn
from changeover.session import connect
from changeover.spark.launch import spark_session

APPLICATION = "changeover:benchmark:party"
SUBSCRIPTION = "benchmark_native"


class Backlog(NamedTuple):
    """The databases of source, product and subscriber, a folder, and the position behind the last change."""

    old: str
    new: str
    native: str
    folder: Path
    end: int


SPEC = """
name = "bench_catchup"
[source]
dsn = "env:BENCHMARK_OLD"
[target.new]
kind = "postgres"
dsn = "env:BENCHMARK_NEW"
[[table]]
source = "public.accounts"
target = "accounts_new"
key = ["id"]
[work]
path = "{folder}/work"
"""


FOR_EVER = 2**62


class Replay:
    """Capture in a process of its own, and replay in this one, which follows all the time, as a service does."""

    def __init__(self) -> None:
        self.spark = spark_session("benchmark-replay", cores=2, memory="2g")

    def set_up(self, job: Backlog) -> None:
        """Prepare, load, and start the process that captures when it is told to."""
        from changeover.jobs.apply.rounds import replay
        from changeover.jobs.load.copier import backfill
        from changeover.jobs.prepare import prepare
        from changeover.spec import load

        os.environ["BENCHMARK_OLD"], os.environ["BENCHMARK_NEW"] = job.old, job.new
        path = job.folder / "catchup.toml"
        path.write_text(SPEC.format(folder=job.folder), encoding="utf-8")
        self.spec = load(path)
        prepare(self.spec, self.spark)
        backfill(self.spec, self.spark)
        self.pipe, far = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self.service = context.Process(target=serve_capture, args=(str(path), far), name="benchmark-capture")
        self.service.start()
        self.ended = threading.Event()
        follow = {"follow": True, "stop": self.ended}
        self.follower = threading.Thread(target=replay, args=(self.spec, self.spark), kwargs=follow, name="benchmark-replay")
        self.follower.start()

    def copy(self, job: Backlog) -> None:
        """Capture and replay until the last change is applied."""
        from changeover.jobs.ledger.ledger import Ledger

        self.pipe.send(job.end)
        with Ledger.open(self.spec, "benchmark") as ledger:
            while any(load.applied < job.end for load in ledger.loads()):
                if not self.follower.is_alive():
                    raise RuntimeError("replay ended")
                time.sleep(0.02)
        self.pipe.recv()

    def start(self, job: Backlog) -> None:
        """Let capture follow from now on."""
        self.pipe.send(FOR_EVER)

    def stop(self, job: Backlog) -> None:
        """Bring in what there is up to a position, and let capture rest."""
        self.copy(job)
        self.pipe.recv()  # of what `start` began

    def tear_down(self, job: Backlog) -> None:
        """End both services and abort the migration."""
        from changeover.jobs.finalize import abort

        self.pipe.send(None)
        self.service.join()
        self.ended.set()
        self.follower.join()
        abort(self.spec)


def serve_capture(path: str, pipe: Pipe) -> None:
    """Capture up to each position that is sent (the service's process)."""
    from changeover.jobs.capture.service import capture
    from changeover.jobs.spool.table import spool_of
    from changeover.spec import load

    spec = load(path)
    spool = spool_of(spec)
    wanted = 0

    def reached() -> bool:
        return spool.end() >= wanted or pipe.poll()

    while (end := pipe.recv()) is not None:
        wanted = end
        capture(spec, until=reached)
        pipe.send(True)


class Native:
    """A publication, a slot and a subscription."""

    def set_up(self, job: Backlog) -> None:
        """Copy the table and make a subscription that rests."""
        from benchmarks.backlog import TABLE

        with connect(job.old, APPLICATION) as old, connect(job.native, APPLICATION) as new:
            new.execute(TABLE)
            old.execute("CREATE PUBLICATION benchmark_native FOR TABLE accounts")
            old.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [SUBSCRIPTION])
            with old.cursor().copy("COPY accounts TO STDOUT") as source, new.cursor().copy("COPY accounts FROM STDIN") as target:
                for block in source:
                    target.write(block)
            new.execute("VACUUM (ANALYZE, FREEZE) accounts")
            new.execute(
                sql.SQL(
                    "CREATE SUBSCRIPTION {name} CONNECTION {dsn} PUBLICATION benchmark_native"
                    " WITH (create_slot = false, slot_name = {name}, enabled = false, copy_data = false)"
                ).format(name=sql.Identifier(SUBSCRIPTION), dsn=sql.Literal(job.old))
            )

    def copy(self, job: Backlog) -> None:
        """Let the subscription run until its slot has confirmed the last change."""
        self.start(job)
        self.stop(job)

    def start(self, job: Backlog) -> None:
        """Let the subscription run."""
        with connect(job.native, APPLICATION) as new:
            new.execute(TURN.format(sql.Identifier(SUBSCRIPTION), sql.SQL("ENABLE")))

    def stop(self, job: Backlog) -> None:
        """Wait until the slot has confirmed a position, and let the subscription rest."""
        with connect(job.old, APPLICATION) as old, connect(job.native, APPLICATION) as new:
            while _confirmed(old.execute(CONFIRMED, [SUBSCRIPTION]).fetchone()) < job.end:
                time.sleep(0.02)
            new.execute(TURN.format(sql.Identifier(SUBSCRIPTION), sql.SQL("DISABLE")))

    def tear_down(self, job: Backlog) -> None:
        """Drop subscription, slot and publication."""
        with connect(job.old, APPLICATION) as old, connect(job.native, APPLICATION) as new:
            new.execute(sql.SQL("ALTER SUBSCRIPTION {} SET (slot_name = NONE)").format(sql.Identifier(SUBSCRIPTION)))
            new.execute(sql.SQL("DROP SUBSCRIPTION {}").format(sql.Identifier(SUBSCRIPTION)))
            old.execute("SELECT pg_drop_replication_slot(%s)", [SUBSCRIPTION])
            old.execute("DROP PUBLICATION benchmark_native")


FOLLOWERS = {"replay": Replay, "native": Native}

TURN = sql.SQL("ALTER SUBSCRIPTION {} {}")

CONFIRMED = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"


def _confirmed(row: tuple[object, ...] | None) -> int:
    return parse_lsn(str(row[0])) if row else 0
