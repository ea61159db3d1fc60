"""Fixtures for flags: a flag file, two real databases with a table each, the gate, a fence, and routers.

Everything is real: the SDK's file data source, PostgreSQL, threads. The fence here is made of the same parts as the
product's: a refusing trigger on the store that loses authority, its gate with the new epoch's floor, and the ledger's
new epoch.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ldclient import LDClient
from ldclient.migrations.types import Origin, Stage
from psycopg import sql

from changeover.embedded.server import EmbeddedServer
from changeover.flags import flagfile, history
from changeover.flags.mirror.change import Change, MirroredTable, Row, TableMapping, returned
from changeover.flags.router import follower
from changeover.flags.router.desired import FlagStage
from changeover.flags.router.endpoint import Cursor, PgEndpoint
from changeover.flags.router.follower import LedgerAuthority
from changeover.flags.router.router import Experiment, RoutedStore, Router
from changeover.flags.router.runtime import Limits
from changeover.flags.stages import FENCED
from changeover.jobs.ledger.ledger import Ledger
from changeover.position import Version, epoch_floor, image_version
from changeover.session import Connection, application_name, connect
from changeover.stores.postgres import refusal
from changeover.stores.postgres.gate import install_gate
from changeover.tenants import Tenants
from tests.support.fix_postgres import fresh_database

FLAG = "follows-store"
MIGRATION = "follows"

PATIENCE = 60.0
"""Seconds that a test waits for what has to come: a machine may stand still for ten of them, and no test is about that."""

PATIENT = Limits(max_pause=PATIENCE, deadline=PATIENCE, mirror_deadline=PATIENCE, compare_deadline=PATIENCE, close_wait=PATIENCE)
"""A router's limits where a test names none."""

OLD_TABLE = """
CREATE TABLE public.follows (from_user bigint, to_channel bigint, note text DEFAULT 'none', tags text[],
    seen timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (from_user, to_channel))
"""
"""Not the demo's table: its new row is an application's own mapping, and the store fills in columns that a write leaves out."""

NEW_TABLE = """
CREATE TABLE public.associations (subject bigint, object bigint, attributes jsonb NOT NULL, tags text[],
    seen timestamptz NOT NULL, PRIMARY KEY (subject, object))
"""
TENANT = {Origin.OLD: "from_user", Origin.NEW: "subject"}
"""The column of each store in which a row's tenant stands."""

Write = Callable[[Cursor], list[Change]]

REFUSE = """
CREATE SCHEMA IF NOT EXISTS changeover;
CREATE OR REPLACE FUNCTION changeover.refuse() RETURNS trigger LANGUAGE plpgsql AS $body$
BEGIN
    IF coalesce(current_setting('changeover.epoch', true), '') = '' THEN
        RAISE EXCEPTION 'this store has lost authority' USING ERRCODE = {state};
    END IF;
    RETURN NULL;
END $body$;
"""


def to_new(row: Row) -> Row:
    """Map a follow to an association."""
    return {
        "subject": row["from_user"], "object": row["to_channel"], "attributes": {"note": row["note"]},
        "tags": row["tags"], "seen": row["seen"],
    }  # fmt: skip


def to_old(row: Row) -> Row:
    """Map an association to a follow."""
    return {
        "from_user": row["subject"], "to_channel": row["object"], "note": row["attributes"]["note"],
        "tags": row["tags"], "seen": row["seen"],
    }  # fmt: skip


FOLLOWS = MirroredTable("public.follows", "public.associations", to_new, to_old)
"""The table that the routers of tests mirror."""


def named(cursor: Cursor) -> list[Row]:
    """Return the rows of a SELECT by their columns' names."""
    names = [column.name for column in cursor.description or ()]
    return [dict(zip(names, row, strict=True)) for row in cursor]


