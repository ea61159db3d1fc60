"""The refusal of one table is its own, whatever other tables of the database are called, and of some tenants it is theirs alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from changeover.names import NAME_BYTES
from changeover.position import Version
from changeover.session import Connection, connect
from changeover.stores.postgres import gate, refusal, tenantfloor
from changeover.stores.postgres.gate import FENCED, ours
from changeover.tenants import Tenants

LONG = "n" * NAME_BYTES
ACCENTS = "é" * (NAME_BYTES // 2)


@pytest.fixture
def namesakes(new_dsn: str) -> Iterator[Connection]:
    with connect(new_dsn, "test") as connection:
        for schema in ("one", "two"):
            connection.execute(sql.SQL("CREATE SCHEMA {0}; CREATE TABLE {0}.kept (id integer)").format(sql.Identifier(schema)))
            refusal.install(connection, schema, "kept", refusal.Refusal(begun=refusal.TenantEpoch(1)), time.monotonic() + 600)
        yield connection


def refused(connection: Connection, schema: str) -> bool:
    """Return whether a write from outside of the gate is refused."""
    return is_refused(connection, sql.SQL("INSERT INTO {}.kept VALUES (1)").format(sql.Identifier(schema)))


def test_a_refusal_that_ends_leaves_the_namesakes(namesakes: Connection) -> None:
    while not refusal.install(namesakes, "two", "kept", refusal.Refusal(begun=refusal.TenantEpoch(1)), time.monotonic() + 0.2):
        pass  # the machine stood still for that long
    while refused(namesakes, "two"):
        time.sleep(0.02)
    assert refused(namesakes, "one")


def test_a_refusal_that_is_removed_leaves_the_namesakes(namesakes: Connection) -> None:
    refusal.remove(namesakes, "two", "kept")
    assert (refused(namesakes, "one"), refused(namesakes, "two")) == (True, False)
    refusal.remove(namesakes, "one", "kept")
    assert not refused(namesakes, "one")
    assert namesakes.execute("SELECT FROM pg_proc WHERE pronamespace = to_regnamespace('changeover')").fetchall() == []


def test_a_refusal_is_removed_from_a_partition_that_was_detached_since(new_dsn: str) -> None:
    with connect(new_dsn, "test") as connection:
        connection.execute("CREATE TABLE whole (id integer) PARTITION BY LIST (id)")
        for number in (1, 2):
            connection.execute(sql.SQL("CREATE TABLE part{0} PARTITION OF whole FOR VALUES IN ({0})").format(number))
        assert refusal.install(connection, "public", "whole", refusal.Refusal((refusal.TenantEpoch(1),)), time.monotonic() + 60)
        connection.execute("ALTER TABLE whole DETACH PARTITION part2")
        refusal.remove(connection, "public", "whole")
        assert connection.execute("SELECT tgname FROM pg_trigger WHERE tgname LIKE 'changeover%'").fetchall() == []
        assert not is_refused(connection, "INSERT INTO part2 VALUES (2)")


@pytest.mark.parametrize("name", ["kept", LONG, ACCENTS])
def test_our_names_are_whole_and_different(new_dsn: str, name: str) -> None:
    with connect(new_dsn, "test") as connection:
        made = [ours("versions", schema, name).as_string(connection) for schema in ("one", "two", "o" * NAME_BYTES)]
        connection.execute("CREATE SCHEMA IF NOT EXISTS changeover")
        for identifier in made:
            connection.execute(f"CREATE TABLE {identifier} ()".encode())
        found = connection.execute("SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('changeover')").fetchall()
    assert {f'"changeover"."{row[0]}"' for row in found} == set(made), "PostgreSQL cut none"
    assert len(set(made)) == 3


@pytest.fixture
def tenants(new_dsn: str) -> Iterator[Connection]:
    """Yield a session with a store that has lost authority over one tenant."""
    with connect(new_dsn, "test") as connection:
        connection.execute("CREATE TABLE kept (whose integer, id integer, PRIMARY KEY (whose, id))")
        connection.execute("INSERT INTO kept VALUES (1, 1), (2, 1), (3, 1)")
        assert refusal.install(connection, "public", "kept", losing(["1"]), time.monotonic() + 60)
        yield connection


def losing(names: list[str], standing: tuple[refusal.TenantEpoch, ...] = ()) -> refusal.Refusal:
    """Return the refusal of some tenants' rows, the third epoch's."""
    return refusal.Refusal(standing, refusal.TenantEpoch(3, Tenants(frozenset(names), others=False)), "whose")


def is_refused(connection: Connection, statement: LiteralString | sql.Composed) -> bool:
    try:
        with connection.transaction():
            connection.execute(statement)
    except psycopg.Error as error:
        if error.sqlstate != FENCED:
            raise
        return True
    return False


def test_rows_of_other_tenants_are_written_as_ever(tenants: Connection) -> None:
    refused = ["INSERT INTO kept VALUES (1, 2)", "UPDATE kept SET id = 3 WHERE whose = 1", "DELETE FROM kept WHERE whose = 1",
               "UPDATE kept SET whose = 1, id = 9 WHERE whose = 2", "UPDATE kept SET whose = 2, id = 9 WHERE whose = 1",
               "TRUNCATE kept"]  # fmt: skip
    taken = ["INSERT INTO kept VALUES (2, 2)", "UPDATE kept SET id = 3 WHERE whose = 3", "DELETE FROM kept WHERE whose = 2"]
    assert [statement for statement in (*refused, *taken) if is_refused(tenants, statement)] == refused


FINDS_NOTHING: tuple[LiteralString, ...] = ("DELETE FROM {} WHERE id = 99", "UPDATE {} SET id = 98 WHERE id = 99",
    "INSERT INTO {0} SELECT * FROM {0} WHERE id = 99")  # fmt: skip


def test_a_statement_that_finds_no_row_is_refused(namesakes: Connection) -> None:
    """The row may be in the other store alone by now: a DELETE of nothing would be a lost one."""
    statements = [sql.SQL(text).format(sql.Identifier("one", "kept")) for text in FINDS_NOTHING]
    assert [is_refused(namesakes, statement) for statement in statements] == [True, True, True]
    refusal.replace(namesakes, "one", "kept", refusal.Refusal())
    assert [is_refused(namesakes, statement) for statement in statements] == [False, False, False]


def test_a_statement_that_finds_no_row_is_refused_for_the_tenant_that_it_names(tenants: Connection) -> None:
    every = refusal.Refusal((refusal.TenantEpoch(4),), None, "whose")
    rest = refusal.Refusal((refusal.TenantEpoch(4, Tenants(frozenset({"2"}))),), None, "whose")
    for refuses, named, expected in (
        (losing(["1"]), "1", True), (losing(["1"]), "2", False), (losing(["1"]), "", False), (every, "", True), (every, "2", True),
        (rest, "2", False), (rest, "1", True), (rest, "", False),
    ):  # fmt: skip
        assert refusal.install(tenants, "public", "kept", refuses, time.monotonic() + 60)
        tenants.execute("SELECT set_config('changeover.tenant', %s, false)", [named])
        found = [is_refused(tenants, sql.SQL(text).format(sql.Identifier("kept"))) for text in FINDS_NOTHING]
        assert found == [expected] * 3, (refuses, named)


def test_a_foreign_keys_action_that_finds_nothing_passes(namesakes: Connection) -> None:
    namesakes.execute("CREATE TABLE parents (id integer PRIMARY KEY); INSERT INTO parents VALUES (1), (2)")
    refusal.replace(namesakes, "one", "kept", refusal.Refusal())
    namesakes.execute("ALTER TABLE one.kept ADD FOREIGN KEY (id) REFERENCES parents ON DELETE CASCADE ON UPDATE CASCADE")
    namesakes.execute("INSERT INTO one.kept VALUES (1)")
    refusal.replace(namesakes, "one", "kept", refusal.Refusal((refusal.TenantEpoch(1),)))
    assert is_refused(namesakes, "DELETE FROM parents WHERE id = 1")
    assert not is_refused(namesakes, "DELETE FROM parents WHERE id = 2")


def test_a_gate_of_the_tenants_own_epoch_passes(tenants: Connection) -> None:
    for epoch, passes in (("2", False), ("3", True), ("4", True)):
        with tenants.transaction(force_rollback=True):
            tenants.execute("SELECT set_config('changeover.epoch', %s, true)", [epoch])
            assert is_refused(tenants, "DELETE FROM kept WHERE whose = 1") is not passes


def test_all_but_some_are_refused(tenants: Connection) -> None:
    rest = refusal.Refusal((refusal.TenantEpoch(0, Tenants(frozenset({"1"}))),), None, "whose")
    assert refusal.install(tenants, "public", "kept", rest, time.monotonic() + 60)
    assert not is_refused(tenants, "UPDATE kept SET id = 5 WHERE whose = 1")
    assert is_refused(tenants, "UPDATE kept SET id = 5 WHERE whose = 2")
    assert is_refused(tenants, "TRUNCATE kept")


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_transaction_of_before_meets_the_list_of_today(tenants: Connection, new_dsn: str, level: str) -> None:
    with connect(new_dsn, "stale", autocommit=False) as stale:
        stale.execute(sql.SQL("SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {}").format(sql.SQL(level)))
        stale.execute("UPDATE kept SET id = 2 WHERE whose = 2")  # the trigger has run in this session, with the list of then
        stale.commit()
        stale.execute("SELECT count(*) FROM kept")  # a snapshot of before the second tenant's move
        before = (refusal.TenantEpoch(3, Tenants(frozenset({"1"}), others=False)),)
        assert refusal.install(tenants, "public", "kept", losing(["2"], before), time.monotonic() + 60)
        with pytest.raises(psycopg.Error) as caught:
            stale.execute("UPDATE kept SET id = 4 WHERE whose = 2")
        assert caught.value.sqlstate == FENCED
        stale.rollback()
        stale.execute("UPDATE kept SET id = 4 WHERE whose = 3")
        stale.commit()


def test_a_writer_of_any_tenant_is_waited_for_and_no_longer_than_allowed(tenants: Connection, new_dsn: str) -> None:
    with connect(new_dsn, "slow", autocommit=False) as slow:
        slow.execute("UPDATE kept SET id = 7 WHERE whose = 2")
        assert not refusal.install(tenants, "public", "kept", losing(["2"]), time.monotonic() + 0.7)
        assert not is_refused(tenants, "UPDATE kept SET id = 8 WHERE whose = 3")
        slow.commit()
    assert refusal.install(tenants, "public", "kept", losing(["2"]), time.monotonic() + 60)
    assert is_refused(tenants, "UPDATE kept SET id = 8 WHERE whose = 2")


def test_a_tenants_floor_leaves_the_others(tenants: Connection) -> None:
    refusal.remove(tenants, "public", "kept")
    gate.install_gate(tenants, "public", "kept", ("whose", "id"), Version(0, 10, -1))
    table = gate.GatedTable("public", "kept", ("whose", "id"), ("whose", "id"))
    for _ in range(2):
        floors = [
            refusal.TenantEpoch(3, Tenants(frozenset({"1"}), others=False)),
            refusal.TenantEpoch(0, Tenants(frozenset({"1"}))),
        ]
        tenantfloor.install(tenants, table, "whose", floors, "the server")

    def taken(whose: int, epoch: int) -> bool:
        row = tenants.execute(
            sql.SQL("SELECT {}(%s, '0/FF', 0, true, ROW(%s, 1)::kept)").format(table.function), [epoch, whose]
        ).fetchone()
        assert row is not None
        return bool(row[0])

    assert not taken(1, 2)
    assert tenants.execute("SELECT count(*) FROM kept WHERE whose = 1").fetchone() == (1,)
    assert taken(2, 2)
    assert taken(1, 3)
    assert tenants.execute("SELECT whose FROM kept").fetchall() == [(3,)]
    gate.remove(tenants, "public", "kept")
    assert tenants.execute("SELECT FROM pg_proc WHERE pronamespace = to_regnamespace('changeover')").fetchall() == []
