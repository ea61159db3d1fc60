"""The entry of `spark-submit jobs/backfill.py SPEC`, which is the command `changeover backfill`.

The command line has the options, the answer and the exit code. The backfill itself is in `changeover.jobs.load.copier`.
"""

from __future__ import annotations

import sys

from changeover.cli.main import main as command


def main() -> None:
    """Run the command with this process's arguments."""
    command(args=["backfill", *sys.argv[1:]])


if __name__ == "__main__":
    main()
