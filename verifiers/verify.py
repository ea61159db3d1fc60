"""The entry of `spark-submit verifiers/verify.py SPEC`, which is the command `changeover verify`.

The command line has the options, the answer and the exit code. The verification itself is in `changeover.verifiers.verification`.
"""

from __future__ import annotations

import sys

from changeover.cli.main import main as command


def main() -> None:
    """Run the command with this process's arguments."""
    command(args=["verify", *sys.argv[1:]])


if __name__ == "__main__":
    main()
