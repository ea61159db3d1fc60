"""Explain: each kind of row told as it is, in both targets, before and after finalize, and bad keys in one sentence."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
from click.testing import CliRunner, Result

from changeover.cli.main import main
from changeover.jobs.finalize import finalize
from changeover.jobs.ledger.epochs import authority_epochs
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Authority
from changeover.position import format_lsn
from changeover.verifiers.explain import _place
from tests.support.fix_accounts import loaded
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration


def run(migration: Migration, *arguments: str) -> Result:
    done = CliRunner().invoke(main, ["explain", migration.spec.path, *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done


def told(migration: Migration, *key: str) -> dict[str, Any]:
    """Return the parts of a story, as `--json` has them."""
    done = run(migration, *key, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert tuple(found["key"]) == key
    parts: dict[str, Any] = found["parts"]
    return parts


def lines(migration: Migration, *key: str) -> list[str]:
    """Return a story as a person reads it."""
    done = run(migration, *key)
    assert done.exit_code == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines()]


@pytest.fixture
def followed(migration: Migration) -> Migration:
    """Return follows in both targets: (1, 1) updated, (2, 1) deleted, (3, 1) updated but not replayed yet."""
    migration.prepare()
    migration.backfill()
    migration.old.execute("UPDATE follows SET note = 'by hand' WHERE from_user = 1 AND to_channel = 1")
    migration.old.execute("DELETE FROM follows WHERE from_user = 2 AND to_channel = 1")
    migration.catch_up()
    migration.old.execute("UPDATE follows SET note = 'on its way' WHERE from_user = 3 AND to_channel = 1")
    migration.capture()
    return migration


def test_every_kind_of_row_has_its_story(followed: Migration) -> None:
    with Ledger.open(followed.spec, "test") as ledger:
        image = f"live at 0:{format_lsn(ledger.stream('test').l0)}:-1"
    backfilled = told(followed, "40", "follows", "5")
    assert_backfilled(backfilled, image)
    assert [one.partition(",")[0] for one in backfilled["chunk"]] == [f"{t}: chunk {chunk_of(followed, t)}" for t in (LAKE, STORE)]
    assert_updated(told(followed, "1", "follows", "1"))
    assert_deleted(told(followed, "2", "follows", "1"))
    assert_under_way(told(followed, "3", "follows", "1"), image)
    never = told(followed, "9999", "follows", "1")
    assert (never["source row"], never["spooled events"], never["differences"]) == ("none", [], [])
    assert (never["store row"], never["store cell"]) == ("none", "no live write touched it")
    assert (never["lake row"], never["lake cell"]) == ("none", "none")
    assert told(followed, "0040", "follows", "5")["source row"]["from_user"] == 40, "by value, not by its text"
    assert lines(followed, "9999", "follows", "1") == [
        "associations 9999/follows/1", "source row: none", f"chunk: {LAKE}: chunk 2, {loaded_at(never, 0)}",
        f"chunk: {STORE}: chunk 2, {loaded_at(never, 1)}", "spooled events: none", "store row: none",
        "store cell: no live write touched it", "lake row: none", "lake cell: none", "differences: none", "stage: never switched",
        "authority: old store, epoch 0",
    ]  # fmt: skip


def chunk_of(migration: Migration, target: str) -> int:
    """Return in which chunk of a load (40, 5) is, by its recorded bounds."""

    def below(bound: tuple[str, ...] | None, otherwise: bool) -> bool:
        return otherwise if bound is None else tuple(map(int, bound)) <= (40, 5)

    (found,) = [one.chunk for one in migration.chunks(target) if below(one.lower, True) and not below(one.upper, False)]
    return found


def loaded_at(parts: dict[str, Any], place: int) -> str:
    found: str = parts["chunk"][place].partition(", ")[2]
    assert found.startswith("loaded 20")
    return found


def assert_backfilled(parts: dict[str, Any], image: str) -> None:
    assert parts["spooled events"] == []
    assert parts["store row"]["note"] == parts["source row"]["note"] == parts["lake row"][0]["note"]
    assert (parts["store cell"], parts["lake cell"]) == ("no live write touched it", [image])


def assert_updated(parts: dict[str, Any]) -> None:
    (event,) = parts["spooled events"]
    assert (event["op"], event["row"]["note"]) == ("U", "by hand")
    assert parts["store row"]["note"] == "by hand" == parts["lake row"][0]["note"]
    assert parts["store cell"] == f"live at {event['version']}"
    assert parts["lake cell"] == [f"live at {event['version']}"]


def assert_deleted(parts: dict[str, Any]) -> None:
    (event,) = parts["spooled events"]
    assert (event["op"], parts["source row"], parts["store row"], parts["lake row"]) == ("D", "none", "none", "none")
    assert parts["store cell"] == f"tombstone at {event['version']}"
    assert parts["lake cell"] == [f"tombstone at {event['version']}"]


def assert_under_way(parts: dict[str, Any], image: str) -> None:
    (event,) = parts["spooled events"]
    assert event["row"]["note"] == parts["source row"]["note"] == "on its way"
    assert parts["store row"]["note"] != "on its way"
    assert (parts["store cell"], parts["lake cell"]) == ("no live write touched it", [image])


def test_after_finalize_it_says_what_is_gone(followed: Migration) -> None:
    followed.replay()
    finalize(followed.spec)
    for key in (("1", "follows", "1"), ("2", "follows", "1")):
        parts = told(followed, *key)
        gone = f"none is kept since the migration was finalized at {parts['finalized']}"
        assert parts["spooled events"] == parts["store cell"] == gone
    assert parts["lake cell"] == gone
    assert (parts["store row"], parts["lake row"], parts["source row"]) == ("none", "none", "none")
    updated = told(followed, "1", "follows", "1")
    assert updated["store row"]["note"] == updated["lake row"][0]["note"] == "by hand"
    assert updated["lake cell"][0].startswith("live at 0:")
    assert any(line.startswith("finalized: 20") for line in lines(followed, "1", "follows", "1"))


def test_a_bad_key_is_one_sentence(make_migration: MakeMigration) -> None:
    made = loaded(make_migration, STORE, LAKE)
    for key, problem in (
        (("1", "2"), "no table has a key of 2 columns; the keys are: ledgers (id)"),
        (("one",), "one is no key of that table (invalid input syntax for type bigint"),
        (("99999999999999999999",), "99999999999999999999 is no key of that table (value"),
        (("1", "--table", "nowhere"), "no table is named nowhere"),
    ):
        done = run(made, *key)
        assert done.exit_code == 2, done.output
        assert problem in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert told(made, "7")["stage"] == "never switched"


def test_an_event_is_told_for_what_it_is() -> None:
    moves = [Authority(1, "new", 200, datetime.min, 0.1, 70), Authority(2, "old", 300, datetime.min, 0.1, 90)]
    log = authority_epochs(moves)
    events = [{"lsn": lsn, "ordinal": 4, "note": note} for lsn, note in ((199, None), (250, "changes"), (250, None), (300, None))]
    assert [_place(log, "old", event) for event in events] == [
        {"version": "0:0/C7:4"},
        {"at": "0/FA:4", "standing": "an echo: a write of our own, which brought the other store's"},
        {"at": "0/FA:4", "standing": "rogue: by somebody, while the store had no authority"},
        {"version": "2:0/12C:4"},
    ]


TWO = """
[[table]]
source = "first"
target = "firsts"
key = ["a", "b"]
[[table]]
source = "other"
target = "others"
key = ["a", "b"]
"""


def test_of_several_tables_the_one_is_named(make_migration: MakeMigration) -> None:
    tables = [f"CREATE TABLE {name} (a integer, b text, PRIMARY KEY (a, b))" for name in ("first", "other")]
    made = make_migration(TWO, *tables, "INSERT INTO other VALUES (1, 'x')", targets=[STORE])
    made.prepare()
    assert "several tables have a key of 2 columns: name one by --table of firsts (a b); others (a b)" in run(made, "1", "x").stderr
    done = run(made, "1", "x", "--table", "others", "--json")
    assert json.loads(done.stdout)["parts"]["source row"] == {"a": 1, "b": "x"}
