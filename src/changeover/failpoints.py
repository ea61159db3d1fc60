"""Failpoints: named points of the pipeline at which a test stops a run to kill it, as its users' machines will.

`reach` does nothing unless the environment names the point: then it writes a file, so that the test knows, and waits to be
killed. The points are part of the resume contract (`docs/internals/invariants.md`), so their names do not change lightly.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "CHANGEOVER_WAIT_AT"
"""``point:file``: where to wait, and the file that says so."""


def reach(point: str, detail: object = "") -> None:
    """Pass a named point (driver or task).

    Args:
        point: The point's name.
        detail: What is told of it in the file, where the point is the chosen one.
    """
    chosen, _, file = os.environ.get(VARIABLE, "").partition(":")
    if chosen != point:
        return
    with Path(file).open("a", encoding="utf-8") as reached:  # tasks of one run may arrive together
        reached.write(f"{point} {detail}\n")
    while True:
        time.sleep(60)
