"""The entry of `spark-submit jobs/replay.py SPEC`, which is the command `changeover replay`.

The command line has the options, the answer and the exit code. The replay itself is in `changeover.jobs.apply.rounds`.
"""

from __future__ import annotations

import sys

from changeover.cli.main import main as command


def main() -> None:
    """Run the command with this process's arguments."""
    command(args=["replay", *sys.argv[1:]])


if __name__ == "__main__":
    main()
