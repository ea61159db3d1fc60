"""What a benchmark found, and its one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DIGITS = 6
"""Of seconds: a single statement takes some ten thousandths of one."""


UNITS = {"s": 1, "us": 1_000_000}


@dataclass(frozen=True)
class CaseResult:
    """One case's figures in seconds: medians, or the percentile that the case is named after."""

    case: str
    ours: float
    peers: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """What a benchmark found: seconds, and MiB."""

    benchmark: str
    rows: int
    cases: Sequence[CaseResult]
    peak_rss_mb: Mapping[str, int]
    unit: str = "s"
    """In which the JSON has the figures: `s`, or `us` where a call is what is timed."""

    def to_json(self) -> str:
        """Return the benchmark's one line; `versus` is ours divided by the peer's, so below 1 is ahead."""
        factor = UNITS[self.unit]
        cases = [
            {
                "case": one.case,
                f"ours_{self.unit}": round(one.ours * factor, DIGITS),
                "peers": {name: round(seconds * factor, DIGITS) for name, seconds in one.peers.items()},
                "versus": {name: round(one.ours / seconds, 3) for name, seconds in one.peers.items()},
            }
            for one in self.cases
        ]
        return json.dumps({"benchmark": self.benchmark, "rows": self.rows, "cases": cases, "peak_rss_mb": dict(self.peak_rss_mb)})

    def as_table(self) -> str:
        """Return the result for a person."""
        lines = [f"{self.rows} rows, seconds; versus = ours / peer"]
        for one in self.cases:
            peers = ", ".join(f"{name} {_short(seconds)} (versus {one.ours / seconds:.2f})" for name, seconds in one.peers.items())
            lines.append(f"{one.case:12} ours {_short(one.ours)}, {peers}")
        return "\n".join([*lines, "peak memory in MiB: " + ", ".join(f"{k} {v}" for k, v in self.peak_rss_mb.items())])


def _short(seconds: float) -> str:
    """Return seconds in three figures."""
    return f"{seconds:.2f}" if seconds >= 0.1 else f"{seconds:.3g}"
