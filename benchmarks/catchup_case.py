"""The catchup benchmark: one backlog in one server's log, applied by the product and by PostgreSQL's own logical replication.

Both parties follow the same table by a slot of their own and have applied everything before the backlog. A party's time is from the
moment when it may begin to read the log until its last change is committed in its own target. In each round the parties change
turns, and at the end of each round both targets must hold what the source holds, or there is no result.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks import backlog
from benchmarks.copy_case import server_at
from benchmarks.followers import Backlog
from benchmarks.parties import APPLICATION
from benchmarks.result import CaseResult, Result
from benchmarks.worker import PartyFailed, Worker
from changeover.session import Connection, connect

PARTIES = {"ours": "replay", "native": "native"}
"""The name in the result -> the party."""

WARM_UP = 2_000


@contextmanager
def accounts() -> Iterator[tuple[Backlog, Connection]]:
    """Make a server with the table in its old database, and empty ones for the parties; yield them and a session with the table."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="changeover-bench-")))
        folder.chmod(0o755)  # the server's own user must reach its folder
        server = stack.enter_context(server_at(folder / "server"))
        job = Backlog(server.create_database("old"), server.create_database("new"), server.create_database("native"), folder, 0)
        old = stack.enter_context(connect(job.old, APPLICATION))
        backlog.create(old)
        yield job, old


def measure(changes: int, repeat: int, names: Sequence[str] = ()) -> Result:
    """Run the cases (all unless named) on a server of our own; raises PartyFailed."""
    with ExitStack() as stack:
        job, old = stack.enter_context(accounts())
        workers = {name: stack.enter_context(Worker(party)) for name, party in PARTIES.items()}
        for worker in workers.values():
            worker.call("set_up", job)
        results = []
        for case in [name for name in backlog.KEYS if not names or name in names]:
            _round(job, old, case, min(WARM_UP, changes), workers)
            rounds = [_round(job, old, case, changes, workers, backwards=bool(number % 2)) for number in range(repeat)]
            medians = {name: statistics.median(one[name] for one in rounds) for name in workers}
            results.append(CaseResult(case, medians.pop("ours"), medians))
        for worker in workers.values():
            worker.call("tear_down", job)
        return Result("catchup", changes, results, {name: round(worker.peak / 2**20) for name, worker in workers.items()})


def _round(
    job: Backlog, old: Connection, case: str, changes: int, workers: dict[str, Worker], *, backwards: bool = False
) -> dict[str, float]:
    """Make one backlog and let each party apply it; return seconds by party."""
    made = job._replace(end=backlog.change(old, case, changes))
    seconds = {}
    for name in sorted(workers, reverse=backwards):
        seconds[name] = workers[name].measured(made)
        print(f"{case} {changes} {name} {seconds[name]:.2f} s", file=sys.stderr, flush=True)
    found = {"old": backlog.fingerprint(old, "accounts")}
    for name, dsn, table in (("ours", job.new, "accounts_new"), ("native", job.native, "accounts")):
        with connect(dsn, APPLICATION) as target:
            found[name] = backlog.fingerprint(target, table)
    if len(set(found.values())) != 1:
        raise PartyFailed(f"{case}: the stores hold different rows: {found}")
    return seconds
