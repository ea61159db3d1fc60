"""Prepare: what it refuses and says, what it leaves when it can't, and that abort leaves the old store as it was."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from changeover.embedded.server import EmbeddedServer
from changeover.errors import ChangeoverError, Refused, SlotBlocked, SpecError, StepOrder, UnsafePlan, UsageError
from changeover.jobs import prepare as preparing
from changeover.jobs.install import leftovers, opening
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.preflight.rules import preflight
from changeover.jobs.source import snapshot
from changeover.session import connect
from changeover.spec import load
from tests.support.fix_migration import FOLLOWS, FOLLOWS_TABLE, STORE, MakeMigration, Migration
from tests.support.fix_postgres import SETTINGS, default_binaries

TABLE = '[[table]]\nsource = "public.t"\ntarget = "kept"\nkey = ["id"]\n'


def with_columns(**columns: str) -> str:
    return TABLE + "[table.columns]\n" + "".join(f"{name} = {text!r}\n" for name, text in columns.items())


CATALOGUE = """
SELECT 'slot', slot_name::text FROM pg_replication_slots WHERE database = current_database()
UNION ALL SELECT 'publication', pubname FROM pg_publication
UNION ALL SELECT 'trigger', tgname FROM pg_trigger WHERE NOT tgisinternal
UNION ALL SELECT 'schema', nspname FROM pg_namespace
UNION ALL SELECT 'relation', oid::regclass::text FROM pg_class WHERE relnamespace >= 16384 OR relnamespace = 'public'::regnamespace
UNION ALL SELECT 'function', oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT 'session', application_name FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'changeover:%'
ORDER BY 1, 2
"""


def state(connection: psycopg.Connection[Any]) -> Sequence[tuple[Any, ...]]:
    """Return everything that a migration could leave in a database."""
    deadline = time.monotonic() + 60  # a session that was closed may take as long to end
    while True:
        found = connection.execute(CATALOGUE).fetchall()
        if not any(kind == "session" for kind, _ in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


UNSAFE = [
    ("SELECT 1", TABLE, "there is no table public.t in old_"),
    (
        "CREATE TABLE t (id integer)",
        TABLE,
        "public.t has no primary key and no replica identity: ALTER TABLE public.t ADD PRIMARY KEY",
    ),
    (
        "CREATE TABLE t (id integer PRIMARY KEY); ALTER TABLE t REPLICA IDENTITY NOTHING",
        TABLE,
        "public.t has no primary key and no replica identity",
    ),
    ("CREATE TABLE t (id integer); ALTER TABLE t REPLICA IDENTITY FULL", TABLE, "REPLICA IDENTITY FULL without a primary key"),
    ("CREATE TABLE t (id integer PRIMARY KEY DEFERRABLE)", TABLE, "the key of public.t is deferrable"),
    ("CREATE TABLE t (id integer PRIMARY KEY, place point)", TABLE, "public.t.place has the type point, which is not proven exact"),
    (
        "CREATE TABLE t (id integer, twice integer GENERATED ALWAYS AS (id * 2) STORED PRIMARY KEY)",
        TABLE.replace('"id"', '"other"') + '[table.columns]\nother = "id"\n',
        "public.t.twice is a generated column in the key",
    ),
    ("CREATE VIEW t AS SELECT 1 AS id", TABLE, "public.t is a view"),
    ("CREATE UNLOGGED TABLE t (id integer PRIMARY KEY)", TABLE, "public.t is not a permanent table"),
    ("CREATE TABLE t (id integer PRIMARY KEY); CREATE TABLE child () INHERITS (t)", TABLE, "takes part in inheritance"),
    (
        "CREATE TABLE t (id integer PRIMARY KEY, day date)",
        with_columns(id="hash(id, day)"),
        "needs more than the replica identity (id): a DELETE carries no more",
    ),
]


@pytest.mark.parametrize(("statement", "table", "reason"), UNSAFE, ids=lambda value: value[:40])
def test_an_unsafe_plan_is_refused_and_nothing_is_touched(
    make_migration: MakeMigration, statement: str, table: str, reason: str
) -> None:
    migration = make_migration(table, statement, targets=[STORE])
    before = state(migration.old)
    with pytest.raises(UnsafePlan) as caught:
        migration.prepare()
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1
    assert state(migration.old) == before
    assert migration.leftovers() == []
    assert migration.new.execute("SELECT FROM pg_namespace WHERE nspname = 'changeover'").fetchall() == []


WRONG = [
    (with_columns(other="nothing + 1"), "columns.other", "nothing"),
    (with_columns(other="id +"), "columns.other", "is not a valid expression"),
    (with_columns(other="rand()"), "other", "gives another value at each run"),
    (with_columns(other="current_timestamp()"), "other", "gives another value at each run"),
    (TABLE + 'where = "missing IS NULL"\n', "where", "missing"),
    (TABLE + 'where = "uuid() IS NULL"\n', "where", "gives another value at each run"),
    (TABLE.replace('["id"]', '["other"]'), "key", "nothing fills the key column other"),
    (TABLE + 'drop = ["nothing"]\n', "drop", "there is no column nothing in public.t"),
    (with_columns(other="map(1, id)"), "columns.other", "which no column can hold"),
    (TABLE + '[table.transform]\nfunction = "no.such:thing"\n', "transform.function", "can't be imported"),
]


@pytest.mark.parametrize(("table", "where", "problem"), WRONG, ids=lambda value: value[-40:])
def test_a_wrong_spec_is_refused_by_its_key(make_migration: MakeMigration, table: str, where: str, problem: str) -> None:
    migration = make_migration(table, "CREATE TABLE t (id integer PRIMARY KEY, day date)", targets=[STORE])
    before = state(migration.old)
    with pytest.raises(SpecError) as caught:
        migration.prepare()
    assert where in caught.value.where
    assert problem in caught.value.problem
    assert state(migration.old) == before


TARGETS = [
    (
        "CREATE TABLE public.kept (id integer PRIMARY KEY); INSERT INTO public.kept VALUES (1)",
        "table kept has rows: empty it or name another one",
    ),
    ("CREATE TABLE public.kept (id integer)", "no primary key or unique constraint on (id)"),
    (
        "CREATE TABLE public.kept (id integer PRIMARY KEY, must text NOT NULL)",
        "column must of target table kept is NOT NULL and nothing fills it",
    ),
    ("CREATE TABLE public.kept (no integer, id integer NOT NULL UNIQUE)", "target table kept has no column day"),
    ("CREATE TABLE public.kept (id integer PRIMARY KEY, day date UNIQUE)", "the unique index kept_day_key beside its key"),
]


@pytest.mark.parametrize(("statement", "reason"), TARGETS, ids=lambda value: value[-40:])
def test_a_target_that_cannot_be_one_is_refused_and_kept(make_migration: MakeMigration, statement: str, reason: str) -> None:
    migration = make_migration(TABLE, "CREATE TABLE t (id integer PRIMARY KEY, day date)", targets=[STORE])
    migration.new.execute(statement.encode())
    with pytest.raises(Refused) as caught:
        migration.prepare()
    assert reason in str(caught.value)
    migration.abort()
    assert migration.new.execute("SELECT FROM pg_class WHERE oid = to_regclass('public.kept')").fetchall()
    assert migration.leftovers() == []


def test_a_server_without_logical_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_dsn: str) -> None:
    root = Path(tempfile.mkdtemp(prefix="changeover-pg-"))  # where the server's own user may go
    server = EmbeddedServer.start(root, settings={**SETTINGS, "wal_level": "replica"}, bin_dir=default_binaries())
    try:
        monkeypatch.setenv("OLD_DSN", server.dsn())
        monkeypatch.setenv("NEW_DSN", new_dsn)
        with connect(server.dsn(), "test") as connection:
            connection.execute("CREATE TABLE t (id integer PRIMARY KEY)")
        path = tmp_path / "spec.toml"
        path.write_text(
            'name = "m"\n[source]\ndsn = "env:OLD_DSN"\n[target.store]\nkind = "postgres"\ndsn = "env:NEW_DSN"\n'
            + TABLE
            + f'[work]\npath = "{tmp_path}"\n'
        )
        assert preflight(load(path)).reasons == [
            'wal_level is replica: set wal_level = logical and restart the server, or capture = "trigger" in the spec\'s [source]'
        ]
    finally:
        server.remove()


# -- what is made, and reverse replication


@pytest.fixture
def prepared(migration: Migration) -> Migration:
    migration.prepare()
    return migration


def test_a_session_that_is_ending_is_not_left_and_one_that_stays_is(
    migration: Migration, old_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = connect(old_dsn, f"changeover:{migration.spec.name}:ending")
    ending = threading.Timer(1.0, session.close)
    ending.start()
    assert migration.leftovers() == []
    ending.join()
    monkeypatch.setattr(leftovers, "SESSION_SECONDS", 0.5)
    with connect(old_dsn, f"changeover:{migration.spec.name}:staying"), connect(old_dsn, "changeover:another:staying"):
        assert migration.leftovers() == [f"session changeover:{migration.spec.name}:staying"]


def test_abort_leaves_the_old_store_as_it_was(migration: Migration) -> None:
    old, new = state(migration.old), state(migration.new)
    migration.prepare()
    assert len(migration.leftovers()) >= 3
    removed = migration.abort()
    assert any("replication slot" in line for line in removed)
    assert any("publication" in line for line in removed)
    assert migration.leftovers() == []
    assert state(migration.old) == old
    assert state(migration.new) == new
    assert not (migration.spec.work / "spool").exists()
    assert not migration.spec.targets["lake"].folder.joinpath("associations").exists()
    assert migration.abort() == []


def test_prepare_twice_changes_nothing(prepared: Migration) -> None:
    old, new = prepared.old.execute(CATALOGUE).fetchall(), state(prepared.new)
    first = preparing.prepare(prepared.spec, prepared.spark)
    assert preparing.prepare(prepared.spec, prepared.spark) == first
    assert prepared.old.execute(CATALOGUE).fetchall() == old
    assert state(prepared.new) == new


def test_a_spec_that_changed_since_is_refused(prepared: Migration) -> None:
    path = Path(prepared.spec.path)
    path.write_text(path.read_text().replace("'follows'", "'follow'"))
    changed = load(path)
    for step in (
        lambda: preparing.prepare(changed, prepared.spark),
        lambda: Migration(changed, prepared.spark, prepared.old, prepared.new).backfill(),
    ):
        with pytest.raises(UsageError, match=r"changed since prepare .*: put it back, or `changeover abort`"):
            step()


def test_what_mirrors_may_change_once_the_tables_are_loaded(make_migration: MakeMigration) -> None:
    flag = '[flag]\nkey = "f"\ntarget = "store"\n'
    made = make_migration(f"{TABLE}{flag}", "CREATE TABLE t (id integer PRIMARY KEY); INSERT INTO t VALUES (1)", targets=(STORE,))
    made.prepare()
    path = Path(made.spec.path)
    path.write_text(path.read_text().replace(flag, f'{flag}mirror = "application"\n'))
    other = Migration(load(path), made.spark, made.old, made.new)
    with pytest.raises(UsageError, match=r"flag.mirror is 'application', and was 'stream' at prepare: .* public.t is not yet"):
        other.backfill()
    made.backfill()
    made.catch_up()
    other.catch_up()
    with Ledger.open(made.spec, "test") as ledger:
        assert ledger.mirror() == "application"
    made.catch_up()
    with Ledger.open(made.spec, "test") as ledger:
        assert ledger.mirror() == "stream"


def test_steps_before_prepare_say_what_they_need(migration: Migration) -> None:
    for step in (migration.backfill, migration.replay):
        with pytest.raises(StepOrder, match="needs prepare first"):
            step()


def test_an_open_transaction_that_blocks_the_slot_is_named_and_nothing_is_left(
    migration: Migration, old_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = state(migration.old), state(migration.new)
    monkeypatch.setattr(snapshot.create_slot, "__kwdefaults__", {"temporary": False, "seconds": 0.7})
    with connect(old_dsn, "test-blocker", autocommit=False) as blocker:
        blocker.execute("UPDATE follows SET note = 'open' WHERE from_user = 1")
        with pytest.raises(SlotBlocked, match=f"process {blocker.info.backend_pid} of {blocker.info.user}, open since") as caught:
            migration.prepare()
        assert "nothing was left behind" in str(caught.value)
        assert state(migration.old) == old
        assert state(migration.new) == new
        assert migration.leftovers() == []
        blocker.rollback()
    migration.prepare()
    migration.abort()
    assert state(migration.old) == old
    assert state(migration.new) == new


def test_prepared_transactions_around_the_slot(migration: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    early, late = (f"{migration.spec.name} {when}" for when in ("early", "late"))

    def prepare_transaction(name: str, key: int) -> None:
        change = f"UPDATE follows SET note = '{name}' WHERE from_user = {key}"
        for statement in ("BEGIN", change, f"PREPARE TRANSACTION '{name}'"):
            migration.old.execute(statement.encode())

    prepare_transaction(early, 1)
    with monkeypatch.context() as patched:
        patched.setattr(snapshot.create_slot, "__kwdefaults__", {"temporary": False, "seconds": 0.7})
        with pytest.raises(SlotBlocked, match=f"prepared transaction {early} of {migration.old.info.user}, since"):
            migration.prepare()
    assert migration.leftovers() == []
    migration.old.execute(f"COMMIT PREPARED '{early}'".encode())
    migration.prepare()
    prepare_transaction(late, 2)
    migration.backfill()
    migration.catch_up()
    migration.assert_equal()
    migration.old.execute(f"COMMIT PREPARED '{late}'".encode())
    migration.catch_up()
    migration.assert_equal()
    assert any(late in row for row in migration.target_rows(STORE))


class Killed(BaseException):
    """Stands for kill -9 between two statements: nothing that handles errors sees it as one."""


HALFWAY = ["_create_targets", "_publish", "open_stream", "spool_of", "_record"]


@pytest.mark.parametrize("place", HALFWAY)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_prepare_killed_halfway_is_made_good_by_the_next(
    make_migration: MakeMigration, monkeypatch: pytest.MonkeyPatch, place: str, after: bool
) -> None:
    migration = make_migration(FOLLOWS_TABLE, FOLLOWS)
    old, new = state(migration.old), state(migration.new)
    room = opening if place == "_publish" else preparing
    whole = getattr(room, place)

    def killed(*arguments: object) -> None:
        if after:
            whole(*arguments)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(room, place, killed)
        with pytest.raises(Killed):
            migration.prepare()
    if (place, after) != ("_record", True):
        with Ledger.open(migration.spec, "test") as ledger:
            assert not ledger.exists()
    migration.prepare()
    migration.abort()
    assert migration.leftovers() == []
    assert state(migration.old) == old
    assert state(migration.new) == new
    assert not migration.spec.targets["lake"].folder.joinpath("associations").exists()


def test_a_prepare_killed_halfway_can_be_aborted(make_migration: MakeMigration, monkeypatch: pytest.MonkeyPatch) -> None:
    migration = make_migration(FOLLOWS_TABLE, FOLLOWS)
    old, new = state(migration.old), state(migration.new)

    def killed(*arguments: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(preparing, "_record", killed)
        with pytest.raises(Killed):
            migration.prepare()
    migration.abort()
    assert state(migration.old) == old
    assert state(migration.new) == new


def test_two_prepares_at_once_are_one(migration: Migration) -> None:
    failures: list[ChangeoverError] = []

    def run() -> None:
        try:
            preparing.prepare(migration.spec, migration.spark)
        except ChangeoverError as error:
            failures.append(error)

    runs = [threading.Thread(target=run) for _ in range(2)]
    for one in runs:
        one.start()
    for one in runs:
        one.join()
    assert [str(error)[:15] for error in failures] in ([], ["another prepare"])
    assert (
        len(migration.old.execute("SELECT FROM pg_replication_slots WHERE slot_name = %s", [migration.spec.slot]).fetchall()) == 1
    )
