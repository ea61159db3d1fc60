"""The router benchmark: what a read and a write cost the caller beyond the same call on its own pool, beside the SDK's Migrator.

The stores answer at once, in this benchmark alone, so that what is left is the router's own. One read and one write by key a case,
at each stage; a shadow read also with a store that takes long. A party's time is its p50 less that of the bare call. And on a real
server eight threads write through the router, and through the pool alone; every write must be there. Eight threads also write to
two stores, by a router whose application mirrors and by the Migrator. There the p50 of a write counts, and nothing may be lost.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
from ldclient import Context, LDClient, Result
from ldclient.migrations import ExecutionOrder, MigratorBuilder
from ldclient.migrations.types import Origin, Stage
from psycopg.pq import TransactionStatus
from psycopg_pool import ConnectionPool

from benchmarks.copy_case import server_at
from benchmarks.result import CaseResult
from benchmarks.result import Result as Measured
from benchmarks.worker import PartyFailed
from changeover.flags import flagfile
from changeover.flags.observed import Observation, Observations
from changeover.flags.router.desired import FlagStage
from changeover.flags.router.endpoint import READ_COMMITTED, PgEndpoint
from changeover.flags.router.router import MirroredTable, Router, returned
from changeover.flags.stages import TABLE
from changeover.position import image_version
from changeover.session import connect
from changeover.stores.postgres.gate import install_gate

FLAG = "bench"
CONTEXT = Context.create("bench")
WARM_UP = 200
SLOW_SECONDS = 0.05
THREADS, TURNS = 8, 6
PUT = "INSERT INTO numbers VALUES (%s)"
PAIRS = "CREATE TABLE pairs (number bigint PRIMARY KEY, note text)"
PUT_PAIR = "INSERT INTO pairs VALUES (%s, 'x') ON CONFLICT (number) DO UPDATE SET note = excluded.note RETURNING *"
DRAIN_SECONDS = 60

Call = Callable[[], object]


class Instant:
    """A session with a store that answers at once, or after so many seconds."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.info = SimpleNamespace(transaction_status=TransactionStatus.IDLE)
        self.isolation_level = READ_COMMITTED
        self.closed = False
        self.rowcount = 1
        self.read_only = False

    @contextmanager
    def _self(self) -> Iterator[Any]:
        yield self

    connection = transaction = cursor = _self

    def execute(self, statement: str, parameters: object = None) -> Instant:
        """Answer."""
        if self.seconds:
            time.sleep(self.seconds)
        return self

    def fetchone(self) -> tuple[int]:
        """Return a row."""
        return (1,)

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class InstantEndpoint(PgEndpoint):
    """An endpoint of such a store."""

    seconds: float = 0.0

    def open(self, *arguments: object, **named: object) -> Any:
        """Return a session."""
        return Instant(self.seconds)


@dataclass
class Fixed:
    """Authority that is known, and does not move."""

    observations: Observations | None
    last_stage: Stage | None = field(default=None)
    recorded: Stage | None = Stage.COMPLETE
    reads_open: int | None = None
    applied: int = 0
    replaying: bool = False

    def follow(self, process: str, beat: object) -> Fixed:
        """Follow nothing."""
        return self

    def positions(self, endpoints: object, application: str) -> None:
        """Know none."""

    def wait(self, tenant: str, observation: Observation, seconds: float) -> None:
        """Wait for nothing."""

    def wait_applied(self, position: int, seconds: float) -> None:
        """Wait for nothing."""

    def hurry(self) -> None:
        """Ask nothing."""

    def close(self) -> None:
        """Do nothing."""


