"""The stress in its short form: no wrong key under the product's rules, and a wrong one soon where a rule is taken away.

`make stress` runs the long form; `--stress-trials` says how many trials the short one has.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from changeover.embedded.server import EmbeddedServer
from tests.stress.field import Field
from tests.stress.mutants import RELIABLE
from tests.stress.series import mutated, series
from tests.stress.source import V0, Source
from tests.support.fix_postgres import fresh_database

TRIALS_OF_A_MUTANT = 200


@pytest.fixture(scope="module")
def place(server: EmbeddedServer) -> Iterator[Field]:
    """Yield the field on which all trials run, one after the other."""
    with fresh_database(server, "stress") as dsn, Field.on(dsn) as made:
        yield made


def drawn_seed() -> int:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown when it fails
    return seed


def test_no_key_is_wrong_whoever_works_beside_whom(place: Field, pytestconfig: pytest.Config) -> None:
    trials = pytestconfig.getoption("stress_trials")
    found = series(place, trials, drawn_seed())
    assert found.wrong_trials == 0, found.first
    assert found.trials == trials
    assert found.writes > 100 * trials
    assert found.collected > 5 * trials, "a collection that finds nothing shows nothing"


@pytest.mark.parametrize("name", RELIABLE)
def test_a_rule_that_is_taken_away_makes_a_wrong_key(place: Field, name: str) -> None:
    with mutated(place, RELIABLE[name]):
        found = series(place, TRIALS_OF_A_MUTANT, drawn_seed(), until_wrong=True)
    assert found.wrong_trials == 1, f"{found.trials} trials, {found.writes} gated writes, and nothing went wrong"


def test_the_source_is_one_that_could_be() -> None:
    crossed = 0
    for seed in range(50):
        source = Source.run(random.Random(seed), 20, 40, 1)
        rows = dict(source.images)
        last: dict[int, int] = {}
        history = sorted([*((write.event, write) for write in source.writes), *((at, None) for at in source.truncates)])
        for version, write in history:
            assert version > V0
            if write is None:
                rows.clear()
                last = dict.fromkeys(range(20), version.lsn)
                continue
            assert last.get(write.key, 0) < write.direct.lsn < write.event.lsn, "a key's row is locked from write to commit"
            last[write.key] = version.lsn
            if write.note is None:
                del rows[write.key]
            else:
                rows[write.key] = write.note
        assert rows == source.rows
        placed = [write.direct.lsn for write in source.writes]
        crossed += placed != sorted(placed)
    assert crossed > 40, "transactions commit in another order than they wrote in"
