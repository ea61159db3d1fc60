"""Chaos: a writer that never rests, and capture, backfill and replay killed with SIGKILL at random; at the end `verify` says equal.

The short form runs with the other tests. `make chaos` runs the same for minutes: `--chaos-seconds` says how long the killing lasts.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest

from changeover.jobs.ledger.ledger import Ledger
from changeover.verifiers.compare.verdict import Verdict
from changeover.verifiers.verification import verify
from tests.support.fix_migration import FOLLOWS, FOLLOWS_TABLE, NASTY_ROWS, ROWS, MakeMigration, Migration
from tests.support.fix_writer import writing

CAPTURE = [sys.executable, "-m", "changeover.cli.main", "capture"]

JOBS = """
import os, sys, threading, traceback
from changeover.errors import ChangeoverError
from changeover.jobs.load import copier as loading
from changeover.jobs.apply.rounds import replay
from changeover.spark.launch import spark_session
from changeover.spec import load

loading.ROWS_PER_CHUNK = int(sys.argv[2])
spec = load(sys.argv[1])
spark = spark_session("chaos", cores=2, memory="1g", shuffle_partitions=2)
print("begun", flush=True)

def run(step):
    try:
        step()
    except ChangeoverError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(error.exit_code)
    except BaseException:
        traceback.print_exc()
        os._exit(70)

steps = (lambda: replay(spec, spark, follow=True), lambda: loading.backfill(spec, spark))
threads = [threading.Thread(target=run, args=(step,)) for step in steps]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
"""Replay follows from the start; the backfill begins beside it, again and again until one lives long enough."""

WRITERS, PAUSE = 3, 0.001
"""Sessions that write, and the rest in seconds between two transactions of one: about a thousand changes a second."""

LONGEST = 25.0
"""Seconds that a Spark job lives at most, or a quarter of the chaos: a batch that is killed begins anew, and longer."""

CHUNK_ROWS, ROWS_A_SECOND = 100, 5
"""Rows of a chunk: the writers' table grows all the while, and a lake takes some chunks a second, however small they are."""

LONG = 120.0
"""Seconds of chaos in which something must have been loaded and replayed, or the kills prove nothing."""


@dataclass
class Victim:
    """A process that is started, killed after a random while, and started again.

    The while begins when the process says a first line, if it `speaks`: on a busy machine it else never lives to its work.
    """

    command: list[str]
    lives: tuple[float, float]
    speaks: bool = False
    kills: int = 0
    troubles: list[str] = field(default_factory=list)

    def suffer(self, chance: random.Random, over: threading.Event) -> None:
        """Live and die until it is over; an end that is not by our hand must be one that may be tried again."""
        while not over.is_set():
            process = subprocess.Popen(
                self.command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            while self.speaks and not over.is_set() and not select.select([process.stdout], [], [], 0.1)[0]:
                pass
            over.wait(chance.uniform(*self.lives))
            ended = process.poll()
            if ended is None:
                os.killpg(process.pid, signal.SIGKILL)
            _, said = process.communicate()
            self.kills += ended is None
            if ended not in (None, 0, 3, -signal.SIGKILL):
                self.troubles.append(f"{ended}: {said[-2000:]}")


@contextmanager
def chaos(migration: Migration, seed: int, seconds: float) -> Iterator[list[Victim]]:
    """Let capture and the Spark jobs live and die for as long as the block lasts, which is about so many seconds."""
    path, rows = migration.spec.path, max(CHUNK_ROWS, round(seconds * ROWS_A_SECOND))
    jobs = Victim([sys.executable, "-c", JOBS, path, str(rows)], (0.0, max(seconds / 4, LONGEST)), speaks=True)
    victims = [Victim([*CAPTURE, path], (0.5, 4.0)), jobs]
    over = threading.Event()
    threads = [threading.Thread(target=v.suffer, args=(random.Random(seed + n), over)) for n, v in enumerate(victims)]
    for thread in threads:
        thread.start()
    try:
        yield victims
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_equal_after_chaos(make_migration: MakeMigration, old_dsn: str, pytestconfig: pytest.Config) -> None:
    seconds = pytestconfig.getoption("chaos_seconds")
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown when it fails
    migration = make_migration(FOLLOWS_TABLE, FOLLOWS)
    migration.old.execute(NASTY_ROWS, {"rows": ROWS})
    migration.old.execute("ANALYZE follows")
    migration.prepare()
    with ExitStack() as writers:
        written = [writers.enter_context(writing(old_dsn, seed + number, PAUSE)) for number in range(WRITERS)]
        with chaos(migration, seed, seconds) as victims:
            time.sleep(seconds)
    changes = sum(one.changes for one in written)
    print(f"{sum(one.writes for one in written)} transactions, {changes / seconds:.0f} changes a second")
    print(f"kills: {[victim.kills for victim in victims]}; {'; '.join(progress(migration))}")
    assert not [trouble for victim in victims for trouble in victim.troubles]
    assert all(victim.kills for victim in victims)
    if seconds >= LONG:
        with Ledger.open(migration.spec, "test") as ledger:
            assert all(load.events for load in ledger.loads()), "replay was killed before it applied anything: give it longer"
    migration.capture()
    migration.backfill()
    migration.replay()
    migration.assert_equal()
    assert [verdict.word for verdict in verified(migration)] == ["equal", "equal"]


def progress(migration: Migration) -> list[str]:
    """Return how far each load came although it was killed again and again: what is left proves less."""
    with Ledger.open(migration.spec, "test") as ledger:
        loads = ledger.loads()
    chunks = {load.target: migration.chunks(load.target) for load in loads}
    return [
        f"{load.target}: {sum(one.loaded is not None for one in chunks[load.target])} of {len(chunks[load.target])} chunks,"
        f" {load.state}, {load.events} changes offered"
        for load in loads
    ]


def verified(migration: Migration) -> list[Verdict]:
    """Verify with a capture of our own beside it."""
    service = subprocess.Popen([*CAPTURE, migration.spec.path], start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        return verify(migration.spec, migration.spark)
    finally:
        service.terminate()
        service.wait()
