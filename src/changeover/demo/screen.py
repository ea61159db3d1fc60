"""The screen: one live line while a step works, and one line that stays when it is done.

On a terminal the live line has a bar, a rate, and what is being waited for. Elsewhere there are plain lines alone: a step
that takes long says every half minute how far it is. Runs on the driver, beside the step, and decides nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

log = logging.getLogger(__name__)

DRAW_SECONDS = 0.25
"""How often the live line is drawn: each look asks the ledger or Spark, and the machine has other work."""

PLAIN_SECONDS = 30.0
"""How often a log gets a line about a step that is not done yet."""

SLOW = 10.0
"""Below this many a second a rate has a decimal: "0 tasks/s" would say that nothing moves."""

END_SECONDS = 5.0
"""How long the end of a step waits for a look that is under way; after that the look is of no use to anybody."""

PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
"""How a line is printed that has values in it: as it is, whatever they are."""


@dataclass(frozen=True)
class Reading:
    """How far a step is at one moment: what is being waited for, and `done` of `total` units where that is known.

    `counted` is what the rate is of, in `per`; without it the rate is that of `done`. A unit "bytes" is shown as kB and MB.
    """

    waiting: str
    done: int = 0
    total: int | None = None
    unit: str = ""
    counted: int | None = None
    per: str | None = None

    @property
    def progress(self) -> str:
        """Return how much is done as text; empty where nothing is counted."""
        if self.total is None:
            return ""
        if self.unit == "bytes":
            return f"{decimal(self.done)} of {decimal(self.total)}"
        return f"{self.done:,} of {self.total:,} {self.unit}"


Look = Callable[[], Reading]


class Rate:
    """The rate of what is counted, from when it was first seen to now."""

    def __init__(self) -> None:
        self._first: tuple[str, int, float] | None = None
        self._last = 0

    def of(self, reading: Reading, now: float) -> str:
        """Return the rate as text, empty before there is one; it begins anew where another thing is counted, or fewer.

        Args:
            reading: What is counted, and how much of it.
            now: The time in seconds, of any clock that only goes forward.
        """
        amount = reading.done if reading.counted is None else reading.counted
        name = reading.per or reading.unit
        if not name:
            return ""
        if self._first is None or self._first[0] != name or amount < self._last:
            self._first = (name, amount, now)
        self._last = amount
        _, first, since = self._first
        if now <= since or amount == first:
            return ""
        rate = (amount - first) / (now - since)
        if name == "bytes":
            return f"{decimal(int(rate))}/s"
        return f"{rate:,.0f} {name}/s" if rate >= SLOW else f"{rate:.1f} {name}/s"


class Screen:
    """Where a demo tells of itself; `at` and `looking` are for the step that works."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._reading = Reading("")
        self._look: Look | None = None

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, **PLAIN)

    def at(self, reading: Reading) -> None:
        """Say how far the step is."""
        self._reading = reading

    @contextmanager
    def looking(self, look: Look) -> Iterator[None]:
        """Ask `look` how far the step is until the block ends.

        Args:
            look: Runs in another thread; its errors are no errors of the step.
        """
        self._look = look
        try:
            yield
        finally:
            self._look = None

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show a step until the block ends: a live line on a terminal, and a plain one every half minute elsewhere."""
        self._reading = Reading("")
        stop = threading.Event()
        bar = _bar(self.console) if self.console.is_terminal else None
        with _drawn(bar, name) as task:
            drawer = threading.Thread(target=self._draw, args=(name, stop, bar, task), name="screen", daemon=True)
            drawer.start()
            try:
                yield
            finally:
                stop.set()
                drawer.join(END_SECONDS)

    def _draw(self, name: str, stop: threading.Event, bar: Progress | None, task: TaskID | None) -> None:
        started, rate = time.monotonic(), Rate()
        while not stop.wait(DRAW_SECONDS if bar is not None else PLAIN_SECONDS):
            reading, now = self._seen(), time.monotonic()
            speed = rate.of(reading, now)
            if bar is None or task is None:
                self.line(said(name, now - started, reading, speed))
                continue
            bar.update(
                task, completed=reading.done, total=reading.total, taken=f"{now - started:6.1f} s",
                amount=reading.progress, speed=speed, waiting=reading.waiting,
            )  # fmt: skip
            bar.refresh()

    def _seen(self) -> Reading:
        look = self._look
        if look is not None:
            try:
                self._reading = look()
            except Exception as error:  # a look is a courtesy: the step itself meets the same trouble and says so
                log.debug("no progress: %s", error)
        return self._reading


def said(name: str, seconds: float, reading: Reading, speed: str) -> str:
    """Return the plain line of a step that is not done yet (pure).

    Args:
        name: The step.
        seconds: How long it has taken so far.
        reading: How far it is.
        speed: Its rate as text, or nothing.
    """
    parts = [reading.waiting or "under way", reading.progress, speed]
    return f"{name:<12} {seconds:6.1f} s  … " + ", ".join(filter(None, parts))


def _bar(console: Console) -> Progress:
    """Return the live line: it leaves nothing behind, and is drawn by the screen alone."""
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    def text(template: str, style: str = "none", **column: Any) -> TextColumn:
        return TextColumn(template, style=style, markup=False, table_column=Column(no_wrap=True, **column))

    return Progress(
        text("{task.description:<12}", "bold"),
        text("{task.fields[taken]}"),
        BarColumn(bar_width=16),
        text("{task.fields[amount]}"),
        text("{task.fields[speed]}", "cyan"),
        text("{task.fields[waiting]}", overflow="ellipsis", ratio=1),
        console=console,
        transient=True,
        auto_refresh=False,
        expand=True,
    )


@contextmanager
def _drawn(bar: Progress | None, name: str) -> Iterator[TaskID | None]:
    with bar if bar is not None else nullcontext():
        yield None if bar is None else bar.add_task(name, total=None, taken="", amount="", speed="", waiting="")
