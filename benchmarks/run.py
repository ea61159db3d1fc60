"""Run a benchmark: `python benchmarks/run.py copy --rows 2000000 --json`.

The last line on standard output is always one JSON object; progress goes to standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from benchmarks.result import Result


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
    from benchmarks.copy_case import measure

    _print(measure(rows, repeat, cases), as_json)


@main.command()
@click.option("--rows", default=400_000, show_default=True, type=click.IntRange(10), help="Single-row changes of the backlog.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Timed runs of each party; the median counts.")
@click.option("--case", "cases", multiple=True, type=click.Choice(["random", "hot"]), help="Cases; all unless named.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON object alone.")
def catchup(rows: int, repeat: int, cases: tuple[str, ...], as_json: bool) -> None:
    """Bring a backlog of changes into the new store, beside PostgreSQL's own logical replication."""
    from benchmarks.catchup_case import measure

    _print(measure(rows, repeat, cases), as_json)


@main.command()
@click.option(
    "--rows", default=1_000_000, show_default=True, type=click.IntRange(1), help="Rows of the backfill beside the writer."
)
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Backfills; their samples count together.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0.1), help="Of writing at rest, after each.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON object alone.")
def writer(rows: int, repeat: int, seconds: float, as_json: bool) -> None:
    """Time an application's dual write beside a backfill and at rest, beside a plain upsert."""
    from benchmarks.writer_case import measure

    _print(measure(rows, repeat, seconds), as_json)


@main.command()
@click.option("--rate", default=1000, show_default=True, type=click.IntRange(4), help="Changes a second.")
@click.option("--rows", default=1, show_default=True, type=click.IntRange(1), help="Changes of one transaction.")
@click.option("--seconds", default=20.0, show_default=True, type=click.FloatRange(1), help="How long each party follows.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON object alone.")
def lag(rate: int, rows: int, seconds: float, as_json: bool) -> None:
    """How long a change takes to be seen in the new store under a steady writer, beside PostgreSQL's own logical replication."""
    from benchmarks.lag_case import measure

    _print(measure(rate, seconds, rows), as_json)


@main.command()
@click.option("--calls", default=5_000, show_default=True, type=click.IntRange(10), help="Timed calls of each party and case.")
@click.option("--repeat", default=3, show_default=True, type=click.IntRange(1), help="Timed runs of each; the median counts.")
@click.option(
    "--writes", default=500, show_default=True, type=click.IntRange(1), help="Writes of each of eight threads, six times."
)
@click.option("--json", "as_json", is_flag=True, help="Print the JSON object alone.")
def router(calls: int, repeat: int, writes: int, as_json: bool) -> None:
    """What the router adds to a read and a write, beside the LaunchDarkly SDK's Migrator; seconds beyond the bare call."""
    from benchmarks.router_case import measure

    _print(measure(calls, repeat, writes), as_json)


@main.command()
@click.option("--fences", default=20, show_default=True, type=click.IntRange(2), help="Handovers, in turn there and back.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON object alone.")
def fence(fences: int, as_json: bool) -> None:
    """How long a handover holds up a writer, beside the longest of its calls without one."""
    from benchmarks.fence_case import measure

    _print(measure(fences), as_json)


def _print(result: Result, as_json: bool) -> None:
    if not as_json:
        click.echo(result.as_table())
    click.echo(result.to_json())


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # the folder of this file holds no packages of its own
    main()
