"""What is left of one migration: whatever bears its name in this database, and nothing of a migration whose name is like it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from changeover.embedded.server import EmbeddedServer
from changeover.jobs.install import leftovers as module
from changeover.jobs.install.leftovers import leftovers
from changeover.jobs.source import snapshot, triggerlog
from changeover.position import Version
from changeover.session import Connection, connect
from changeover.spec import Spec, load
from changeover.stores.postgres import gate, refusal
from tests.support.fix_postgres import fresh_database

SPEC = """
name = "{name}"
[source]
dsn = "env:OLD_DSN"
capture = "trigger"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "{table}"
target = "{table}_there"
key = ["id"]
[flag]
key = "f"
target = "store"
[work]
path = "work"
"""
NAMES = {"a": "t", "a_b": "t_2", "a_verify": "t_3"}
"""Migrations with a table each; none is another one's, though their names begin alike."""


@pytest.fixture
def old(old_dsn: str, new_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connection]:
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    monkeypatch.setattr(module, "SESSION_SECONDS", 0.0)
    with connect(old_dsn, "test") as connection:
        for table in NAMES.values():
            connection.execute(sql.SQL("CREATE TABLE {} (id int PRIMARY KEY)").format(sql.Identifier(table)))
        yield connection


def made(old: Connection, stack: ExitStack, folder: Path, name: str) -> Spec:
    """Make all that a migration can have in an old store, with a slot that is being read and a session that stays."""
    path = folder / f"{name}.toml"
    path.write_text(SPEC.format(name=name, table=NAMES[name]))
    spec = load(path)
    table, dsn = NAMES[name], spec.source.dsn.resolve()
    old.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE ONLY {}").format(sql.Identifier(spec.slot), sql.Identifier(table)))
    snapshot.create_slot(dsn, f"changeover:{name}:prepare", spec.slot).session.close()
    triggerlog.install(old, spec, [["id"]])
    gate.install_gate(old, "public", table, ["id"], Version(0, 1, -1))
    assert refusal.install(old, "public", table, refusal.Refusal((refusal.TenantEpoch(1),)), time.monotonic() + 60)
    stack.enter_context(connect(dsn, f"changeover:{name}:capture"))
    return spec


def removed(old: Connection, spec: Spec) -> None:
    """Take away what a migration has, as abort does, but for its sessions."""
    table = spec.tables[0].source_name
    snapshot.drop_slot(old, spec.slot)
    triggerlog.remove(old, spec.name)
    refusal.remove(old, *table)
    gate.remove(old, *table)
    refusal.drop_empty_schema(old)
    old.execute(sql.SQL("DROP PUBLICATION {}").format(sql.Identifier(spec.slot)))


def test_each_migration_is_told_of_its_own_alone(old: Connection, server: EmbeddedServer, tmp_path: Path) -> None:
    with ExitStack() as stack:
        specs = {name: made(old, stack, tmp_path, name) for name in NAMES}
        for name, spec in specs.items():
            table, left = NAMES[name], leftovers(spec)
            assert set(left) == {
                f"replication slot changeover_{name}", f"publication changeover_{name}", f"session changeover:{name}:capture",
                f"trigger changeover_{name}_log on {table}", f"trigger changeover_{name}_log_truncate on {table}",
                f"trigger changeover_refusal on {table}", f"trigger changeover_refusal_statement on {table}",
                f"capture_log_{name} in schema changeover", f"capture_tick_{name} in schema changeover",
                f"versions_public.{table} in schema changeover", f"function changeover.gate_public.{table}",
                f"function changeover.refuse_public.{table}", f"function changeover.capture_{name}_0",
            }, left  # fmt: skip
        for name, spec in list(specs.items())[:-1]:
            removed(old, spec)
            assert leftovers(spec) == [f"session changeover:{name}:capture"]
        last = specs["a_verify"]
        assert "schema changeover" in leftovers(last)
        assert "gate in schema changeover" in leftovers(last)
        removed(old, last)
    for name in NAMES:
        assert [one for one in leftovers(specs[name]) if not one.startswith("session")] == []


def test_a_slot_of_that_name_in_another_database_is_not_ours(old: Connection, server: EmbeddedServer, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(SPEC.format(name="a", table="t"))
    with fresh_database(server, "other") as dsn:
        snapshot.create_slot(dsn, "test", load(path).slot).session.close()
        assert conninfo_to_dict(dsn)["dbname"] != old.info.dbname
        assert leftovers(load(path)) == []