@dataclass(frozen=True)
class Follow:
    """The application's statements, twice: as it writes and reads the old store and the new one."""

    user: int
    channel: int = 1
    note: str = "hello"

    def put_old(self, cursor: Cursor) -> list[Change]:
        """Follow, in the old store."""
        cursor.execute(
            "INSERT INTO public.follows (from_user, to_channel, note, tags) VALUES (%s, %s, %s, '{a,NULL}')"
            " ON CONFLICT (from_user, to_channel) DO UPDATE SET note = excluded.note RETURNING *",
            [self.user, self.channel, self.note],
        )
        return returned(cursor)

    def put_new(self, cursor: Cursor) -> list[Change]:
        """Follow, in the new store."""
        cursor.execute(
            "INSERT INTO public.associations VALUES (%s, %s, jsonb_build_object('note', %s::text), '{a,NULL}', now())"
            " ON CONFLICT (subject, object) DO UPDATE SET attributes = excluded.attributes RETURNING *",
            [self.user, self.channel, self.note],
        )
        return returned(cursor)

    def drop_old(self, cursor: Cursor) -> list[Change]:
        """Unfollow, in the old store."""
        cursor.execute("DELETE FROM public.follows WHERE from_user = %s RETURNING *", [self.user])
        return returned(cursor)

    def drop_new(self, cursor: Cursor) -> list[Change]:
        """Unfollow, in the new store."""
        cursor.execute("DELETE FROM public.associations WHERE subject = %s RETURNING *", [self.user])
        return returned(cursor)

    def find_old(self, cursor: Cursor) -> list[Row]:
        """Look up, in the old store."""
        return named(cursor.execute("SELECT * FROM public.follows WHERE from_user = %s ORDER BY to_channel", [self.user]))

    def find_new(self, cursor: Cursor) -> list[Row]:
        """Look up, in the new store."""
        return named(cursor.execute("SELECT * FROM public.associations WHERE subject = %s ORDER BY object", [self.user]))


def wrote(router: Router, old: Write, new: Write, tenant: Any = None) -> RoutedStore:
    """Make one of two writes, tell the mirror what was written, and return the unit of work."""

    def work(store: RoutedStore) -> RoutedStore:
        store.mirror(store.of(old, new)(store.cursor))
        return store

    return router.run(work, tenant=tenant)


