"""Peak memory of a process and all its children, sampled from /proc while something runs.

The figure is the greatest sum of resident sets (VmRSS) seen, so pages that processes share are counted once for each of
them, and a peak shorter than the interval can be missed. A party is one process tree: Python, its JVM, its workers and
the programs it starts; the database server is not part of it.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

INTERVAL = 0.1
PAGE = os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Samples the tree under a process in a thread of its own while the context is open."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.peak = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, resident(self.pid))
            if self._end.wait(INTERVAL):
                return


def resident(root: int) -> int:
    """Return the bytes resident in the process tree under `root` now."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat, memory = (entry / "stat").read_text(), (entry / "statm").read_text()
            except OSError:
                continue  # it has ended since
            parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
            sizes[int(entry.name)] = int(memory.split()[1]) * PAGE
    return sum(size for pid, size in sizes.items() if _under(pid, root, parents))


def _under(pid: int, root: int, parents: dict[int, int]) -> bool:
    while pid and pid != root:
        pid = parents.get(pid, 0)
    return pid == root