def measure(calls: int, repeat: int, writes: int) -> Measured:
    """Time every case; raises PartyFailed where a write is lost."""
    cases = []
    with tempfile.TemporaryDirectory(prefix="changeover-bench-") as folder:
        path = Path(folder) / "flags.json"
        for stage in Stage:
            flagfile.write_stage(path, FLAG, stage)
            cases += _stage(path, stage, calls, repeat)
        flagfile.write_stage(path, FLAG, Stage.SHADOW)
        slow = _stage(path, Stage.SHADOW, max(10, calls // 50), 1, SLOW_SECONDS)
        cases += [CaseResult("shadow_slow_secondary", slow[1].ours, slow[1].peers)]
        cases += [_threads(Path(folder), path, writes), _mirrored(Path(folder), path, writes)]
    return Measured("router", calls, cases, {}, "us")


def _stage(path: Path, stage: Stage, calls: int, repeat: int, slow: float = 0.0) -> list[CaseResult]:
    """Time a read and a write at one stage, together and each; the other store takes `slow` seconds to answer."""
    writes = TABLE[stage].writes
    stores = {origin: Instant(0.0 if origin is writes else slow) for origin in Origin}
    endpoints = {origin: InstantEndpoint("", pool=store, seconds=store.seconds) for origin, store in stores.items()}
    client = flagfile.client(path)
    with Router(
        old=endpoints[Origin.OLD], new=endpoints[Origin.NEW], stage=FlagStage(client, FLAG),
        authority=Fixed(Observations(1, Observation(1, writes))), name="bench",
    ) as router:  # fmt: skip
        parties = {
            "ours": (lambda: router.compare(old=_read, new=_read), lambda: router.run(lambda store: _read(store.cursor))),
            "migrator": _migrator(client, stores, ExecutionOrder.PARALLEL),
            "migrator_serial": _migrator(client, stores, ExecutionOrder.SERIAL),
            "bare": (lambda: _bare(stores[writes]), lambda: _bare(stores[writes])),
        }
        added = {name: [[], []] for name in parties}  # type: dict[str, list[list[float]]]
        for _ in range(repeat):
            for name, pair in parties.items():
                for place, call in enumerate(pair):
                    added[name][place].append(_p50(call, calls))
    client.close()  # type: ignore[no-untyped-call]
    medians = {name: [statistics.median(times) for times in both] for name, both in added.items()}
    bare = medians.pop("bare")
    results = []
    # the stage's own case is one read and one write together
    for name, places in ((stage.value, (0, 1)), (f"read {stage.value}", (0,)), (f"write {stage.value}", (1,))):
        own = {party: max(sum(both[at] - bare[at] for at in places), 1e-9) for party, both in medians.items()}
        print(f"{name}: {', '.join(f'{n} {s * 1e6:.1f} us' for n, s in own.items())}", file=sys.stderr, flush=True)
        results.append(CaseResult(name, own.pop("ours"), own))
    return results


def _read(cursor: Any) -> Any:
    return cursor.execute("SELECT 1", [1]).fetchone()


def _bare(store: Instant) -> object:
    with store.connection() as connection, connection.transaction(), connection.cursor() as cursor:
        return _read(cursor)


def _migrator(client: LDClient, stores: dict[Origin, Instant], order: ExecutionOrder) -> tuple[Call, Call]:
    """Return a read and a write by the SDK's own Migrator."""

    def on(origin: Origin) -> Callable[[object], Result]:
        return lambda payload: Result.success(_bare(stores[origin]))

    builder = MigratorBuilder(client).read(on(Origin.OLD), on(Origin.NEW), lambda old, new: bool(old == new))
    made = builder.write(on(Origin.OLD), on(Origin.NEW)).read_execution_order(order).build()
    if isinstance(made, str):
        raise PartyFailed(f"router: the SDK makes no migrator: {made}")
    return (lambda: made.read(FLAG, CONTEXT, Stage.OFF)), (lambda: made.write(FLAG, CONTEXT, Stage.OFF))


def _p50(call: Call, calls: int) -> float:
    """Return the median seconds of a call."""
    for _ in range(min(WARM_UP, calls)):
        call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _threads(folder: Path, path: Path, writes: int) -> CaseResult:
    """Write by eight threads to a real server, through the router and through the pool alone; return the seconds of all."""
    flagfile.write_stage(path, FLAG, Stage.DUALWRITE)
    folder.chmod(0o755)  # the server's own user must reach its folder
    seconds: dict[str, list[float]] = {"ours": [], "psycopg": []}
    with server_at(folder / "server") as server:
        dsn = server.create_database("numbers")
        client = flagfile.client(path)
        with psycopg.connect(dsn, autocommit=True) as session, ConnectionPool(dsn, min_size=THREADS, max_size=THREADS) as pool:
            session.execute("CREATE TABLE numbers (number bigint)")
            endpoint = PgEndpoint(dsn, pool=pool)
            with Router(
                old=endpoint, new=endpoint, stage=FlagStage(client, FLAG), name="bench",
                authority=Fixed(Observations(1, Observation(1, Origin.OLD))),
            ) as router:  # fmt: skip

                def plain(number: int) -> object:
                    with pool.connection() as connection, connection.transaction(), connection.cursor() as cursor:
                        return cursor.execute(PUT, [number])

                def ours(number: int) -> object:
                    return router.run(lambda store: store.execute(PUT, [number]))

                for turn in range(TURNS):
                    name, write = (("ours", ours), ("psycopg", plain))[turn % 2]
                    seconds[name].append(_together(write, turn * THREADS * writes, writes))
            found = session.execute("SELECT count(DISTINCT number), count(*) FROM numbers").fetchone()
        client.close()  # type: ignore[no-untyped-call]
    if found != (wanted := TURNS * THREADS * writes, wanted):
        raise PartyFailed(f"router: {found} of {wanted} writes are there")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"write_8_threads: {medians}", file=sys.stderr, flush=True)
    return CaseResult("write_8_threads", medians.pop("ours"), medians)


Pools = dict[Origin, ConnectionPool]


def _mirrored(folder: Path, path: Path, writes: int) -> CaseResult:
    """Write by eight threads to two stores, by a router whose application mirrors and by the Migrator; return their p50."""
    times: dict[str, list[float]] = {"ours": [], "migrator": []}
    with server_at(folder / "stores") as server, ExitStack() as stack:
        dsns = {origin: server.create_database(origin.value) for origin in Origin}
        pools = {origin: stack.enter_context(_pool(dsn, gated=origin is Origin.NEW)) for origin, dsn in dsns.items()}
        client = flagfile.client(path)
        router = stack.enter_context(
            Router(
                old=PgEndpoint(dsns[Origin.OLD], pool=pools[Origin.OLD]), new=PgEndpoint(dsns[Origin.NEW], pool=pools[Origin.NEW]),
                mirrored=[MirroredTable("public.pairs", "public.pairs", dict, dict)], stage=FlagStage(client, FLAG), name="bench",
                authority=Fixed(Observations(1, Observation(1, Origin.OLD))),
            )
        )  # fmt: skip
        parties: dict[str, Callable[[int], object]] = {
            "ours": lambda number: router.run(lambda store: store.mirror(returned(store.execute(PUT_PAIR, [number])))),
            "migrator": _both(client, pools),
        }
        for turn in range(TURNS):
            name = ("ours", "migrator")[turn % 2]
            _together(_timed(parties[name], times[name]), turn * THREADS * writes, writes)
            router.drain(DRAIN_SECONDS)
        counts = router.counters()["mirror_new"]
    client.close()  # type: ignore[no-untyped-call]
    if (wanted := TURNS // 2 * THREADS * writes) != counts["applied"] or counts["lost"] or counts["dropped"]:
        raise PartyFailed(f"router: of {wanted} mirrored writes {counts}")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"mirrored_8_threads: {medians}, {counts}", file=sys.stderr, flush=True)
    return CaseResult("mirrored_8_threads", medians.pop("ours"), medians)


def _pool(dsn: str, *, gated: bool) -> ConnectionPool:
    """Make the table of pairs, behind the gate or not, and return a pool of its database."""
    with connect(dsn, "benchmark") as session:
        session.execute(PAIRS)
        if gated:
            install_gate(session, "public", "pairs", ("number",), image_version(1))
    return ConnectionPool(dsn, min_size=THREADS, max_size=THREADS, open=True)


def _both(client: LDClient, pools: Pools) -> Callable[[int], object]:
    """Return a write to both stores by the SDK's own Migrator."""

    def on(origin: Origin) -> Callable[[Any], Result]:
        def put(number: Any) -> Result:
            with pools[origin].connection() as connection, connection.transaction(), connection.cursor() as cursor:
                cursor.execute(PUT_PAIR, [number])
            return Result.success(None)

        return put

    stores = on(Origin.OLD), on(Origin.NEW)
    made = MigratorBuilder(client).read(*stores).write(*stores).build()
    if isinstance(made, str):
        raise PartyFailed(f"router: the SDK makes no migrator: {made}")
    return lambda number: made.write(FLAG, CONTEXT, Stage.DUALWRITE, number)


def _timed(write: Callable[[int], object], times: list[float]) -> Callable[[int], object]:
    def timed(number: int) -> None:
        started = time.perf_counter()
        write(number)
        times.append(time.perf_counter() - started)

    return timed


def _together(write: Callable[[int], object], first: int, writes: int) -> float:
    """Return the seconds in which eight threads make their writes."""

    def work(number: int) -> None:
        for one in range(writes):
            write(first + number * writes + one)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started
