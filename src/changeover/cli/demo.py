"""The command `changeover demo`: its options, and its answer.

The demo itself is in `changeover.demo`, which knows no command line.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from changeover.cli.command import HELP, Command
from changeover.demo.damage import KINDS
from changeover.demo.schema import LEAST_ROWS, ROWS_BY_DEFAULT


@click.command(cls=Command, context_settings=HELP, example="changeover demo --rows 200000 --keep")
@click.option(
    "--rows", default=ROWS_BY_DEFAULT, show_default=True, type=click.IntRange(min=LEAST_ROWS), help="Rows of the old table."
)
@click.option(
    "--break", "broken", type=click.Choice(list(KINDS)), multiple=True, help="Damage the new store; verify finds it; exit 1."
)
@click.option("--keep", is_flag=True, help="Leave server and data, and print the next commands to try.")
@click.option("--work", type=click.Path(path_type=Path), help="A new folder for everything; otherwise a temporary one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output, all else on standard error.")
def main(rows: int, broken: tuple[str, ...], keep: bool, work: Path | None, as_json: bool) -> None:
    """Move a live table to PostgreSQL and Delta on this machine, verify it, and hand it over."""
    from rich.console import Console

    from changeover.demo.flow import demo

    outcome = demo(rows=rows, broken=broken, keep=keep, work=work, console=Console(stderr=as_json))
    if as_json:
        click.echo(json.dumps(outcome.document(), ensure_ascii=False))
    sys.exit(outcome.exit_code)
