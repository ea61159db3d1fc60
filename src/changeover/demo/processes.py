"""The demo's processes: the application and capture, each on its own, started and ended by id.

A process has a session of its own, so that Ctrl-C at the terminal reaches the demo alone, which then ends them in order.
Its output goes to a log file. Secrets reach it by the environment, never by an argument.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from changeover.demo.patience import Patience, cpu_seconds
from changeover.errors import CouldNotFinish

STILL_SECONDS = 30.0
"""How long a process that was asked to end may do nothing at all before it is killed."""

CPU_SECONDS = 60.0
"""How much processor time its end may take: many times what it needs. A busy machine gives it slowly, and then waits longer."""

MOST_WRITES = 50_000
"""Writes of the application during which what is waited for has to happen: many times what any of it takes."""


@dataclass
class Child:
    """A process of the demo's, with its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, name: str, module: str, arguments: Sequence[str], log: Path) -> Child:
        """Start a module of ours in a process of its own."""
        with log.open("ab") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        return cls(name, process, log)

    def require_alive(self) -> None:
        """Raise CouldNotFinish, with the last line that the process wrote, when it has ended."""
        if self.process.poll() is not None:
            lines = self.log.read_text(errors="replace").strip().splitlines() or ["nothing"]
            raise CouldNotFinish(
                f"the demo's {self.name} ended by itself with code {self.process.returncode}: its last words in"
                f" {self.log} are {lines[-1]!r}"
            )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.require_alive()
        self.process.send_signal(number)

    def end(self) -> int:
        """Ask the process to end, insist where it does not, and return its exit code."""
        if self.process.poll() is None:
            self.process.terminate()
            used, patience = cpu_seconds(self.process.pid), Patience(lambda: cpu_seconds(self.process.pid))
            while self.process.poll() is None:
                if patience.ends(STILL_SECONDS) or cpu_seconds(self.process.pid) - used > CPU_SECONDS:
                    self.process.kill()
                time.sleep(0.02)
        return self.process.returncode


@dataclass
class ApplicationProcess:
    """The demo's application as seen from outside: its status file."""

    child: Child
    status_file: Path

    @classmethod
    def start(cls, spec: Path, folder: Path, rows: int) -> ApplicationProcess:
        """Start it and wait for its first writes."""
        status = folder / "application.json"
        child = Child.start(
            "application",
            "changeover.demo.application",
            [str(spec), str(status), str(rows)],
            folder / "application.log",
        )
        started = cls(child, status)
        try:
            started.wait_for("its first writes", lambda status: status["writes"] > 0)
        except BaseException:
            child.end()
            raise
        return started

    def status(self) -> dict[str, Any]:
        """Return what it says of itself; empty before it has said anything."""
        try:
            status: dict[str, Any] = json.loads(self.status_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return status

    def wait_for(self, what: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Wait until its status fulfils a condition; raises CouldNotFinish when it says nothing new, or has written much since."""
        patience = Patience(self.status)
        begun = self.status().get("writes", 0)
        while not ((status := self.status()) and condition(status)):
            self.child.require_alive()
            sign = f"the demo's application: no sign of {what}, see {self.child.log}"
            patience.require(sign)
            if status and (more := status["writes"] - begun) > MOST_WRITES:
                raise CouldNotFinish(f"{sign}; it has made {more:,} writes meanwhile")
            time.sleep(0.05)
        return status

    def end(self) -> dict[str, Any]:
        """End it; return its last status."""
        self.child.end()
        return self.status()


def capture(spec: Path, folder: Path) -> Child:
    """Start the service that spools the change stream."""
    return Child.start("capture", "changeover.jobs.capture.service", [str(spec)], folder / "capture.log")
