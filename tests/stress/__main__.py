"""The stress on a terminal: `python -m tests.stress --trials 500`, or mutants by name with `--mutant NAME`.

Without a name the product's own rules are run, and the exit code is 1 where a key is wrong. With one (`all` for every mutant) each
mutant runs until a key is wrong, for so many trials at most, and the exit code is 1 where none was.
"""

from __future__ import annotations

import sys
import time

import click

from tests.stress.field import Field
from tests.stress.mutants import MUTANTS
from tests.stress.series import Series, mutated, series
from tests.support.fix_postgres import default_binaries, fresh_database, passing_server


@click.command()
@click.option("--trials", default=500, show_default=True, type=click.IntRange(1), help="Trials, of each mutant at most.")
@click.option("--mutant", "wanted", default="", help="A mutant's name or a part of it; all for every one.")
@click.option("--seed", default=None, type=int, help="The first trial's seed; random unless given.")
def main(trials: int, wanted: str, seed: int | None) -> None:
    """Run trials and judge them."""
    seed = time.time_ns() % 2**32 if seed is None else seed
    with passing_server(default_binaries()) as server, fresh_database(server, "stress") as dsn, Field.on(dsn) as place:
        if not wanted:
            found = series(place, trials, seed)
            click.echo(told(found, seed))
            sys.exit(int(found.wrong_trials > 0))
        names = [name for name in MUTANTS if wanted == "all" or wanted in name]
        alive = 0
        for name in names:
            with mutated(place, MUTANTS[name]):
                found = series(place, trials, seed, until_wrong=True)
            alive += not found.wrong_trials
            click.echo(f"{name:45} {told(found, seed)}")
    sys.exit(int(bool(alive) or not names))


def told(found: Series, seed: int) -> str:
    """Return a series in one line, and its first wrong key."""
    wrong = f"; {found.first}" if found.first else ""
    return (
        f"{found.trials} trials, {found.writes:,} gated writes, {found.collected:,} row versions collected, {found.wrong_trials}"
        f" with wrong keys, {found.seconds:.1f} s, seed {seed}{wrong}"
    )


if __name__ == "__main__":
    main()
