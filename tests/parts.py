"""`make test`: the suite's two parts side by side, as a machine with two cores runs them fastest.

The tests wait more than they work. The first part says what it does while it runs, and what the second one said follows. A failure
of either is a failure of both. SIGINT and SIGTERM end both as Ctrl-C ends one, with their servers. Words after the command go to
both runs of pytest.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from types import FrameType

from tests.support.fix_parts import OTHERS, SPARK

NO_TESTS = 5
"""pytest's exit code where it was to run no test: a part may have none of those that were asked for."""

INTERRUPTED = 130


def main(words: Sequence[str]) -> int:
    """Run both parts and return the exit code: that of the first part that failed, or 130 after a signal."""
    runs: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        for run in runs:
            if run.poll() is None:
                run.send_signal(signal.SIGINT)

    # with a handler of ours the runs are not deaf to SIGINT, even where we were started in the background
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    with tempfile.TemporaryFile() as later:
        runs.append(started(OTHERS, words, later.fileno()))
        runs.append(started(SPARK, words, None))
        if signals:
            end(signals[0], None)
        codes = [run.wait() for run in reversed(runs)]
        later.seek(0)
        print(f"\n{'=' * 30} the part {OTHERS} {'=' * 30}", flush=True)
        shutil.copyfileobj(later, sys.stdout.buffer)
        sys.stdout.flush()
    return INTERRUPTED if signals else outcome(codes)


def started(part: str, words: Sequence[str], output: int | None) -> subprocess.Popen[bytes]:
    """Start a part in a process group of its own, so that a terminal's Ctrl-C reaches it once, from here."""
    command = [sys.executable, "-m", "pytest", "--part", part, *words]
    return subprocess.Popen(
        command, stdout=output, stderr=None if output is None else subprocess.STDOUT, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def outcome(codes: Sequence[int]) -> int:
    """Return the first code that is a failure; a part without tests is none unless both are."""
    failed = [code for code in codes if code not in (0, NO_TESTS)]
    return failed[0] if failed else min(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
