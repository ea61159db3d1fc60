"""The screen: what a live line says, that it is one on a terminal alone, and that it never disturbs a step."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from changeover.demo import screen as screens
from changeover.demo.screen import Rate, Reading, Screen, said


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, work: Callable[[Screen], None]) -> str:
    """Return what a console got of one step."""
    monkeypatch.setattr(screens, "DRAW_SECONDS", 0.01)
    monkeypatch.setattr(screens, "PLAIN_SECONDS", 0.01)
    out = io.StringIO()
    screen = Screen(Console(file=out, force_terminal=terminal, width=120))
    with screen.step("verify"):
        work(screen)
    return out.getvalue()


def until(out: Callable[[], bool]) -> None:
    """Wait until something has happened in the screen's thread."""
    deadline = time.monotonic() + 60
    while not out():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("reading", "progress"),
    [
        (Reading("Spark starts"), ""),
        (Reading("", 12, 40, "tasks"), "12 of 40 tasks"),
        (Reading("", 1_500, 2_000_000, "bytes"), "1.5 kB of 2.0 MB"),
    ],
)
def test_a_reading_says_how_much_is_done_where_that_is_known(reading: Reading, progress: str) -> None:
    assert reading.progress == progress


def test_a_rate_is_of_what_was_done_since_it_was_first_seen() -> None:
    rate = Rate()
    assert rate.of(Reading("", 100, 900, "tasks"), 10.0) == ""
    assert rate.of(Reading("", 150, 900, "tasks"), 15.0) == "10 tasks/s"
    assert rate.of(Reading("", 10, 900, "tasks"), 20.0) == "", "another count begins"
    assert rate.of(Reading("", 3, 8, "chunks", 4_000, "rows"), 21.0) == ""
    assert rate.of(Reading("", 4, 8, "chunks", 8_000, "rows"), 23.0) == "2,000 rows/s"
    assert rate.of(Reading("", 5, 8, "chunks", 8_001, "rows"), 4_023.0) == "1.0 rows/s"
    assert rate.of(Reading("waiting"), 24.0) == ""
    assert rate.of(Reading("", 0, 9_000, "bytes"), 25.0) == ""
    assert rate.of(Reading("", 5_000, 9_000, "bytes"), 26.0) == "5.0 kB/s"


def test_a_plain_line_names_what_is_waited_for() -> None:
    reading = Reading("replay reached 0/1 and not 0/9", 1, 9, "bytes")
    assert said("replay", 31.04, reading, "3 bytes/s") == (
        "replay         31.0 s  … replay reached 0/1 and not 0/9, 1 byte of 9 bytes, 3 bytes/s"
    )
    assert said("plan", 30.0, Reading(""), "") == "plan           30.0 s  … under way"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_step_is_a_live_line_on_a_terminal_and_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    looks: list[int] = []

    def look() -> Reading:
        looks.append(1)
        return Reading("every row is compared [bold]", 12, 40, "tasks")

    def work(screen: Screen) -> None:
        with screen.looking(look):
            until(lambda: len(looks) > 2)

    text = shown(monkeypatch, terminal=terminal, work=work)
    assert "12 of 40 tasks" in text
    assert "every row is compared [bold]" in text, "a value is no markup"
    assert ("\x1b[" in text) == terminal
    assert ("━" in text) == terminal


def test_a_look_that_fails_is_no_failure_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def look() -> Reading:
        looks.append(1)
        raise ConnectionError("the ledger restarts")

    def work(screen: Screen) -> None:
        screen.at(Reading("the last that was known"))
        with screen.looking(look):
            until(lambda: len(looks) > 2)

    assert "the last that was known" in shown(monkeypatch, terminal=False, work=work)


def test_an_error_of_the_step_ends_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(screen: Screen) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shown(monkeypatch, terminal=True, work=work)
