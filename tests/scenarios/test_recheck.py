"""Recheck: while a router mirrors writes ahead of replay, verify calls in flight what is in flight, and nothing else equal.

The writer is an application behind the real router at dualwrite; replay stands still but for what verify itself asks of it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import count
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ldclient.migrations.types import Stage

from changeover.cli.main import main
from changeover.flags import flagfile
from changeover.flags.mirror.change import Row
from changeover.flags.router.router import Change, Router, TableMapping, returned
from changeover.verifiers import moment
from changeover.verifiers.compare import recheck
from tests.support.fix_accounts import wait_for_writes
from tests.support.fix_flags import PATIENCE, PATIENT, wrote
from tests.support.fix_migration import STORE, MakeMigration, Migration

ACCOUNTS = """
CREATE TABLE accounts (id bytea, part integer, amount numeric NOT NULL, at timestamptz NOT NULL, PRIMARY KEY (id, part));
INSERT INTO accounts SELECT int4send(i), 1, i * 1.50, '2024-03-01 00:00:00.000001Z' FROM generate_series(1, 300) i
"""
SPEC = """
[[table]]
source = "public.accounts"
target = "ledgers"
key = ["id", "part"]
[flag]
key = "accounts-store"
target = "store"
mirror = "application"
"""
WRITTEN = 200
"""Rows up to this one are the application's; it never writes the others."""

PUT = "UPDATE {} SET amount = %s, at = clock_timestamp() WHERE id = int4send(%s) RETURNING *"


def mapped(row: Row) -> Row:
    """Map a row as an application may: the same amount in another notation."""
    return {**row, "amount": Decimal(row["amount"]).normalize()}


@pytest.fixture
def dual(make_migration: MakeMigration) -> Iterator[tuple[Migration, Router]]:
    """Migrate the accounts, and let a router mirror the application's writes."""
    made = make_migration(SPEC, ACCOUNTS, targets=(STORE,))
    made.prepare()
    made.backfill()
    made.catch_up()
    flags = made.spec.work / "flags.json"
    flagfile.write_stage(flags, "accounts-store", Stage.DUALWRITE)
    client = flagfile.client(flags)
    with Router.connect(made.spec, mappings={"accounts": TableMapping(mapped, dict)}, client=client, limits=PATIENT) as router:
        assert router.stage is Stage.DUALWRITE
        yield made, router
    client.close()  # type: ignore[no-untyped-call]


def put(router: Router, number: int, amount: Decimal) -> None:
    """Write one row by the router."""

    def to(table: str) -> Any:
        def write(cursor: Any) -> list[Change]:
            return returned(cursor.execute(PUT.format(table).encode(), [amount, number]))

        return write

    wrote(router, to("accounts"), to("ledgers"))


@contextmanager
def repeated(action: Any, pause: float) -> Iterator[None]:
    """Do something again and again beside the block."""
    stop = threading.Event()
    failed: list[BaseException] = []

    def go_on() -> None:
        try:
            while not stop.wait(pause):
                action()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=go_on)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert not failed, failed


def verified(migration: Migration, *arguments: str) -> Result:
    with migration.capturing():
        return CliRunner().invoke(main, ["verify", migration.spec.path, *arguments])


def damage(migration: Migration) -> None:
    """Change three rows that nobody else writes: one lost, one too many, one a microsecond off."""
    for statement in (
        "UPDATE ledgers SET at = at + interval '1 microsecond' WHERE id = int4send(250)",
        "DELETE FROM ledgers WHERE id = int4send(251)",
        "INSERT INTO ledgers VALUES (int4send(999), 1, 1, now())",
    ):
        assert migration.new.execute(statement.encode()).rowcount == 1


DAMAGED = {("\\x000000fa", "mismatched"), ("\\x000000fb", "missing"), ("\\x000003e7", "extra")}


def test_what_is_in_flight_is_no_difference_and_what_is_not_is(dual: tuple[Migration, Router]) -> None:
    migration, router = dual
    numbers = random.Random(1)
    with repeated(lambda: put(router, numbers.randint(1, WRITTEN), Decimal(numbers.randint(1, 999)) / 100 * 10), 0.005):
        wait_for_writes(router, 50)
        verdict = migration.verify()[STORE]
        assert verdict.word == "equal"
        assert verdict.recheck.in_flight > 0
        assert (verdict.recheck.rechecked, verdict.recheck.hot) == (verdict.recheck.in_flight, 0)
        assert migration.differences(verdict) == []
        damage(migration)
        verdict = migration.verify()[STORE]
    assert verdict.word == "different"
    assert {(row["key"]["id"], row["class"]) for row in migration.differences(verdict)} == DAMAGED
    assert (verdict.recheck.rechecked - verdict.recheck.in_flight, verdict.differing_keys) == (3, 3)
    assert verdict.columns == {"at": 1}


def test_a_key_that_is_written_between_any_two_looks_is_judged_by_what_the_stream_told_of_it(
    dual: tuple[Migration, Router], monkeypatch: pytest.MonkeyPatch
) -> None:
    migration, router = dual
    amounts = count(1)

    def written_before(look: Callable[..., Any]) -> Callable[..., Any]:
        def later(*arguments: Any) -> Any:
            put(router, 1, Decimal(next(amounts)))
            assert router.drain(PATIENCE)
            return look(*arguments)

        return later

    judge = recheck.judge

    def judged(*arguments: Any, source: recheck.Read, target: recheck.Read, **named: Any) -> Any:
        return judge(*arguments, source=written_before(source), target=written_before(target), **named)

    monkeypatch.setattr(recheck, "judge", judged)
    monkeypatch.setattr(moment._Holding, "_freeze_targets", written_before(moment._Holding._freeze_targets))
    verdict = migration.verify()[STORE]
    assert verdict.word == "equal"
    assert (verdict.recheck.rechecked, verdict.recheck.in_flight, verdict.recheck.hot) == (1, 1, 0)
    assert next(amounts) > 3, "the first look alone can't tell"


def test_a_key_that_is_left_unjudged_is_no_verdict(dual: tuple[Migration, Router], monkeypatch: pytest.MonkeyPatch) -> None:
    migration, router = dual
    put(router, 1, Decimal("2.50"))
    router.drain(PATIENCE)
    never = "UPDATE ledgers SET amount = amount + 1 WHERE id = int4send(252)"
    with monkeypatch.context() as patched, repeated(lambda: migration.new.execute(never.encode()), 0.02):
        patched.setattr(recheck, "ROUNDS", 3)
        done = verified(migration, "--json")
    assert (done.exit_code, done.stdout) == (3, "")
    assert "could not check public.accounts: 1 key kept changing while both stores were written" in done.stderr
    damage(migration)
    monkeypatch.setattr(recheck, "LIMIT", 3)
    done = verified(migration, "--json")
    assert (done.exit_code, done.stdout) == (3, "")
    assert "could not check public.accounts: 4 keys differ while both stores are written, and no more than 3 are" in done.stderr
    monkeypatch.setattr(recheck, "LIMIT", 4)
    assert verified(migration).exit_code == 1
