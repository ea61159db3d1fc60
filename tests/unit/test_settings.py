"""Settings: each of the server's is named, and what is pinned holds in every kind of session, whatever role and database say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest
from psycopg import sql
from pyspark.sql import SparkSession

from changeover import settings
from changeover.errors import RowsHidden, ServerUnavailable
from changeover.flags.router.endpoint import PgEndpoint
from changeover.session import Connection, connect, speaking_to
from changeover.settings import Kind
from changeover.spark import jdbc
from tests.support.fix_roles import WORST, Mover, passing_mover, worst

SHOWN = sql.SQL("SELECT name, pg_catalog.current_setting(name, true) AS value FROM pg_catalog.unnest(ARRAY[{}]) AS name")


def named() -> list[str]:
    every = [one.name for one in settings.PINNED] + [one.name for one in settings.ASKED]
    return every + [name for names in settings.LEFT.values() for name in names]


def test_every_setting_that_a_session_can_be_given_is_named(any_dsn: str) -> None:
    with connect(any_dsn, "test") as admin:
        found = {row[0] for row in admin.execute("SELECT name FROM pg_settings WHERE context ~ 'user|backend'")}
    assert len(found) > 150
    assert found <= set(named())


def test_no_setting_is_named_twice() -> None:
    assert len(named()) == len(set(named()))
    assert set(WORST) == {one.name for one in settings.PINNED}


def shown(connection: psycopg.Connection[Any], names: list[str]) -> dict[str, str]:
    query = SHOWN.format(sql.SQL(", ").join(map(sql.Literal, names)))
    return {str(name): str(value) for name, value in connection.execute(query).fetchall()}


def wanted(version: int, kind: Kind = Kind.OURS) -> dict[str, str]:
    return {**settings.pinned(kind), **settings.later(version, kind)}


@pytest.fixture
def any_mover(any_dsn: str) -> Iterator[Mover]:
    with passing_mover(any_dsn) as made:
        yield made


@pytest.mark.parametrize("by_database", [False, True], ids=["role", "database"])
def test_what_is_pinned_holds_in_every_kind_of_session(
    any_dsn: str, any_mover: Mover, spark: SparkSession, monkeypatch: pytest.MonkeyPatch, by_database: bool
) -> None:
    with connect(any_dsn, "test") as admin:
        any_mover.is_beset(admin, by_database=by_database)
        hostile, version = worst(admin), admin.info.server_version
    dsn = any_mover.dsn(any_dsn)
    with psycopg.connect(dsn, client_encoding="UTF8") as plain:  # the settings do reach a session that is not ours
        assert plain.info.parameter_status("DateStyle") == "SQL, DMY"
    for name, value in {"PGTZ": "Asia/Kabul", "PGDATESTYLE": "German", "PGOPTIONS": "-c row_security=on"}.items():
        monkeypatch.setenv(name, value)
    ours = wanted(version)
    assert len(ours) == len(hostile)
    with closing(connect(dsn, "test")) as connection, closing(connect(dsn, "test", replication=True)) as walsender:
        assert shown(connection, [*ours]) == ours
        assert shown(walsender, [*ours]) == ours
    with closing(PgEndpoint(dsn).open("test", {"statement_timeout": "1min"})) as router:
        pinned = wanted(version, Kind.CALLERS)
        assert shown(router, [*pinned]) == pinned
        assert shown(router, ["row_security", "lock_timeout"]) == {"row_security": "on", "lock_timeout": "1ms"}
    with closing(PgEndpoint(dsn).open("test", kind=Kind.BESIDE)) as beside:
        pinned = wanted(version, Kind.BESIDE)
        assert shown(beside, [*pinned]) == pinned
        assert shown(beside, ["row_security"]) == {"row_security": "on"}
    # pgjdbc has an encoding of its own, which it insists on
    query = SHOWN.format(sql.SQL(", ").join(map(sql.Literal, ours))).as_string(None)
    options = jdbc.options(dsn, "test")
    start = jdbc.start(sql.SQL("SET TRANSACTION READ ONLY")).as_string(None)
    frame = spark.read.format("jdbc").options(**options, query=query, sessionInitStatement=start, fetchsize="10").load()
    assert {row.name: row.value for row in frame.collect()} == ours


def test_a_session_that_does_not_hold_what_is_pinned_is_refused(old_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as here:
        here.setattr("changeover.session.options_of", lambda *_: "")  # as a pooler does that drops them
        with pytest.raises(ServerUnavailable, match=r"has \S+ = .* whatever we set: name the server itself"):
            connect(old_dsn, "test")


def hide(admin: Connection, mover: Mover) -> None:
    admin.execute("CREATE TABLE t (id integer PRIMARY KEY); INSERT INTO t VALUES (1), (2)")
    mover.owns(admin, "public.t")
    admin.execute("ALTER TABLE t ENABLE ROW LEVEL SECURITY; ALTER TABLE t FORCE ROW LEVEL SECURITY")
    admin.execute("CREATE POLICY p ON t USING (id = 1)")


def test_rows_that_a_policy_hides_are_refused_and_never_left_out(old_dsn: str, mover: Mover) -> None:
    dsn = mover.dsn(old_dsn)
    with connect(old_dsn, "test") as admin:
        hide(admin, mover)
        with connect(dsn, "test") as ours, pytest.raises(RowsHidden) as refused, speaking_to(dsn, "reading"):
            ours.execute("SELECT * FROM t")
        assert f'ALTER ROLE "{mover.name}" BYPASSRLS, or GRANT' in str(refused.value)
        with closing(PgEndpoint(dsn).open("test")) as application:  # its own policies are the application's affair
            assert application.execute("SELECT * FROM t").fetchall() == [(1,)]
        admin.execute(sql.SQL("ALTER ROLE {} BYPASSRLS").format(sql.Identifier(mover.name)))
        with connect(dsn, "test") as ours:
            assert ours.execute("SELECT * FROM t").fetchall() == [(1,), (2,)]
