"""The writer benchmark: what the dual write costs an application, at rest and while a backfill loads the same table.

An application of one process writes at a fixed rate: its own transaction in the old store, position and all, and then the row into
the new one. Every other row goes there through the gate, as the router's mirror sends it, and the rest by a plain upsert; only that
last statement is timed. Its rows are none of the snapshot's, because a plain upsert of such a row would stop the load. Every write
must have arrived at the end, or there is no result.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from psycopg import sql

from benchmarks.copy_case import server_at
from benchmarks.follows import CASES, create_source
from benchmarks.parties import APPLICATION, Job
from benchmarks.result import CaseResult, Result
from benchmarks.worker import PartyFailed, Worker
from benchmarks.writer import NEW_ROWS, Timed, Writing
from changeover.embedded.binaries import find_binaries, wheel_binaries
from changeover.session import Connection, connect

CASE = CASES["identity"]
WARM_UP_ROWS = 20_000
WARM_UP_SECONDS = 2.0
PERCENTILES = {"p50": 0.5, "p99": 0.99}

Phases = Mapping[str, Timed]


def measure(rows: int, repeat: int, seconds: float) -> Result:
    """Run rounds of a backfill with the writer beside it, then so many seconds of the writer alone; raises PartyFailed."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="changeover-bench-")))
        folder.chmod(0o755)  # the server's own user must reach its folder
        server = stack.enter_context(server_at(folder / "server"))
        worker = stack.enter_context(Worker("ours"))
        rounds = []
        plan = {"warm": (min(WARM_UP_ROWS, rows), 1, min(WARM_UP_SECONDS, seconds)), "timed": (rows, repeat, seconds)}
        for name, (count, times, length) in plan.items():
            old_dsn, new_dsn = server.create_database(f"old_{name}"), server.create_database(f"new_{name}")
            job = Job(CASE, old_dsn, new_dsn, find_binaries(wheel_binaries()), folder)
            with connect(job.old, APPLICATION) as old, connect(job.new, APPLICATION) as new:
                create_source(old, count)
                rounds = [_round(job, old, new, worker, length) for _ in range(times)]
        found = {phase: [one[phase] for one in rounds] for phase in rounds[0]}
        cases = [
            CaseResult(f"{phase} {name}", _percentile([t.gated for t in timed], place),
                       {"upsert": _percentile([t.plain for t in timed], place)})
            for phase, timed in found.items() for name, place in PERCENTILES.items()
        ]  # fmt: skip
        return Result("writer", rows, cases, {"ours": round(worker.peak / 2**20)})


def _round(job: Job, old: Connection, new: Connection, worker: Worker, seconds: float) -> Phases:
    """Load the table beside the writer, and let the writer go on alone; then all of it is undone."""
    new.execute(CASE.table.encode())
    worker.call("set_up", job)
    for connection in (old, new):
        connection.execute("CHECKPOINT")
    with ThreadPoolExecutor(1) as pool, Writing(job.old, job.new, CASE.target) as writing:
        loading = pool.submit(worker.measured, job)
        beside = writing.until(loading.done)
        print(f"backfill {loading.result():.2f} s, {beside}", file=sys.stderr, flush=True)
        new.execute("CHECKPOINT")
        end = time.monotonic() + seconds
        alone = writing.until(lambda: time.monotonic() > end)
        print(f"at rest, {alone}", file=sys.stderr, flush=True)
    _require_all(old, new)
    worker.call("tear_down", job)
    new.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier(CASE.target)))
    old.execute("DELETE FROM follows WHERE to_channel >= %s", [NEW_ROWS])
    return {"backfill": beside, "rest": alone}


def _require_all(old: Connection, new: Connection) -> None:
    """Both stores hold the same number of rows, and the same ones of the writer's."""
    ours = sql.SQL("SELECT (SELECT count(*) FROM {0}), sum(hashtextextended(t::text, 0)) FROM {0} AS t WHERE to_channel >= {1}")
    found = [
        connection.execute(ours.format(sql.Identifier(table), sql.Literal(NEW_ROWS))).fetchone()
        for connection, table in ((old, "follows"), (new, CASE.target))
    ]
    if found[0] != found[1]:
        raise PartyFailed(f"writer: the stores hold different rows: {found}")


def _percentile(samples: Sequence[Sequence[float]], place: float) -> float:
    """Return a percentile of all rounds' samples together."""
    together = sorted(one for samples_of_round in samples for one in samples_of_round)
    return together[min(len(together) - 1, int(place * len(together)))]
