"""Replay writes as a replica: a counter counts once, a parent's replacement leaves its children, and a refusal still refuses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import sql

from changeover.errors import DatabaseFailed
from changeover.position import Version
from changeover.session import Connection, connect
from changeover.stores.postgres import gate, refusal, replica
from changeover.stores.postgres.tasks import MergeTask

SCHEMA = """
CREATE TABLE parent (id integer PRIMARY KEY, note text);
CREATE TABLE child (id integer PRIMARY KEY, parent integer CONSTRAINT "of" REFERENCES parent ON DELETE CASCADE ON UPDATE SET NULL);
CREATE TABLE counter (written bigint);
CREATE FUNCTION count_one() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS
    'BEGIN UPDATE counter SET written = written + 1; RETURN NULL; END';
CREATE TRIGGER counts AFTER INSERT OR UPDATE OR DELETE ON parent FOR EACH ROW EXECUTE FUNCTION count_one();
INSERT INTO counter VALUES (0);
INSERT INTO parent VALUES (1, 'first');
INSERT INTO child VALUES (7, 1);
"""


@pytest.fixture
def session(any_dsn: str) -> Iterator[Connection]:
    with connect(any_dsn, "test") as connection:
        connection.execute(SCHEMA.encode())
        gate.install_gate(connection, "public", "parent", ["id"], Version(0, 100, -1))
        yield connection


@contextmanager
def mover(session: Connection) -> Iterator[str]:
    """Yield the DSN of a role that may write and no more."""
    role = f"mover_{session.info.dbname}"
    named = sql.Identifier(role)
    session.execute(sql.SQL("CREATE ROLE {0} LOGIN PASSWORD 'p'; GRANT ALL ON parent TO {0}").format(named))
    session.execute(
        sql.SQL("GRANT USAGE ON SCHEMA changeover TO {0}; GRANT ALL ON ALL TABLES IN SCHEMA changeover TO {0}").format(named)
    )
    try:
        yield psycopg.conninfo.make_conninfo(session.info.dsn, user=role, password="p")
    finally:
        session.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(named))


def offer(session: Connection, dsn: str, *lines: str) -> None:
    """Offer CSV lines of version and row."""
    table = gate.gated(session, "public", "parent", ["id"])
    MergeTask(dsn, "test", table).merge([memoryview("".join(f"{line}\n" for line in lines).encode())])


def state(session: Connection) -> tuple[object, ...]:
    row = session.execute(
        "SELECT (SELECT written FROM counter), (SELECT string_agg(note, ',') FROM parent), (SELECT count(*) FROM child)"
    ).fetchone()
    assert row is not None
    return row


def test_what_comes_back_fires_nothing(session: Connection, any_dsn: str) -> None:
    session.execute("UPDATE counter SET written = 1")
    offer(session, any_dsn, "0,0/200,0,t,1,")
    offer(session, any_dsn, "0,0/300,0,f,1,again")
    assert state(session) == (1, "again", 1)
    assert replica.acting(session, "parent") == ([], [])


def test_a_refusal_and_an_always_trigger_fire_all_the_same(session: Connection, any_dsn: str) -> None:
    session.execute("ALTER TABLE parent ENABLE ALWAYS TRIGGER counts")
    forbids, told = replica.acting(session, "parent")
    assert forbids == []
    assert told == [
        "parent has the TRIGGER counts as ENABLE ALWAYS or REPLICA, so it fires for what comes back, too: ALTER TABLE parent ENABLE"
        " TRIGGER counts makes it an ordinary one"
    ]
    offer(session, any_dsn, "0,0/200,0,f,1,again")
    assert state(session)[:2] == (2, "again")
    assert refusal.install(session, "public", "parent", refusal.Refusal((refusal.TenantEpoch(1),)), time.monotonic() + 30)
    with pytest.raises(DatabaseFailed, match="no authority"):
        offer(session, any_dsn, "0,0/300,0,f,1,under the old authority")
    assert len(replica.acting(session, "parent")[1]) == 1, "ours is not told"


def test_a_role_that_may_not_is_told_what_would_act_and_by_which_grant_it_would_not(session: Connection) -> None:
    with mover(session) as dsn:
        with connect(dsn, "test") as poor:
            found, told = replica.acting(poor, "parent")
            assert (replica.take(poor), told) == (False, [])
        role = psycopg.conninfo.conninfo_to_dict(dsn)["user"]
        grant = f"GRANT SET ON PARAMETER session_replication_role TO {role}"
        assert found == [
            f"parent has the TRIGGER counts, which would act on what comes back, because the role {role} may not set"
            f" session_replication_role: {grant}",
            "parent has the foreign key of of child behind it, ON DELETE, which would act on what comes back, because the role"
            f" {role} may not set session_replication_role: {grant}",
        ]
        offer(session, dsn, "0,0/200,0,t,1,")
        assert state(session) == (1 + 1, None, 0), "which is what is told"
        session.execute(grant.encode())
        with connect(dsn, "test") as granted:
            assert replica.acting(granted, "parent") == ([], [])
        session.execute("INSERT INTO parent VALUES (2, 'second'); INSERT INTO child VALUES (8, 2)")
        offer(session, dsn, "0,0/300,0,t,2,")
        assert state(session) == (3, None, 1)
        session.execute(f"REVOKE SET ON PARAMETER session_replication_role FROM {role}".encode())
