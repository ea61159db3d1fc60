"""A party's process: started once, told what to do, and measured from outside.

A process of its own keeps one party's memory out of the other's figure, and its JVM warm from run to run. A failure in
the process is raised where the command was given, with the party's own traceback as its text.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

from benchmarks.followers import FOLLOWERS, Backlog
from benchmarks.memory import PeakMemory
from benchmarks.parties import PARTIES, Job

END_WITHIN = 30.0
KNOWN: Mapping[str, Callable[[], Any]] = {**PARTIES, **FOLLOWERS}


class PartyFailed(Exception):
    """A party's step ended with an error."""


class Worker:
    """One party in a process of its own, for as long as the context is open."""

    def __init__(self, party: str) -> None:
        self.party = party
        self.peak = 0
        self._pipe, self._far = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=serve, args=(party, self._far), name=f"benchmark-{party}")

    def __enter__(self) -> Self:
        self._process.start()
        self._far.close()  # the process alone holds its end, so its death is seen
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(BrokenPipeError):  # it may have ended by itself
            self._pipe.send(None)
        self._process.join(END_WITHIN)
        self._process.kill()

    def call(self, step: str, job: Job | Backlog) -> float:
        """Run one step and return its seconds; raises PartyFailed."""
        self._pipe.send((step, job))
        try:
            seconds, problem = self._pipe.recv()
        except EOFError as error:
            raise PartyFailed(f"{self.party}, {step}: its process ended") from error
        if problem:
            raise PartyFailed(f"{self.party}, {step}:\n{problem}")
        return float(seconds)

    def measured(self, job: Job | Backlog) -> float:
        """Run the copy and return its seconds; `peak` then holds the most bytes seen so far."""
        with self.watched():
            return self.call("copy", job)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the process's memory while the block lasts."""
        assert self._process.pid is not None
        with PeakMemory(self._process.pid) as memory:
            yield
        self.peak = max(self.peak, memory.peak)


def serve(party: str, pipe: Connection) -> None:
    """Answer commands until told to end (the party's process)."""
    made = None
    while (command := pipe.recv()) is not None:
        step, job = command
        started = time.monotonic()
        try:
            made = made or KNOWN[party]()
            started = time.monotonic()
            getattr(made, step)(job)
            pipe.send((time.monotonic() - started, None))
        except Exception:  # reported to the other process, which raises it
            pipe.send((0.0, traceback.format_exc()))
    if made is not None and hasattr(made, "spark"):
        made.spark.stop()
