"""Mismatched reads on record: the last hundred of a migration, by name and place, with no value of a row but one that is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ldclient.migrations.types import Origin
from psycopg import sql
from psycopg.conninfo import make_conninfo

from changeover import api
from changeover.errors import StepOrder
from changeover.flags.shadow.comparisons import Comparisons
from changeover.flags.shadow.positions import LedgerPositions
from changeover.jobs.access import privileges
from changeover.jobs.ledger import readdifferences
from changeover.jobs.ledger.ledger import drop_ledger
from changeover.jobs.ledger.readdifferences import KEPT, ReadDifference
from changeover.jobs.ledger.records import Stream
from changeover.position import parse_lsn
from changeover.spec import load
from tests.support.fix_flags import MIGRATION, PATIENCE, Stores, wait_until
from tests.support.fix_shadow import EVERYTHING, MakeComparisons, Recorded, offer, offered, put

SECRET = "a note that nobody else may read"


def on_record(stores: Stores) -> list[ReadDifference]:
    return readdifferences.recorded(stores.ledger.connection, MIGRATION)


def mismatch(stores: Stores, comparisons: Comparisons, experiment: Recorded) -> None:
    """Compare a read of a row that the new store lacks, and that nobody writes."""
    offered(stores, EVERYTHING, "0/0")
    offer(comparisons, experiment, [{"subject": 1, "note": SECRET}])
    assert comparisons.drain(PATIENCE)
    assert experiment.results[-1].mismatched


def test_a_mismatch_is_on_record_without_a_value(stores: Stores, by_position: Comparisons) -> None:
    put(stores, Origin.OLD, 1, SECRET)
    mismatch(stores, by_position, Recorded())
    wait_until(lambda: on_record(stores))
    [one] = on_record(stores)
    assert (one.experiment, one.stage, one.authority, one.looks, one.description) == ("read", "shadow", "old", 2, None)
    row = stores.old.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    assert 0 < parse_lsn(str(one.position)) <= parse_lsn(row[0])
    whole = stores.ledger.connection.execute("SELECT r::text FROM changeover.read_difference r").fetchall()
    assert SECRET not in str(whole)


def test_what_matches_is_ignored_or_inconclusive_is_not_on_record(stores: Stores, by_position: Comparisons) -> None:
    class Lenient(Recorded):
        def ignore(self, old: Any, new: Any) -> bool:
            return True

    offered(stores, EVERYTHING, EVERYTHING)
    answers = iter(range(100))
    put(stores, Origin.OLD, 1, "here alone")
    for experiment, control, more in (
        (Recorded(), [], None),
        (Lenient(), [{"subject": 1, "note": "here alone"}], None),
        (Recorded(), 0.5, dict.fromkeys(Origin, lambda cursor: next(answers))),
    ):
        offer(by_position, experiment, control, reads=more)
    assert by_position.drain(PATIENCE)
    by_position.close()
    assert on_record(stores) == []


def test_an_experiment_may_name_its_reads_in_its_own_words(stores: Stores, by_position: Comparisons) -> None:
    class Named(Recorded):
        name = "a user's channels"

        def describe(self, old: Any, new: Any) -> str:
            assert (len(old), len(new)) == (1, 0)
            return f"user {old[0]['subject']}" + " " * 10_000

    class Failing(Recorded):
        def describe(self, old: Any, new: Any) -> str:
            raise KeyError("no such name")

    put(stores, Origin.OLD, 1, SECRET)
    failing = Failing()
    mismatch(stores, by_position, Named())
    mismatch(stores, by_position, failing)
    by_position.close()
    newest, first = on_record(stores)
    assert (first.experiment, str(first.description).strip(), len(str(first.description))) == ("a user's channels", "user 1", 200)
    assert (newest.experiment, newest.description, failing.failures) == ("read", None, ["describe"])
    assert str(first).startswith("a user's channels (user 1")


def test_the_last_hundred_of_each_migration_are_kept(stores: Stores) -> None:
    ledger = stores.ledger.connection
    kept = [ReadDifference(f"read {number}", "shadow", "old", 2, "0/10", None) for number in range(KEPT + 50)]
    readdifferences.record(ledger, "another", kept[:3])
    for start in range(0, len(kept), 40):
        readdifferences.record(ledger, MIGRATION, kept[start : start + 40])
    assert [one.experiment for one in on_record(stores)] == [one.experiment for one in reversed(kept)][:KEPT]
    assert len(readdifferences.recorded(ledger, "another")) == 3
    drop_ledger(ledger, MIGRATION)
    assert (on_record(stores), len(readdifferences.recorded(ledger, "another"))) == ([], 3)


def test_what_can_not_be_put_on_record_is_counted_and_comes_when_it_can(stores: Stores, by_position: Comparisons) -> None:
    ledger = stores.ledger.connection
    put(stores, Origin.OLD, 1, SECRET)
    ledger.execute("ALTER TABLE changeover.read_difference RENAME TO away")
    mismatch(stores, by_position, Recorded())
    wait_until(lambda: by_position.counters()["unrecorded"])
    assert by_position.counters()["mismatched"] == 1
    ledger.execute("ALTER TABLE changeover.away RENAME TO read_difference")
    wait_until(lambda: on_record(stores))
    assert len(on_record(stores)) == 1


@pytest.fixture
def role(stores: Stores) -> Iterator[str]:
    """Make a role that has a router's rights in the ledger, and no others."""
    name, ledger = "reader_of_follows", stores.ledger.connection
    ledger.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'p'").format(sql.Identifier(name)))
    for need in privileges.of_ledger(name):
        ledger.execute(need.grant)
    yield name
    ledger.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


def test_the_rights_of_a_router_are_enough(stores: Stores, role: str, make_comparisons: MakeComparisons) -> None:
    dsn = make_conninfo(stores.new_dsn, user=role, password="p")
    positions = LedgerPositions({}, dsn, MIGRATION, "new", "test")
    positions.record([ReadDifference(f"read {number}", "shadow", "old", 2, None, None) for number in range(KEPT + 1)])
    positions.close()
    assert len(on_record(stores)) == KEPT


SPEC = """
name = "follows"
[source]
dsn = "env:OLD_DSN"
[target.new]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "public.follows"
target = "public.associations"
key = ["subject", "object"]
[work]
path = "{folder}"
"""


def test_python_has_them(stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD_DSN", stores.old_dsn)
    monkeypatch.setenv("NEW_DSN", stores.new_dsn)
    path = tmp_path / "follows.toml"
    path.write_text(SPEC.format(folder=tmp_path))
    spec = load(path)
    with pytest.raises(StepOrder):
        api.read_differences(spec)
    stores.ledger.record_migration(spec, Stream(0, "1", 1, "none", "none", "none", "none"))
    assert api.read_differences(spec) == []
    readdifferences.record(stores.ledger.connection, MIGRATION, [ReadDifference("read", "live", "new", 4, None, "user 7")])
    [one] = api.read_differences(spec)
    assert (one.experiment, one.stage, one.authority, one.description) == ("read", "live", "new", "user 7")
