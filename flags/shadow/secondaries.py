"""Secondaries: whatever else answers a read, such as a cache or a search index, compared with the authority's answer.

Each is a function of the application's, which no deadline of a server's bounds. So each has a thread of its own, and one that
hangs holds up neither a caller nor a comparison of the two stores. It is asked once, and no log says how far it is: a difference
may be one of time alone. So it is counted by the secondary's name, and readiness never asks for it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldclient.migrations.types import Stage

from changeover.flags.alarm import Alarm, reason_of
from changeover.flags.shadow.breaker import Breaker
from changeover.flags.shadow.experiment import Answer, Experiment, Observation, Result, hooked, judged
from changeover.flags.shadow.room import Room

OUTCOMES = ("matched", "mismatched", "ignored")


@dataclass(frozen=True)
class Question:
    """One read that a secondary is asked: how it is compared, and what the authority answered, with its bytes."""

    experiment: Experiment
    stage: Stage
    control: Observation
    answer: Answer
    weight: int


class TooLate(Exception):
    """The answer came after the deadline."""


class Secondary:
    """One secondary of a process; `offer` runs on the caller's thread and never waits."""

    def __init__(self, name: str, room: Room, *, limit: int, deadline: float) -> None:
        self.name = name
        self.room = room
        self.limit = limit
        self.deadline = deadline
        self.breaker = Breaker()
        self.drops = Alarm(f"reads of the secondary {name} are dropped, there is no room")
        self.errors = Alarm(f"the secondary {name} has no answer")
        self.skips = Alarm(f"the secondary {name} is left alone, it failed several times in a row or hangs")
        self._counts: Counter[str] = Counter()
        self._offered: deque[Question] = deque()
        self._since: float | None = None
        """Since when a question is under way (seconds on the monotonic clock)."""
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"changeover-beside-{name}", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Return how many questions wait or are under way."""
        return len(self._offered) + (self._since is not None)

    def offer(self, question: Question) -> None:
        """Queue a question, unless the breaker is open or there is no room; both are counted.

        Args:
            question: The question.
        """
        since = self._since
        if self.breaker.resting or (since is not None and time.monotonic() - since > self.deadline):
            self.skips.raise_for("breaker open" if self.breaker.resting else "hangs")
        elif self._closing or self.depth >= self.limit or not self.room.take(question.weight):
            self.drops.raise_for("closing" if self._closing else "no room")
        else:
            self._offered.append(question)
            self._wake.set()

    def counts(self) -> dict[str, Any]:
        """Return what came of its answers.

        Returns:
            The counts by name, ready for JSON.
        """
        counts: dict[str, Any] = {name: self._counts[name] for name in OUTCOMES}
        return {
            **counts, "errors": self.errors.count, "dropped": self.drops.count, "skipped_by_breaker": self.skips.count,
            "depth": self.depth, "breaker_open": self.breaker.open, "last_error": self.errors.last,
        }  # fmt: skip

    def end(self) -> None:
        """Have the thread end behind what is under way."""
        self._closing = True
        self._wake.set()

    def join(self, seconds: float) -> None:
        """Wait for the thread; one that hangs in the application's function is left, and ends with the process.

        Args:
            seconds: How long to wait at most.
        """
        self._thread.join(seconds)

    # -- the secondary's thread

    def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            while self._offered and not self._closing:
                self._since = time.monotonic()  # before it leaves the queue, so that it is in one of the two at any moment
                question = self._offered.popleft()
                try:
                    self._ask(question)
                # A hook failed, or `raised` itself did: this question has no end, the next one may.
                except Exception as error:
                    self.errors.raise_for(reason_of(error))
                finally:
                    self.room.give(question.weight)
                    self._since = None
            self._wake.wait()
        for _ in range(len(self._offered)):
            self.room.give(self._offered.popleft().weight)
            self.drops.raise_for("closing")

    def _ask(self, question: Question) -> None:
        if self.breaker.resting:
            self.skips.raise_for("breaker open")
            return
        candidate = self._observe(question)
        if candidate.error is not None:
            self.breaker.failed()
            self.errors.raise_for(reason_of(candidate.error))
        else:
            self.breaker.answered()
        experiment = question.experiment
        matched, ignored = judged(experiment, question.control, candidate)
        result = Result(experiment.name, question.stage, question.control, candidate, matched, ignored, looks=1)
        if not result.failed:
            self._counts[result.outcome] += 1
        hooked(experiment, "publish", result)

    def _observe(self, question: Question) -> Observation:
        started = time.monotonic()
        error: Exception | None = None
        value = None
        try:
            value = question.answer()
        except Exception as raised:  # the function is the application's code: whatever it raises is its answer
            error = raised
        seconds = time.monotonic() - started
        if error is None and seconds > self.deadline:
            error, value = TooLate(), None
        return Observation(self.name, value, error, seconds)


class Secondaries:
    """The secondaries of one process by name, each made when it is first asked; they share the comparisons' room."""

    def __init__(self, room: Room, *, limit: int, deadline: float) -> None:
        self.room = room
        self.limit = limit
        self.deadline = deadline
        self._by_name: dict[str, Secondary] = {}
        self._making = threading.Lock()

    def offer(self, experiment: Experiment, stage: Stage, control: Observation, answers: Mapping[str, Answer], weight: int) -> None:
        """Ask secondaries for what the authority has answered (caller's thread).

        Args:
            experiment: How answers are compared.
            stage: The stage at which the read was made.
            control: The authority's answer.
            answers: The function of each secondary, by its name.
            weight: The bytes of the authority's answer.
        """
        for name, answer in answers.items():
            self._of(name).offer(Question(experiment, stage, control, answer, weight))

    def _of(self, name: str) -> Secondary:
        if (known := self._by_name.get(name)) is None:
            with self._making:
                if (known := self._by_name.get(name)) is None:
                    known = Secondary(name, self.room, limit=self.limit, deadline=self.deadline)
                    self._by_name = {**self._by_name, name: known}
        return known

    @property
    def depth(self) -> int:
        """Return how many questions wait or are under way."""
        return sum(secondary.depth for secondary in self._by_name.values())

    def counts(self) -> dict[str, Any]:
        """Return what came of each.

        Returns:
            The counts by the secondary's name, ready for JSON.
        """
        return {name: secondary.counts() for name, secondary in self._by_name.items()}

    def close(self, seconds: float) -> None:
        """End the threads.

        Args:
            seconds: How long to wait for all of them together.
        """
        until = time.monotonic() + seconds
        for secondary in self._by_name.values():
            secondary.end()
        for secondary in self._by_name.values():
            secondary.join(max(0.0, until - time.monotonic()))
