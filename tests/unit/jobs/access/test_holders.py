"""Open transactions that a fence or a slot would wait for, named with process, role, application and age; short ones are not."""

from __future__ import annotations

import secrets
import time

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from changeover.embedded.server import EmbeddedServer
from changeover.jobs.access import holders
from changeover.session import connect
from tests.support.fix_postgres import fresh_database


def test_long_writers_are_named_and_readers_and_our_own_are_not(
    any_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holders, "LONG_SECONDS", 0.3)
    role = f"plain_{secrets.token_hex(4)}"
    with fresh_database(any_server, "held") as dsn, connect(dsn, "test") as admin:
        admin.execute('CREATE TABLE "T" (id int); CREATE TABLE other (id int)')
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'p'").format(sql.Identifier(role)))
        plain = make_conninfo(dsn, user=role, password="p")
        with (
            connect(dsn, "nightly report", autocommit=False) as writer, connect(dsn, "reader", autocommit=False) as reader,
            connect(dsn, "changeover:m:replay", autocommit=False) as ours, connect(plain, "test") as looking,
        ):  # fmt: skip
            writer.execute('INSERT INTO "T" VALUES (1)')
            reader.execute('SELECT * FROM "T"')
            ours.execute('INSERT INTO "T" VALUES (2)')
            time.sleep(0.4)
            pid = writer.info.backend_pid
            for session in (admin, looking):  # who may not see the age looks twice
                [said] = holders.of_tables(session, [("public", "T")])
                assert said.startswith(f"process {pid} of ")
                assert "(nightly report)" in said
                assert "open for" in said
                assert [one for one in holders.of_slot(session) if f"process {pid} " in one]
                assert not any("reader" in one or "replay" in one for one in holders.of_slot(session))
            assert "idle in transaction" in holders.of_tables(admin, [("public", "T")])[0]
            assert holders.of_tables(admin, [("public", "other")]) == []
            writer.rollback()
            assert holders.of_tables(admin, [("public", "T")]) == []
            writer.execute('INSERT INTO "T" VALUES (3)')
            writer.execute("PREPARE TRANSACTION 'later'")
            time.sleep(0.4)
            assert any("prepared transaction later" in one for one in holders.of_tables(admin, [("public", "T")]))
            admin.execute("ROLLBACK PREPARED 'later'")
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
