"""LaunchDarkly's contract tests of migrations, asked of the router: `HARNESS=path/to/sdk-test-harness python -m tests.contract`.

It starts a server with both stores and the service, runs the harness against it, and counts the leaves of the group. The exit
code is 0 where none failed but those that differ by design.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import click

from tests.contract.leaves import Leaves
from tests.contract.payloads import Payloads
from tests.contract.protocol import serving
from tests.support.fix_postgres import default_binaries, passing_server

GROUP = "migrations"


@click.command()
@click.option("--harness", envvar="HARNESS", required=True, type=click.Path(exists=True, dir_okay=False), help="The program.")
@click.option("--run", "pattern", default=f"^{GROUP}$", show_default=True, help="Which tests, as the harness takes it.")
@click.option("--port", default=8111, show_default=True, help="On which port of this machine the harness listens, for callbacks.")
def main(harness: str, pattern: str, port: int) -> None:
    """Run the harness and judge what it says."""
    logging.disable(logging.WARNING)  # a router without a ledger, a flag that is missing: each test has its own
    with passing_server(default_binaries()) as server, Payloads.on(server) as stores, serving(stores) as address:
        command = [os.path.abspath(harness), "-url", address, "-host", "127.0.0.1", "-port", str(port), "-run", pattern]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
            lines = []
            for line in running.stdout or ():
                lines.append(line)
                click.echo(line, nl=False)
    leaves = Leaves.of("".join(lines), GROUP)
    click.echo(f"\n{leaves}")
    sys.exit(int(not leaves.ran or bool(leaves.unexpected)))


if __name__ == "__main__":
    main()
