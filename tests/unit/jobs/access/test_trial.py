"""The row that is tried as the application's role: what it would meet is a failure, what we can't know is none; nothing stays."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from psycopg import sql

from changeover.embedded.server import EmbeddedServer
from changeover.jobs.access.trial import Trial, Tried, trial
from changeover.session import Connection, connect
from changeover.stores.tables import defaults
from tests.support.fix_postgres import fresh_database

PLAIN = "CREATE TABLE t (id bigserial PRIMARY KEY, note text NOT NULL, at timestamptz DEFAULT now())"


@dataclass
class Store:
    """A database, an administrator's session, and an application's role with rights on what it makes."""

    connection: Connection
    role: str

    def run(self, statement: str) -> None:
        self.connection.execute(sql.SQL(statement.replace("ROLE", f'"{self.role}"')))

    def tried(self, *left_out: str, key: tuple[str, ...] = ("id",)) -> Trial:
        return trial(
            self.connection, self.role, Tried("public", "t", defaults.of_table(self.connection, "public", "t"), key, left_out)
        )


@pytest.fixture
def store(any_server: EmbeddedServer) -> Iterator[Store]:
    role = f"app {secrets.token_hex(4)}"
    with connect(any_server.dsn(), "test") as admin:
        admin.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
        with fresh_database(any_server, "trial") as dsn, connect(dsn, "test") as connection:
            yield Store(connection, role)
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def test_a_row_is_written_and_nothing_stays(store: Store) -> None:
    store.run(PLAIN + "; INSERT INTO t (id, note) SELECT i, 'n' FROM generate_series(1, 30) i")
    store.run("GRANT SELECT, INSERT, UPDATE, DELETE ON t TO ROLE; GRANT USAGE ON SEQUENCE t_id_seq TO ROLE")
    before = store.connection.execute("SELECT * FROM t ORDER BY id").fetchall()
    assert store.tried("id", "at") == Trial()
    assert store.tried("id", "at") == Trial(), "a number that was drawn before is passed by"
    assert store.connection.execute("SELECT * FROM t ORDER BY id").fetchall() == before
    assert store.connection.execute("SELECT current_user = session_user").fetchall() == [(True,)]
    store.run("DELETE FROM t")
    assert store.tried("id", "at") == Trial(), "of an empty table a row is made up"


FAILS = [
    ("GRANT SELECT, INSERT, UPDATE, DELETE ON t TO ROLE", "permission denied for sequence t_id_seq"),
    ("GRANT SELECT, UPDATE, DELETE ON t TO ROLE; GRANT USAGE ON SEQUENCE t_id_seq TO ROLE", "permission denied for table t"),
    ("GRANT SELECT, INSERT, UPDATE ON t TO ROLE; GRANT USAGE ON SEQUENCE t_id_seq TO ROLE", "permission denied for table t"),
    ("GRANT ALL ON t TO ROLE; ALTER TABLE t ALTER id DROP DEFAULT", "an INSERT that leaves id out puts NULL there"),
    ("GRANT ALL ON t TO ROLE; ALTER TABLE t ALTER id SET DEFAULT nextval('gone'::text)", 'relation "gone" does not exist'),
    (
        "GRANT ALL ON t TO ROLE; GRANT USAGE ON SEQUENCE t_id_seq TO ROLE; ALTER TABLE t ENABLE ROW LEVEL SECURITY;"
        " CREATE POLICY seen ON t FOR SELECT USING (true); CREATE POLICY put ON t FOR INSERT WITH CHECK (true)",
        "its UPDATE does not meet the row",
    ),
]


@pytest.mark.parametrize(("statement", "said"), FAILS, ids=[said[-30:] for _, said in FAILS])
def test_what_the_application_would_meet_is_a_failure(store: Store, statement: str, said: str) -> None:
    store.run(PLAIN + "; INSERT INTO t (note) VALUES ('secret')")
    store.run(statement)
    found = store.tried("id", "at")
    assert said in str(found.failure)
    assert "secret" not in str(found)
    assert store.connection.execute("SELECT count(*) FROM t").fetchall() == [(1,)]


UNTRIED = [
    (
        PLAIN + "; CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;"
        " CREATE TRIGGER act BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION act()",
        "the trigger act on public.t would act",
    ),
    (PLAIN + "; CREATE RULE watch AS ON UPDATE TO t DO ALSO NOTIFY x", "the rule watch on public.t would act"),
    (PLAIN + "; ALTER TABLE t ADD CHECK (note <> 'n' OR at < '2020-01-01')", "could be written (t_check)"),
    ("CREATE TABLE t (id box, note text, at text, EXCLUDE USING gist (id WITH &&)); GRANT ALL ON t TO ROLE", "no new row"),
]


@pytest.mark.parametrize(("statement", "said"), UNTRIED, ids=[said[-30:] for _, said in UNTRIED])
def test_what_nobody_can_know_is_no_failure(store: Store, statement: str, said: str) -> None:
    store.run(statement)
    store.run("GRANT ALL ON t TO ROLE; GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO ROLE")
    if "bigserial" in statement:
        store.run("INSERT INTO t (note, at) VALUES ('n', '2000-01-01')")
        found = store.tried("id", "at")
    else:
        store.run("INSERT INTO t VALUES ('(1,1),(0,0)', 'a', 'b')")
        found = store.tried()
    assert found.failure is None
    assert said in str(found.untried)


def test_a_role_that_may_not_become_the_applications_only_asks(store: Store) -> None:
    store.run(PLAIN)
    store.run("GRANT ALL ON t TO ROLE; create role plain_mover")
    try:
        store.run("SET SESSION AUTHORIZATION plain_mover")
        assert "may not SET ROLE" in str(store.tried("id").untried)
    finally:
        store.run("RESET SESSION AUTHORIZATION; drop role plain_mover")


KEYS = [
    ("id uuid", "gen_random_uuid()"), ("id text", "'a'"), ("id varchar(5)", "'a'"), ("id numeric(4,1)", "7.5"),
    ("id date", "'2020-01-01'"),
    ("id smallint", "3"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "value"), KEYS, ids=[column for column, _ in KEYS])
def test_a_key_that_the_application_gives_gets_a_new_value(store: Store, column: str, value: str) -> None:
    store.run(f"CREATE TABLE t ({column} PRIMARY KEY, note text NOT NULL); INSERT INTO t VALUES ({value}, 'n')")
    store.run("GRANT SELECT, INSERT, UPDATE, DELETE ON t TO ROLE")
    assert store.tried() == Trial()
