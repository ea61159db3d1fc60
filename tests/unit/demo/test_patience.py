"""Patience: a wait lasts while anything moves, and a process that was asked to end is given the processor time that it needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from changeover.demo import patience, processes
from changeover.demo.patience import Patience, cpu_seconds
from changeover.demo.processes import Child
from changeover.errors import CouldNotFinish

SLOW_END = """
import signal, sys, time
ends = []
signal.signal(signal.SIGTERM, lambda *_: ends.append(1))
print("ready", flush=True)
while not ends:
    time.sleep(0.01)
until = time.process_time() + 1.0
while time.process_time() < until:
    pass
sys.exit(7)
"""
"""A program whose end takes a second of processor time."""

NO_END = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('ready', flush=True)\ntime.sleep(600)"


def child_of(program: str, tmp_path: Path) -> Child:
    process = subprocess.Popen([sys.executable, "-u", "-c", program], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    return Child("helper", process, tmp_path / "helper.log")


def test_a_wait_lasts_while_anything_moves_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "STILL_SECONDS", 0.0)
    moving, still = Patience(partial(next, count())), Patience(lambda: 1)
    for one in (moving, moving, still):
        one.require("the lake is behind")
        time.sleep(0.01)
    with pytest.raises(CouldNotFinish, match=r"the lake is behind, and nothing has moved for 0 s"):
        still.require("the lake is behind")


def test_a_process_has_the_processor_time_that_it_used() -> None:
    before, until = cpu_seconds(os.getpid()), time.process_time() + 0.1
    while time.process_time() < until:
        pass
    assert cpu_seconds(os.getpid()) - before >= 0.05
    assert cpu_seconds(2**22 + 1) == 0.0


def test_a_process_that_works_on_its_end_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processes, "STILL_SECONDS", 60.0)
    assert child_of(SLOW_END, tmp_path).end() == 7


@pytest.mark.parametrize(("still", "used"), [(0.2, 60.0), (60.0, -1.0)], ids=["it does nothing", "it has had its time"])
def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, still: float, used: float) -> None:
    monkeypatch.setattr(processes, "STILL_SECONDS", still)
    monkeypatch.setattr(processes, "CPU_SECONDS", used)
    assert child_of(NO_END, tmp_path).end() == -signal.SIGKILL
