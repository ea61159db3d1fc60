"""What a benchmark found, and its one line of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CaseResult:
    """One case's medians in seconds."""

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

    def to_json(self) -> str:
        """Return the benchmark's one line; `versus` is ours divided by the peer's, so below 1 is ahead."""
        cases = [
            {
                "case": one.case,
                "ours_s": round(one.ours, 3),
                "peers": {name: round(seconds, 3) for name, seconds in one.peers.items()},
                "versus": {name: round(one.ours / seconds, 3) for name, seconds in one.peers.items()},
            }
            for one in self.cases
        ]
        return json.dumps({"benchmark": self.benchmark, "rows": self.rows, "cases": cases, "peak_rss_mb": dict(self.peak_rss_mb)})

    def as_table(self) -> str:
        """Return the result for a person."""
        lines = [f"{self.rows} rows, medians in seconds; versus = ours / peer"]
        for one in self.cases:
            peers = ", ".join(f"{name} {seconds:.2f} (versus {one.ours / seconds:.2f})" for name, seconds in one.peers.items())
            lines.append(f"{one.case:12} ours {one.ours:.2f}, {peers}")
        return "\n".join([*lines, "peak memory in MiB: " + ", ".join(f"{k} {v}" for k, v in self.peak_rss_mb.items())])