class FollowRead(Experiment):
    """Compares rows of the two tables: the old one's are mapped first."""

    def clean(self, value: Any) -> Any:
        """Return a list of rows under the new names; anything else as it is."""
        return [to_new(row) if "from_user" in row else row for row in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Stores:
    """Both databases with an administrator's session each, the ledger, and what the fence does to them."""

    old: Connection
    new: Connection
    old_dsn: str
    new_dsn: str
    ledger: Ledger

    def endpoint(self, origin: Origin, tenants: bool = False) -> PgEndpoint:
        """Return a store as the router reaches it, its tenants told apart or not."""
        column = TENANT[origin] if tenants else None
        if origin is Origin.OLD:
            return PgEndpoint(self.old_dsn, tenant=column)
        return PgEndpoint(self.new_dsn, tenant=column)

    def refuse(self, origin: Origin) -> None:
        """Make a store refuse what doesn't come through its gate."""
        connection = self._admin(origin)
        connection.execute(sql.SQL(REFUSE).format(state=sql.Literal(FENCED)))
        connection.execute(
            sql.SQL(
                "CREATE TRIGGER changeover_fence BEFORE INSERT OR UPDATE OR DELETE ON {0}"
                " EXECUTE FUNCTION changeover.refuse();"
                "ALTER TABLE {0} ENABLE ALWAYS TRIGGER changeover_fence"
            ).format(self._table(origin))
        )

    def allow(self, origin: Origin) -> None:
        """Take the fence from a store."""
        self._admin(origin).execute(sql.SQL("DROP TRIGGER changeover_fence ON {}").format(self._table(origin)))

    def gate(self, origin: Origin, floor: Version) -> None:
        """Install a store's gate with its floor."""
        schema, name, key = {
            Origin.OLD: ("public", "follows", ("from_user", "to_channel")),
            Origin.NEW: ("public", "associations", ("subject", "object")),
        }[origin]
        install_gate(self._admin(origin), schema, name, key, floor)

    def move(self, epoch: int, store: str, *tenants: str) -> None:
        """Write the ledger's next epoch, of all rows or of some tenants."""
        self.ledger.connection.execute(
            "INSERT INTO changeover.authority VALUES (%s, %s, %s, '0/0', now(), 0, NULL, %s)",
            [MIGRATION, epoch, store, list(tenants) or None],
        )

    def record(self, stage: Stage) -> None:
        """Put a switch of the flag on record, as a command does."""
        history.record(self.ledger, history.ADVANCED, Stage.SHADOW, stage, None, {})

    def refuse_tenants(self, origin: Origin, epoch: int, tenants: Tenants) -> None:
        """Make a store refuse what is of some tenants and doesn't come through its gate, as the product does."""
        table = {Origin.OLD: "follows", Origin.NEW: "associations"}[origin]
        held = refusal.Refusal((refusal.TenantEpoch(epoch, tenants),), column=TENANT[origin])
        assert refusal.install(self._admin(origin), "public", table, held, time.monotonic() + 5)

    def fence_to_new(self) -> None:
        """Move authority to the new store, as the fence does."""
        self.refuse(Origin.OLD)
        self.fence_to_new_done()

    def fence_to_new_done(self) -> None:
        """Do what follows once the old store refuses."""
        self.gate(Origin.OLD, epoch_floor(1))
        self.move(1, "new")

    def rows(self, origin: Origin) -> list[tuple[Any, ...]]:
        """Return (user, channel, note) of every row."""
        statement = {
            Origin.OLD: "SELECT from_user, to_channel, note FROM public.follows ORDER BY 1, 2",
            Origin.NEW: "SELECT subject, object, attributes->>'note' FROM public.associations ORDER BY 1, 2",
        }[origin]
        return self._admin(origin).execute(sql.SQL(statement)).fetchall()

    def end_router_sessions(self, origin: Origin) -> int:
        """End every session that a router has with a store; return how many."""
        rows = self._admin(origin).execute(
            "SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity WHERE application_name = %s"
            " AND datname = current_database()",
            [application_name(MIGRATION, "router")],
        )
        return len(rows.fetchall())

    def _admin(self, origin: Origin) -> Connection:
        return {Origin.OLD: self.old, Origin.NEW: self.new}[origin]

    def _table(self, origin: Origin) -> sql.Identifier:
        return {Origin.OLD: sql.Identifier("public", "follows"), Origin.NEW: sql.Identifier("public", "associations")}[origin]


@pytest.fixture(scope="session")
def store_dsns(server: EmbeddedServer) -> Iterator[tuple[str, str]]:
    """Make the two databases once: every test begins by emptying them, which is quicker than new ones."""
    with fresh_database(server, "flags_old") as old, fresh_database(server, "flags_new") as new:
        yield old, new


def empty(connection: Connection) -> None:
    """Undo whatever the test before did to a database."""
    connection.execute("DROP SCHEMA IF EXISTS changeover CASCADE; DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    connection.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(sql.Identifier(connection.info.dbname)))


@pytest.fixture
def stores(store_dsns: tuple[str, str]) -> Iterator[Stores]:
    """Both stores with their tables, the new one's gate and the ledger."""
    old_dsn, new_dsn = store_dsns
    with (
        connect(old_dsn, "test-old") as old,
        connect(new_dsn, "test-new") as new,
        connect(new_dsn, "test-ledger") as session,
    ):
        empty(old)
        empty(new)
        old.execute(OLD_TABLE)
        new.execute(NEW_TABLE)
        ledger = Ledger(session, MIGRATION, new_dsn)
        ledger.create()
        made = Stores(old, new, old_dsn, new_dsn, ledger)
        row = old.execute("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn").fetchone()
        assert row is not None
        made.gate(Origin.NEW, image_version(int(row[0])))
        yield made


@pytest.fixture
def make_follow() -> Callable[..., Follow]:
    """Make the application's statements for one user."""
    return Follow


@pytest.fixture
def mappings() -> dict[str, TableMapping]:
    """Return the application's mappings, as a spec's router takes them."""
    return {"follows": TableMapping(to_new, to_old)}


@pytest.fixture
def flag_file(tmp_path: Path) -> Path:
    """Make a flag file that asks for off."""
    path = tmp_path / "flags.json"
    flagfile.write_stage(path, FLAG, Stage.OFF)
    return path


@pytest.fixture
def flag_client(flag_file: Path) -> Iterator[LDClient]:
    """Make an SDK client that follows the flag file."""
    client = flagfile.client(flag_file, poll_seconds=0.05)
    yield client
    client.close()  # type: ignore[no-untyped-call]


MakeRouter = Callable[..., Router]


@pytest.fixture
def make_router(stores: Stores, flag_client: LDClient) -> Iterator[MakeRouter]:
    """Make routers over the two stores, the flag file and the ledger; all of them are closed."""
    made: list[Router] = []

    def make(
        *, ledger: bool = True, limits: Limits | None = None, process: str | None = None, tenants: bool = False,
        mirrors: bool = True,
    ) -> Router:  # fmt: skip
        router = Router(
            old=stores.endpoint(Origin.OLD, tenants), new=stores.endpoint(Origin.NEW, tenants),
            mirrored=[FOLLOWS] if mirrors else [],
            stage=FlagStage(flag_client, FLAG, kind=TENANT[Origin.OLD] if tenants else None),
            authority=LedgerAuthority(stores.new_dsn, MIGRATION) if ledger else None,
            name=MIGRATION, process=process, limits=limits or PATIENT,
        )  # fmt: skip
        made.append(router)
        return router

    yield make
    for router in made:
        router.close()


@pytest.fixture
def set_stage(flag_file: Path, eventually: Callable[..., None]) -> Callable[[Router, Stage], None]:
    """Turn the flag and wait until a router acts at that stage."""

    def turn(router: Router, stage: Stage) -> None:
        flagfile.write_stage(flag_file, FLAG, stage)
        eventually(lambda: router.stage is stage)

    return turn


@contextmanager
def forked(body: Callable[[], object]) -> Iterator[None]:
    """Run a function in a forked child beside the block; its failure is the test's."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    try:
        yield
    finally:
        status = os.waitpid(child, 0)[1]
    assert status == 0, "the child failed: its traceback is in the captured output"


@pytest.fixture
def in_child() -> Callable[[Callable[[], object]], AbstractContextManager[None]]:
    """Run a function in a forked child."""
    return forked


@pytest.fixture
def eventually() -> Callable[..., None]:
    """Wait until a condition holds; a test fails when it does not within the seconds given."""
    return wait_until


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "the condition did not come true"
        time.sleep(0.01)


def once_within(seconds: float, attempt: Callable[[], object]) -> None:
    """Assert that an attempt takes no longer: the quickest of some, since the machine may stand still in any one of them."""
    until = time.monotonic() + PATIENCE
    while True:
        started = time.monotonic()
        attempt()
        if (took := time.monotonic() - started) < seconds:
            return
        assert time.monotonic() < until, f"it took {took:.2f} s"


@pytest.fixture(autouse=True)
def patient_followers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a follower's first look, and each of its statements, the time that a machine may stand still."""
    monkeypatch.setattr(follower, "FIRST_LOOK_SECONDS", PATIENCE)
    monkeypatch.setitem(follower.SETTINGS, "statement_timeout", f"{PATIENCE:.0f}s")
