"""What the guide shows for statsd and OpenTelemetry is what runs here, ten lines each: over UDP, and against a meter."""

from __future__ import annotations

import re
import socket
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ldclient.migrations.types import Origin

from changeover.flags.shadow.experiment import Experiment
from tests.support.fix_flags import PATIENCE, Stores
from tests.support.fix_shadow import MakeComparisons, offer, put

GUIDE = Path(__file__).parents[4] / "docs/guides/router.md"


def shown(name: str) -> tuple[str, dict[str, Any]]:
    """Return the guide's code that has a class of a name, and what it defines."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)
    [text] = [block for block in blocks if f"class {name}(" in block]
    defined: dict[str, Any] = {}
    exec(compile(text, str(GUIDE), "exec"), defined)
    return text, defined


def lines_of_code(text: str) -> int:
    return sum(bool(line.strip()) and not line.startswith(("import", "from")) for line in text.splitlines())


def three_reads(stores: Stores, make_comparisons: MakeComparisons, experiment: Experiment) -> None:
    """Compare a read that matches, one that does not, and one of which the new store has no answer."""
    comparisons = make_comparisons(waits=())
    put(stores, Origin.OLD, 1, "here alone")
    offer(comparisons, experiment, [], beside={"cache": list})
    offer(comparisons, experiment, [{"subject": 1, "note": "here alone"}])
    offer(comparisons, experiment, [], reads=dict.fromkeys(Origin, lambda cursor: 1 / 0))
    assert comparisons.drain(PATIENCE)


EXPECTED = {("store", "matched"): 1, ("store", "mismatched"): 1, ("store", "failed"): 1, ("cache", "matched"): 1}


def test_statsd(stores: Stores, make_comparisons: MakeComparisons) -> None:
    text, defined = shown("Statsd")
    assert lines_of_code(text) <= 10
    sender = defined["Statsd"].to
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(PATIENCE)

        class Here:
            """Sends where the test listens."""

            def sendto(self, datagram: bytes, address: tuple[str, int]) -> None:
                assert address == ("127.0.0.1", 8125)
                sender.sendto(datagram, server.getsockname())

        defined["Statsd"].to = Here()
        three_reads(stores, make_comparisons, defined["Statsd"]())
        datagrams = [server.recv(4096).decode() for _ in range(sum(EXPECTED.values()))]
    sender.close()
    counts: Counter[tuple[str, str]] = Counter()
    for datagram in datagrams:
        counted, took = datagram.split("\n")
        _, _, candidate, outcome = counted.removesuffix(":1|c").split(".")
        counts[candidate, outcome] += 1
        assert re.fullmatch(rf"reads\.read\.{candidate}\.candidate:[0-9.]+\|ms", took)
    assert counts == EXPECTED


class Instrument:
    """Keeps what is recorded, as a counter or a histogram."""

    def __init__(self) -> None:
        self.recorded: list[tuple[float, dict[str, str]]] = []

    def add(self, amount: float, attributes: dict[str, str]) -> None:
        self.recorded.append((amount, attributes))

    record = add


class Meter:
    """Makes instruments, by the API's own words."""

    def create_counter(self, name: str, unit: str = "", description: str = "") -> Instrument:
        return Instrument()

    create_histogram = create_counter


def test_opentelemetry(stores: Stores, make_comparisons: MakeComparisons, monkeypatch: pytest.MonkeyPatch) -> None:
    package, metrics = types.ModuleType("opentelemetry"), types.ModuleType("opentelemetry.metrics")
    vars(metrics)["get_meter"] = lambda name: Meter()
    vars(package)["metrics"] = metrics
    monkeypatch.setitem(sys.modules, "opentelemetry", package)
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", metrics)
    text, defined = shown("Measured")
    assert lines_of_code(text) <= 10
    three_reads(stores, make_comparisons, defined["Measured"]())
    counts = Counter({(of["candidate"], of["outcome"]): amount for amount, of in defined["reads"].recorded})
    assert counts == EXPECTED
    assert all(seconds >= 0 for seconds, _ in defined["took"].recorded)
    assert len(defined["took"].recorded) == 4
