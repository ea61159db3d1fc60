"""Fixtures for the demo: one whole run by the command line, its servers and data kept, for all tests that look at it.

A run is what a person would start, in a process of its own; its servers end with the test run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from changeover.embedded.server import EmbeddedServer

ROWS = 3000
WITHIN = 3600.0
"""Seconds after which a run counts as hung. The demo itself ends where nothing moves, however slow the machine is."""

RunDemo = Callable[..., "DemoRun"]


@dataclass(frozen=True)
class DemoRun:
    """What a run of the demo said, and where it left what it made."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Return the last line of standard output, which is one JSON object."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found

    @property
    def place(self) -> Path:
        """Return the demo's folder."""
        return Path(self.document["report"]).parent

    def connect(self, store: str) -> psycopg.Connection[tuple[Any, ...]]:
        """Open a session with a kept store by the DSN that the run printed."""
        session = psycopg.connect(self.document["stores"][store], options="-c TimeZone=UTC -c DateStyle=ISO", autocommit=True)
        return session


def run_demo(*arguments: str) -> DemoRun:
    """Run the demo by the command line."""
    command = [sys.executable, "-m", "changeover.cli.main", "demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WITHIN)
    return DemoRun(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def demo() -> RunDemo:
    """Run the demo with arguments."""
    return run_demo


@pytest.fixture(scope="session")
def kept_demo() -> Iterator[DemoRun]:
    """Run the whole demo once, and keep its stores until the tests are done."""
    run = run_demo("--rows", str(ROWS), "--json", "--keep")
    assert run.code == 0, run.err
    yield run
    EmbeddedServer.attach(run.place / "server").remove()
    shutil.rmtree(run.place)
