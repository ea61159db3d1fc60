"""Entry of the scripts that `spark-submit` runs from a checkout: the same command, the same arguments, the same exit codes."""

from __future__ import annotations

import sys


def run_step(step: str) -> None:
    """Run a step of the command line with the script's own arguments."""
    from changeover.cli import main

    main(args=[step, *sys.argv[1:]], prog_name=f"jobs/{step}.py")
