"""The copy benchmark: one table, three cases, ours and the peers in turn on one server.

Every timed run starts with an empty target and a checkpoint, and ends with a look at what arrived: all parties'
PostgreSQL targets must hold the same rows, and their Delta tables the same number, or there is no result. Parties take
turns within each round, so that a slow minute of the machine meets all of them, and the median of the rounds counts.
"""

from __future__ import annotations

import secrets
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from deltalake import DeltaTable
from psycopg import sql

from benchmarks.follows import CASES, Case, create_source, fingerprint
from benchmarks.parties import APPLICATION, Job
from benchmarks.result import CaseResult, Result
from benchmarks.worker import PartyFailed, Worker
from changeover.embedded.binaries import find_binaries, wheel_binaries
from changeover.embedded.server import EmbeddedServer
from changeover.session import connect

WARM_UP_ROWS = 20_000
SETTINGS = {"max_wal_size": "8GB", "checkpoint_timeout": "1h"}
"""Checkpoints are asked for between the runs, so that none falls into one of them; fsync stays on."""


def measure(rows: int, repeat: int, names: Sequence[str] = ()) -> Result:
    """Run the cases (all unless named) on a server of our own; raises PartyFailed."""
    cases = [case for name, case in CASES.items() if not names or name in names]
    parties = ["ours", *dict.fromkeys(peer for case in cases for peer in case.peers)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="changeover-bench-")))
        folder.chmod(0o755)  # the server's own user must reach its folder
        server = stack.enter_context(server_at(folder / "server"))
        workers = [stack.enter_context(Worker(party)) for party in parties]
        warm, real = (_Field.make(server, folder, count) for count in (min(WARM_UP_ROWS, rows), rows))
        results = []
        for case in cases:
            warm.round(case, workers)
            rounds = [real.round(case, workers) for _ in range(repeat)]
            medians = {party: statistics.median(one[party] for one in rounds) for party in rounds[0]}
            results.append(CaseResult(case.name, medians.pop("ours"), medians))
        peaks = {worker.party: round(worker.peak / 2**20) for worker in workers}
    return Result("copy", rows, results, peaks)


@contextmanager
def server_at(root: Path) -> Iterator[EmbeddedServer]:
    """Run a server for as long as the context is open."""
    server = EmbeddedServer.start(root, settings=SETTINGS, bin_dir=find_binaries(wheel_binaries()))
    try:
        yield server
    finally:
        server.remove()


@dataclass(frozen=True)
class _Field:
    """Two databases, the old one filled, and a folder, on which parties take turns."""

    rows: int
    old: str
    new: str
    programs: Path
    folder: Path

    @classmethod
    def make(cls, server: EmbeddedServer, folder: Path, rows: int) -> Self:
        """Create the databases and fill the old one."""
        name = f"rows{rows}_{secrets.token_hex(3)}"
        old, new = server.create_database(f"old_{name}"), server.create_database(f"new_{name}")
        with connect(old, APPLICATION) as connection:
            create_source(connection, rows)
        return cls(rows, old, new, find_binaries(wheel_binaries()), folder)

    def round(self, case: Case, workers: Sequence[Worker]) -> dict[str, float]:
        """Let each of the case's parties copy once; return seconds by party."""
        seconds, found = {}, {}
        for worker in workers:
            if worker.party == "ours" or worker.party in case.peers:
                job = Job(case, self.old, self.new, self.programs, self.folder / worker.party)
                seconds[worker.party], found[worker.party] = self._turn(job, worker)
                print(f"{case.name} {self.rows} {worker.party} {seconds[worker.party]:.2f} s", file=sys.stderr, flush=True)
        if len(set(found.values())) != 1:
            raise PartyFailed(f"{case.name}: the parties copied different rows: {found}")
        return seconds

    def _turn(self, job: Job, worker: Worker) -> tuple[float, str]:
        job.folder.mkdir(exist_ok=True)
        with connect(self.new, APPLICATION) as new:
            if job.case.table:
                new.execute(job.case.table.encode())
            worker.call("set_up", job)
            new.execute("CHECKPOINT")
            seconds = worker.measured(job)
            found = fingerprint(new, job.case) if job.case.table else f"{DeltaTable(job.delta).count()} rows"
            worker.call("tear_down", job)
            if job.case.table:
                new.execute(sql.SQL("DROP TABLE {}").format(sql.Identifier(job.case.target)))
        return seconds, found
