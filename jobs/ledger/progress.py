"""Progress: how far the chunks are, with rate and time left, for a person at a terminal or for a log.

The ledger is what is asked, so the same figures show from any machine; standard output stays free for the command's answer.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from changeover.errors import ChangeoverError
from changeover.jobs.ledger.ledger import Ledger
from changeover.session import one_row
from changeover.spec import Spec

LOG_SECONDS = 60.0
"""How often a log gets a line of progress."""


@contextmanager
def progress(spec: Spec, title: str) -> Iterator[None]:
    """Show how far the open chunks are, with rate and time left, until the block ends (driver).

    A bar on a terminal, a line a minute in a log; standard output stays free for the command's own
    answer.

    Args:
        spec: The migration's spec.
        title: What runs, in a word.

    Yields:
        Nothing; a thread of its own asks the ledger meanwhile.
    """
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(spec, title, stop), name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _watch(spec: Spec, title: str, stop: threading.Event) -> None:
    try:
        with Ledger.open(spec, "progress") as ledger:
            (_bar if sys.stderr.isatty() else _lines)(ledger, title, stop)
    except (ChangeoverError, OSError) as error:
        # progress is a courtesy: the step itself meets the same trouble and says so
        logging.getLogger(__name__).debug("no progress: %s", error)


def _bar(ledger: Ledger, title: str, stop: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} chunks"),
               TextColumn("{task.fields[rate]:,.0f} rows/s"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, rate=0.0)
        started = time.monotonic()
        first: int | None = None
        while not stop.wait(0.3):
            total, loaded, rows = chunk_progress(ledger)
            first = rows if first is None else first
            bar.update(task, total=total or None, completed=loaded, rate=(rows - first) / (time.monotonic() - started))


def _lines(ledger: Ledger, title: str, stop: threading.Event) -> None:
    started = time.monotonic()
    while not stop.wait(LOG_SECONDS):
        total, loaded, rows = chunk_progress(ledger)
        rate = rows / (time.monotonic() - started)
        print(f"{title}: {loaded} of {total} chunks, {rows:,} rows, {rate:,.0f} rows/s", file=sys.stderr, flush=True)


def chunk_progress(ledger: Ledger) -> tuple[int, int, int]:
    """Return (chunks, chunks loaded, rows loaded) of a migration.

    Args:
        ledger: The migration's ledger.

    Returns:
        The counts, all 0 before prepare.
    """
    if not ledger.exists():
        return 0, 0, 0
    row = one_row(
        ledger.connection.execute(
            "SELECT count(*), count(loaded), coalesce(sum(rows), 0) FROM changeover.chunk WHERE migration = %s",
            [ledger.migration],
        )
    )
    return int(row[0]), int(row[1]), int(row[2])
