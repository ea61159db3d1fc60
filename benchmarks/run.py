"""Run a benchmark: `python benchmarks/run.py copy --rows 2000000 --json`.

The last line on standard output is always one JSON object; progress goes to standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.group()
def main() -> None:
    """Measure the product against what one would use without it."""


@main.command()
@click.option("--rows", default=2_000_000, show_default=True, type=click.IntRange(1), help="Rows of the source table.")
@click.option(
    "--repeat",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Timed runs of each party; the median counts.",
)
@click.option(
    "--case",
    "cases",
    multiple=True,
    type=click.Choice(["identity", "transformed", "delta"]),
    help="Cases; all unless named.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the JSON object alone.")
def copy(rows: int, repeat: int, cases: tuple[str, ...], as_json: bool) -> None:
    """Copy the follows table: PostgreSQL to PostgreSQL as it is, transformed, and to Delta."""
    from benchmarks.copy_case import as_table, measure

    result = measure(rows, repeat, cases)
    if not as_json:
        click.echo(as_table(result))
    click.echo(result.to_json())


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # the folder of this file holds no packages of its own
    main()
