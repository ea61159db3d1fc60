"""The application's rights before the new store takes over: what is missing is named with its grant, what is there is tried."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from psycopg import sql

from changeover.embedded.server import EmbeddedServer
from changeover.flags.rights import UNNAMED, rights
from changeover.jobs.access import privileges
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.preflight.division import examined
from changeover.position import Version
from changeover.session import Connection, connect
from changeover.spec import Spec, load
from changeover.stores.postgres import gate
from tests.support.fix_postgres import fresh_database

SPEC = """
name = "wares"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "wares"
target = "Goods"
key = ["id"]
[table.columns]
remark = "note"
[flag]
key = "f"
mirror = "application"
target = "store"
[application]
roles = {roles}
[work]
path = "work"
"""
OLD = "CREATE TABLE wares (id bigserial PRIMARY KEY, note text NOT NULL, at timestamptz NOT NULL DEFAULT now())"
NEW = 'CREATE TABLE "Goods" (id bigserial PRIMARY KEY, remark text NOT NULL, at timestamptz NOT NULL DEFAULT now())'
BACK = gate.GatedTable("public", "wares", ("id",), ())
THERE = gate.GatedTable("public", "Goods", ("id",), ())


@dataclass
class Stores:
    """Both stores as prepare leaves them, but for what it grants, and a role of the application's."""

    old: Connection
    new: Connection
    role: str
    folder: Path

    def spec(self, *roles: str) -> Spec:
        path = self.folder / "spec.toml"
        path.write_text(SPEC.format(roles=str(list(roles or [self.role])).replace("'", '"')))
        return load(path)

    def obey(self, reasons: list[str]) -> None:
        """Run the statements that reasons end with, each in the store that it begins with."""
        for reason in reasons:
            store = self.new if reason.startswith("new store") else self.old
            store.execute(re.sub(r"^.*?: (?=GRANT)", "", reason).encode())


@pytest.fixture
def stores(any_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stores]:
    role = f"Clerk {secrets.token_hex(4)}"
    with ExitStack() as stack:
        admin = stack.enter_context(connect(any_server.dsn(), "test"))
        admin.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
        stack.callback(admin.execute, sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
        old_dsn, new_dsn = (stack.enter_context(fresh_database(any_server, side)) for side in ("old", "new"))
        monkeypatch.setenv("OLD_DSN", old_dsn)
        monkeypatch.setenv("NEW_DSN", new_dsn)
        old, new = (stack.enter_context(connect(dsn, "test")) for dsn in (old_dsn, new_dsn))
        old.execute(OLD.encode())
        old.execute(sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON wares TO {}").format(sql.Identifier(role)))
        old.execute("INSERT INTO wares (note) VALUES ('row')")
        new.execute(NEW.encode())
        new.execute("INSERT INTO \"Goods\" (id, remark) SELECT i, 'row' FROM generate_series(1, 9) i")
        made = Stores(old, new, role, tmp_path)
        with Ledger.open(made.spec(), "test") as ledger:
            ledger.create()
        gate.install_gate(new, "public", "Goods", ["id"], Version(0, 1, -1))
        yield made


def test_every_privilege_that_is_missing_is_named_and_the_grants_are_enough(stores: Stores) -> None:
    first = rights(stores.spec())
    missing = [reason for reason in first.reasons if "GRANT" in reason]
    said = "\n".join(missing)
    for right in ("SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE"):
        assert f"has no {right} on public.Goods: GRANT {right}" in said
    for what in ("USAGE on the sequence public.Goods_id_seq", "SELECT on changeover.authority", "INSERT on changeover.heartbeat",
                 "DELETE on changeover.read_difference", "INSERT on changeover.versions_public.Goods",
                 "USAGE on the schema changeover"):  # fmt: skip
        assert what in said
    assert next(reason for reason in first.reasons if reason not in missing).endswith("permission denied for table Goods")
    stores.obey(missing)
    again = rights(stores.spec())
    assert again.reasons == []
    assert again.notes == [
        f"{stores.role} on Goods in the new store: tried: a row inserted, updated, deleted and rolled back"
    ]  # fmt: skip
    assert stores.new.execute('SELECT count(*) FROM "Goods"').fetchall() == [(9,)]


def test_what_prepare_and_the_fence_grant_is_all_and_safe_to_repeat(stores: Stores) -> None:
    spec = stores.spec()
    gate.install_gate(stores.old, "public", "wares", ["id"], Version(0, 1, -1))
    assert any(reason.startswith("old store") and "versions_public.wares" in reason for reason in rights(spec).reasons)
    with Ledger.open(spec, "test") as ledger:
        for _ in range(2):
            privileges.allow_ledger(spec, ledger.connection)
            privileges.allow_table(spec, stores.old, stores.new, ("public", "wares"), ("public", "Goods"), {"remark": "note"})
            privileges.allow_gate(spec, stores.new, THERE)
            privileges.allow_gate(spec, stores.old, BACK)
    assert rights(spec).reasons == []
    assert stores.new.execute("SELECT has_table_privilege(%s, 'changeover.chunk', 'SELECT')", [stores.role]).fetchall() == [
        (False,)
    ]


def test_an_insert_without_the_key_that_would_fail_is_told_before(stores: Stores) -> None:
    spec = stores.spec()
    stores.obey([reason for reason in rights(spec).reasons if "GRANT" in reason])
    stores.new.execute('ALTER TABLE "Goods" ALTER id DROP DEFAULT')
    [reason] = rights(spec).reasons
    assert "an INSERT that leaves id out puts NULL there" in reason
    assert any("no default" in note for note in examined(spec).notes)


def test_rights_on_single_columns_and_for_the_mirror(stores: Stores) -> None:
    role = sql.Identifier(stores.role)
    stores.old.execute(sql.SQL("REVOKE ALL ON wares FROM {0}; GRANT SELECT, INSERT ON wares TO {0}").format(role))
    stores.old.execute(sql.SQL("GRANT UPDATE (note) ON wares TO {}").format(role))
    spec = stores.spec()
    found = rights(spec)
    assert any("has no UPDATE on column remark of public.Goods" in reason for reason in found.reasons)
    assert not any(f"no {right} on public.Goods" in reason for right in ("DELETE", "TRUNCATE") for reason in found.reasons)
    [mirror] = [reason for reason in found.reasons if reason.startswith("old store")]
    assert "has no UPDATE on public.wares" in mirror
    assert any("asked, and not tried" in one for one in found.notes)
    noted = [note for note in examined(spec).notes if "UPDATE on public.wares" in note]
    assert len(noted) == 1
    stores.obey(found.reasons)
    stores.obey(rights(spec).reasons)  # what a role has on the old table now, it gets on the new one
    assert rights(spec).reasons == []


def test_roles_that_nobody_has_and_none(stores: Stores, tmp_path: Path) -> None:
    [reason] = rights(stores.spec("nobody")).reasons
    assert "none of the application's roles (nobody)" in reason
    path = tmp_path / "unnamed.toml"
    path.write_text(SPEC.replace("[application]\nroles = {roles}\n", ""))
    assert rights(load(path)).notes == [UNNAMED]
