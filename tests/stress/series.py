"""Many trials in a row on one field, under the product's rules or a mutant's."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.stress.field import Field
from tests.stress.mutants import Mutant
from tests.stress.trial import Trial


@dataclass
class Series:
    """What some trials came to."""

    trials: int = 0
    writes: int = 0
    collected: int = 0
    wrong_trials: int = 0
    first: str = ""
    seconds: float = 0.0


def series(place: Field, trials: int, seed: int, *, until_wrong: bool = False) -> Series:
    """Run so many trials, or only until one is wrong."""
    found = Series()
    started = time.monotonic()
    for number in range(trials):
        ended = Trial(place, random.Random(seed + number)).run()
        found.trials += 1
        found.writes += ended.writes
        found.collected += ended.collected
        if ended.wrong:
            found.wrong_trials += 1
            found.first = found.first or f"trial {number}: {'; '.join(ended.wrong[:3])}"
            if until_wrong:
                break
    found.seconds = time.monotonic() - started
    return found


@contextmanager
def mutated(place: Field, mutant: Mutant) -> Iterator[None]:
    """Put a mutant in the place of the product's rule; the gate's function is made anew at each trial."""
    with pytest.MonkeyPatch.context() as patches:
        for target, name, value in mutant.changes:
            if isinstance(target, dict):
                patches.setitem(target, name, value)
            else:
                patches.setattr(target, name, value)
        if mutant.before:
            place.admin.execute(mutant.before.encode())
        place.mutated = True
        try:
            yield
        finally:
            place.mutated = False
            if mutant.after:
                place.admin.execute(mutant.after.encode())
