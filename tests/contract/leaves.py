"""The outcome of a run of the harness, by leaves: names of tests that have no tests below them, as its output has them.

Some leaves are several cases of one name, such as three of the stage shadow; one passes where all of its cases do. The harness's
JUnit file can't tell, for it keeps one outcome of all cases of a name.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

STARTED = re.compile(r"^\[(.+)\]$", re.M)
FAILED = re.compile(r"^  FAILED(?: \(non-critical\))?: (.+)$", re.M)
SKIPPED = re.compile(r"^  SKIPPED: (.+?)(?: \(.*\))?$", re.M)

ORDERS = ("concurrent", "serial", "random")
BY_DESIGN = frozenset({
    # the answers differ, so each store is asked again until they agree or that is a mismatch: more than one call
    "migrations/executes reads/read shadow",
    "migrations/executes reads/read live",
    # the authority's error is the caller's at once, and the other store isn't asked
    *(
        f"migrations/tracks latency/with execution order {order}/unless read in stage {stage} fails"
        for order in ORDERS
        for stage in ("shadow", "live")
    ),
})  # fmt: skip
"""Where the router does on purpose what the SDK's own Migrator doesn't."""


@dataclass(frozen=True)
class Leaves:
    """The cases of each leaf that ran, and those that failed."""

    ran: Counter[str]
    failed: Counter[str]

    @classmethod
    def of(cls, output: str, group: str) -> Leaves:
        """Read what the harness wrote of a group of tests."""
        started = [name for name in STARTED.findall(output) if name.startswith(f"{group}/")]
        parents = {name.rpartition("/")[0] for name in started}
        ran = Counter(name for name in started if name not in parents and name not in set(SKIPPED.findall(output)))
        return cls(ran, Counter(name for name in FAILED.findall(output) if name in ran))

    @property
    def unexpected(self) -> list[str]:
        """Return the leaves that failed and are not to."""
        return sorted(set(self.failed) - BY_DESIGN)

    def __str__(self) -> str:
        """Say how many passed, and name the others."""
        failed = [f"\n  {'by design' if name in BY_DESIGN else 'FAILED'}: {name}" for name in sorted(self.failed)]
        cases = f"{self.ran.total() - self.failed.total()} of {self.ran.total()} cases"
        return f"{len(self.ran) - len(self.failed)} of {len(self.ran)} leaves passed, {cases}{''.join(failed)}"
