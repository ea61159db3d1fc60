"""What check asks of connections: poolers, the walsender, settings that nobody can pin, DSNs that Java can't follow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from psycopg import sql

from changeover.jobs.access import connections
from changeover.jobs.preflight.rules import preflight
from changeover.session import connect
from changeover.spec import load
from tests.support.fix_postgres import default_binaries, fresh_database, passing_server
from tests.support.fix_roles import Mover

SPEC = """
name = "asked"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "t"
target = "t"
key = ["id"]
[work]
path = "work"
"""


def test_a_pooler_that_changes_sessions_is_found_and_named(pooled_dsn: str, old_dsn: str) -> None:
    assert connections.reasons(old_dsn, "test", "the old store") == []
    told = connections.reasons(pooled_dsn, "test", "the old store")
    assert len(told) == 1
    assert "the old store is reached through a pooler that changes sessions between transactions: name the server" in told[0]


@pytest.mark.heavy
def test_a_server_that_gives_no_session_for_replication_is_refused(tmp_path: Path) -> None:
    with passing_server(default_binaries(), max_wal_senders="0") as server, fresh_database(server, "old") as dsn:
        assert connections.reasons(dsn, "test", "the old store") == []
        told = connections.streaming(dsn, "test", "the old store")
    assert len(told) == 1
    assert told[0].startswith("the old store gives no session for replication (")
    assert "see max_wal_senders and pg_hba.conf" in told[0]


def test_a_server_that_lets_the_role_open_few_sessions_is_told(old_dsn: str, mover: Mover) -> None:
    role, needed = sql.Identifier(mover.name), connections.SESSIONS + (os.cpu_count() or 1)
    with connect(old_dsn, "test") as admin, connect(mover.dsn(old_dsn), "changeover:m:check") as session:
        database = sql.Identifier(admin.info.dbname)
        for limit in (
            sql.SQL("ALTER ROLE {} CONNECTION LIMIT").format(role),
            sql.SQL("ALTER DATABASE {} CONNECTION LIMIT").format(database),
        ):
            for number, few in ((-1, False), (needed + 1, False), (needed - 2, True)):
                admin.execute(sql.SQL("{} {}").format(limit, sql.Literal(number)))
                notes: list[str] = []
                connections.look_at_limits(session, "changeover:m:check", "the old store", notes)
                assert bool(notes) == few, (limit, number, notes)
            admin.execute(sql.SQL("{} -1").format(limit))
    with passing_server(default_binaries(), max_connections="12") as server, connect(server.dsn(), "changeover:m:check") as session:
        connections.look_at_limits(session, "changeover:m:check", "the old store", notes := [])
    assert notes[0].startswith(f"the old store has 9 sessions left for this role, and {needed} may be open at once")


def test_check_names_what_no_session_can_pin_on_either_side_under_policies_too(
    old_dsn: str, new_dsn: str, mover: Mover, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLD_DSN", mover.dsn(old_dsn))
    monkeypatch.setenv("NEW_DSN", mover.dsn(new_dsn))
    (tmp_path / "spec.toml").write_text(SPEC)
    role = sql.Identifier(mover.name)
    with connect(old_dsn, "test") as old, connect(new_dsn, "test") as new:
        for admin in (old, new):
            admin.execute("CREATE TABLE t (id integer PRIMARY KEY)")
            mover.owns(admin, "public.t")
        spec = load(tmp_path / "spec.toml")
        assert preflight(spec).reasons == []
        for admin in (old, new):
            admin.execute("ALTER TABLE t ENABLE ROW LEVEL SECURITY; ALTER TABLE t FORCE ROW LEVEL SECURITY")
        old.execute(sql.SQL("ALTER ROLE {} SET zero_damaged_pages TO on").format(role))
        told = preflight(spec).reasons
    pages = "has zero_damaged_pages = on for this role: a damaged page reads as empty"
    assert [reason.partition(pages)[0] for reason in told if pages in reason] == ["the old store ", "target store "]
