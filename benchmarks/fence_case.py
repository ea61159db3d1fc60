"""The fence benchmark: how long a handover holds up a writer, there and back, while an application writes through the router.

Capture and replay run as two services. Each writer's longest call around a fence is its pause; the peer is its longest call in as
much time without a fence. At the end both stores must hold the same rows, or there is no result.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Event, Thread

from benchmarks import backlog
from benchmarks.catchup_case import accounts
from benchmarks.followers import Backlog
from benchmarks.parties import APPLICATION
from benchmarks.result import CaseResult, Result
from benchmarks.worker import PartyFailed
from changeover import api
from changeover.errors import FenceCalledOff
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.source.marker import mark
from changeover.session import Connection, connect
from changeover.spark.launch import spark_session
from changeover.spec import Spec

WRITERS = 4
REST = 0.005
"""Seconds between two calls of a writer."""

PERCENTILES = {"p50": 0.5, "p99": 0.99}

SPEC = """
name = "bench_fence"
[source]
dsn = "env:BENCHMARK_OLD"
[target.new]
kind = "postgres"
dsn = "env:BENCHMARK_NEW"
[[table]]
source = "public.accounts"
target = "accounts_new"
key = ["id"]
[flag]
key = "accounts-store"
target = "new"
file = "{folder}/flags.json"
[work]
path = "{folder}/work"
"""

Calls = list[tuple[float, float]]
"""When each call of a writer began and ended."""


def measure(fences: int) -> Result:
    """Hand authority over so many times, in turn there and back; raises PartyFailed where a row is lost."""
    with ExitStack() as stack:
        job, old = stack.enter_context(accounts())
        spec = _prepared(job)
        for words in (("capture",), ("replay", "--follow")):
            stack.enter_context(_service(spec, *words))
        with _writing(spec) as calls:
            held, free = _fences(spec, calls, fences + fences % 2)
        _require_equal(spec, job, old)
    cases = [CaseResult(f"pause {name}", _at(held, place), {"no_fence": _at(free, place)}) for name, place in PERCENTILES.items()]
    return Result("fence", len(held) // WRITERS, cases, {})


def _prepared(job: Backlog) -> Spec:
    os.environ["BENCHMARK_OLD"], os.environ["BENCHMARK_NEW"] = job.old, job.new
    path = job.folder / "fence.toml"
    path.write_text(SPEC.format(folder=job.folder), encoding="utf-8")
    spec = api.load(path)
    spark = spark_session("benchmark-fence", cores=2, memory="1g")
    api.prepare(spec, spark)
    api.backfill(spec, spark)
    spark.stop()
    return spec


@contextmanager
def _service(spec: Spec, command: str, *options: str) -> Iterator[None]:
    """Run a service of the command line for as long as the block lasts."""
    words = [sys.executable, "-m", "changeover.cli.main", command, str(spec.path), *options]
    service = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        service.terminate()
        service.wait()


@contextmanager
def _writing(spec: Spec) -> Iterator[list[Calls]]:
    """Write through a router until the block ends; yields the calls of each writer."""
    end, calls = Event(), [Calls() for _ in range(WRITERS)]
    old, new = (f"UPDATE {table} SET note = %s WHERE id = %s" for table in ("accounts", "accounts_new"))

    def write(own: Calls, first: int) -> None:
        row = first
        while not end.wait(REST):
            row = first + (row + WRITERS) % backlog.ROWS
            began = time.monotonic()
            values = [f"at {began}", row + 1]
            router.run(lambda store: store.execute(store.of(old, new), values))  # noqa: B023 - it runs at once
            own.append((began, time.monotonic()))

    with api.Router.connect(spec) as router:
        threads = [Thread(target=write, args=(own, first), name=f"writer-{first}") for first, own in enumerate(calls)]
        for thread in threads:
            thread.start()
        try:
            yield calls
        finally:
            end.set()
            for thread in threads:
                thread.join()


def _fences(spec: Spec, calls: list[Calls], fences: int) -> tuple[list[float], list[float]]:
    """Return the pauses around fences, and the longest calls in as much time without."""
    held: list[float] = []
    free: list[float] = []
    for _ in range(2):
        api.advance(spec, override="benchmark")  # dualwrite, shadow
    while len(held) < fences * WRITERS:
        began = time.monotonic()
        try:
            step = api.advance(spec, override="benchmark") if len(held) % (2 * WRITERS) == 0 else api.rollback(spec)
        except FenceCalledOff as error:
            print(f"called off: {error}", file=sys.stderr, flush=True)
            continue
        ended = time.monotonic()
        _until_each_has_called(calls, ended)
        held += [_longest(own, began, ended) for own in calls]
        rested = time.monotonic()
        time.sleep(ended - began)
        free += [_longest(own, rested, time.monotonic()) for own in calls]
        print(f"{step.before.value} to {step.after.value}: {max(held[-WRITERS:]):.2f} s", file=sys.stderr, flush=True)
    return held, free


def _until_each_has_called(calls: list[Calls], moment: float) -> None:
    while not all(own and own[-1][0] > moment for own in calls):
        time.sleep(REST)


def _longest(calls: Calls, began: float, ended: float) -> float:
    return max((end - start for start, end in calls if end > began and start < ended), default=0.0)


def _require_equal(spec: Spec, job: Backlog, old: Connection) -> None:
    """Wait until the new store has what the old one, which has authority in the end, has; raise PartyFailed where they differ."""
    end = mark(old, "benchmark")
    with Ledger.open(spec, "benchmark") as ledger:
        while any(load.applied < end for load in ledger.loads()):
            time.sleep(REST)
    with connect(job.new, APPLICATION) as new:
        if (there := backlog.fingerprint(new, "accounts_new")) != (here := backlog.fingerprint(old, "accounts")):
            raise PartyFailed(f"the stores hold different rows: {here} and {there}")


def _at(pauses: list[float], place: float) -> float:
    return sorted(pauses)[min(len(pauses) - 1, int(len(pauses) * place))]
