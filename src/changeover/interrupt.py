"""An interrupt: Ctrl-C and SIGTERM as a request to end at the next good place, for services that run until they are stopped.

An exception in the middle of an append or of a fence has no good place to go on from, so the first signal only sets an event.
The second one means it. Signals belong to the main thread: elsewhere the event is all there is.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def deferred() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back while the block runs; the last one comes when it has ended."""
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda came, frame: held.append(came)) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[-1])


@contextmanager
def asked_to_stop(stop: threading.Event) -> Iterator[Callable[[], bool]]:
    """Let the first Ctrl-C or SIGTERM set `stop` while the block runs.

    Args:
        stop: The event that is set.

    Yields:
        What tells whether one came.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def ask(number: int, frame: object) -> None:
        came.append(number)
        stop.set()
        signal.signal(number, before[number])  # the second time it means it

    before = {int(number): signal.signal(number, ask) for number in STOPPING}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
