"""What check prints for want of rights: each statement, run by an administrator, and then the same role again, on every major."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from changeover.embedded.server import EmbeddedServer
from changeover.jobs.access import grants
from changeover.jobs.preflight import obstacles
from changeover.jobs.preflight.division import examined
from changeover.position import Version
from changeover.session import Connection, connect
from changeover.spec import Spec, load
from changeover.stores.postgres import gate, refusal
from tests.support.fix_postgres import fresh_database

SPEC = """
name = "wares"
[source]
dsn = "env:OLD_DSN"
capture = "{capture}"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "Shop.wares"
target = "Shop.goods"
key = ["id"]
{flag}
[work]
path = "work"
"""
FLAG = '[flag]\nkey = "f"\ntarget = "store"\n'
TENANTS = FLAG + 'context = "id"\n'
TABLE = 'CREATE TABLE "Shop".{} (id serial PRIMARY KEY, note text)'


@dataclass
class Shop:
    """Two databases of an application that owns its tables, and a role for us that may nothing but connect."""

    old: Connection
    new: Connection
    application: str
    mover: str
    dsns: tuple[str, str]
    folder: Path

    def spec(self, capture: str = "slot", flag: str = FLAG) -> Spec:
        path = self.folder / "spec.toml"
        path.write_text(SPEC.format(capture=capture, flag=flag))
        return load(path)

    def as_mover(self, side: int) -> Connection:
        return connect(make_conninfo(self.dsns[side], user=self.mover, password="p"), "test")

    def as_application(self, side: int) -> Connection:
        return connect(make_conninfo(self.dsns[side], user=self.application, password="p"), "test")

    def obey(self, statements: list[str]) -> None:
        """Run what check has printed, as an administrator, where it says."""
        for statement in statements:
            side = self.new if "-- in target store" in statement else self.old
            side.execute(statement.encode())


@pytest.fixture
def shop(any_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    mark = secrets.token_hex(4)
    application, mover = f"app_{mark}", f"Mover-{mark}"
    with ExitStack() as stack:
        admin = stack.enter_context(connect(any_server.dsn(), "test"))
        for role in (application, mover):
            admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'p'").format(sql.Identifier(role)))
            stack.callback(admin.execute, sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
        dsns = tuple(stack.enter_context(fresh_database(any_server, side)) for side in ("old", "new"))
        old, new = (stack.enter_context(connect(dsn, "test")) for dsn in dsns)
        for side in (old, new):
            side.execute(sql.SQL('CREATE SCHEMA "Shop" AUTHORIZATION {}').format(sql.Identifier(application)))
        monkeypatch.setenv("OLD_DSN", make_conninfo(dsns[0], user=mover, password="p"))
        monkeypatch.setenv("NEW_DSN", make_conninfo(dsns[1], user=mover, password="p"))
        made = Shop(old, new, application, mover, (dsns[0], dsns[1]), tmp_path)
        with made.as_application(0) as owner:
            owner.execute(TABLE.format("wares").encode())
        yield made


CASES = [
    ("slot", FLAG, "", "goods"),
    ("slot", "", "", "goods"),
    ("slot", TENANTS, "NOINHERIT", "goods"),
    ("trigger", FLAG, "NOINHERIT", ""),
    ("trigger", "", "", ""),
]


@pytest.mark.parametrize(("capture", "flag", "attribute", "existing"), CASES, ids=lambda value: value[-20:])
def test_what_is_printed_is_enough_and_takes_nothing_away(
    shop: Shop, capture: str, flag: str, attribute: str, existing: str
) -> None:
    if attribute:
        shop.old.execute(sql.SQL("ALTER ROLE {} NOINHERIT").format(sql.Identifier(shop.mover)))
    if existing:
        with shop.as_application(1) as owner:
            owner.execute(TABLE.format(existing).encode())
    spec = shop.spec(capture, flag)
    first = examined(spec)
    assert first.reasons
    assert first.grants
    assert not any("OWNER" in statement for statement in first.grants)
    for statement in first.grants:
        assert any(statement.removesuffix("  -- in target store") in reason for reason in first.reasons)
    shop.obey(first.grants)
    again = examined(spec)
    assert (again.reasons, again.grants) == ([], [])
    if capture == "slot":
        assert obstacles.notes(spec) == []
    with shop.as_application(0) as application:
        application.execute('INSERT INTO "Shop".wares (note) VALUES (%s)', ["mine"])
        application.execute('UPDATE "Shop".wares SET note = %s', ["still"])
        application.execute('ALTER TABLE "Shop".wares ADD more text; ALTER TABLE "Shop".wares DROP more')
        application.execute('DELETE FROM "Shop".wares; TRUNCATE "Shop".wares')
    _do_what_the_rights_are_for(shop, capture)


def _do_what_the_rights_are_for(shop: Shop, capture: str) -> None:
    """Make a publication, the gate and the refusal as our role, as prepare and the fence do."""
    with shop.as_mover(0) as mover:
        if capture == "slot":
            mover.execute('CREATE PUBLICATION changeover_test FOR TABLE ONLY "Shop".wares')
        what = refusal.Refusal(standing=(refusal.TenantEpoch(1),))
        gate.install_gate(mover, "Shop", "wares", ["id"], Version(0, 1, -1))
        assert refusal.install(mover, "Shop", "wares", what, time.monotonic() + 60)
        with shop.as_application(0) as application, pytest.raises(psycopg.Error, match="has no authority"):
            application.execute('INSERT INTO "Shop".wares (note) VALUES (%s)', ["late"])
        refusal.remove(mover, "Shop", "wares")
        gate.remove(mover, "Shop", "wares")


def test_nothing_is_printed_for_a_role_that_lacks_nothing(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD_DSN", shop.dsns[0])
    monkeypatch.setenv("NEW_DSN", shop.dsns[1])
    found = examined(shop.spec())
    assert (found.reasons, found.grants) == ([], [])


def test_membership_is_asked_for_and_nothing_that_comes_with_it(shop: Shop) -> None:
    """A member that inherits nothing is no owner; from PostgreSQL 16 on that is the membership's, before that the role's."""
    mover = sql.Identifier(shop.mover)
    shop.old.execute(sql.SQL("ALTER ROLE {} REPLICATION").format(mover))
    for side in (shop.old, shop.new):
        database = sql.Identifier(side.info.dbname)
        side.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(database, mover))
        side.execute(sql.SQL('GRANT ALL ON SCHEMA "Shop" TO {}').format(mover))
    modern = shop.old.info.server_version >= 160000
    assert examined(shop.spec()).grants == [f'GRANT {shop.application} TO "{shop.mover}"']
    shop.old.execute(sql.SQL("ALTER ROLE {} NOINHERIT").format(mover))
    shop.old.execute(sql.SQL("GRANT {} TO {}").format(sql.Identifier(shop.application), mover))
    wanted = f'GRANT {shop.application} TO "{shop.mover}" WITH INHERIT TRUE' if modern else f'ALTER ROLE "{shop.mover}" INHERIT'
    found = examined(shop.spec())
    assert found.grants == [wanted]
    assert [reason for reason in found.reasons if wanted in reason] == found.reasons
    shop.obey(found.grants)
    assert examined(shop.spec()).reasons == []


def test_a_statement_runs_as_it_is_printed_whatever_names_and_search_path_are(shop: Shop) -> None:
    shop.old.execute("""CREATE SEQUENCE public."My ""odd"".seq"; CREATE TABLE public."A ""b"".t" (id bigint)""")
    shop.old.execute("""ALTER TABLE public."A ""b"".t" ALTER id SET DEFAULT nextval('public."My ""odd"".seq"')""")
    owner = sql.Identifier(shop.application)
    shop.old.execute(sql.SQL("""ALTER TABLE public."A ""b"".t" OWNER TO {}; SET search_path = ''""").format(owner))
    with shop.as_mover(0) as mover:

        def lacks() -> list[str]:
            table = ("public", 'A "b".t')
            found = [*grants.of_table(mover, *table, grants.READ, owning=False), *grants.of_sequences(mover, *table, owning=False)]
            return [one.grant for one in found]

        assert len(lacks()) == 2
        shop.obey(lacks())
        assert lacks() == []
