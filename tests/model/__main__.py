"""The model on a terminal: every world with its figures, or a mutant's shortest schedule.

`python -m tests.model` explores all worlds under the product's rules; `python -m tests.model NAME` explores the mutant of that
name, or all whose names contain it. The exit code is 1 where a world went wrong, or a mutant did not.
"""

from __future__ import annotations

import sys

from tests.model.kernel import explore
from tests.model.mutants import MUTANTS
from tests.model.report import lines
from tests.model.worlds import WORLDS, explored


def main(wanted: str = "") -> int:
    """Print and judge."""
    if not wanted:
        results = [explored(name) for name in WORLDS]
        print("\n".join(lines(dict(zip(WORLDS, results, strict=True)))))
        return int(any(result.wrong for result in results))
    alive = 0
    for name, mutant in MUTANTS.items():
        for world in mutant.worlds if wanted in name else ():
            found = explore(WORLDS[world](mutant.rules)).wrong
            print(f"{name}, in the world {world}\n{found}\n")
            alive += found is None
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
