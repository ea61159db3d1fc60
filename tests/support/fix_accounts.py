"""Fixtures for the hand-over: accounts in the old store, loaded into the new one, with replay and an application beside them.

Everything is real: capture, replay, the SDK's file data source, routers in threads. An error of any of them fails the test.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from ldclient.migrations.types import Stage

from changeover.flags import flagfile
from changeover.flags.cutover import commands as cutover
from changeover.flags.fence.fence import fence
from changeover.flags.mirror.change import RowMapping, TableMapping
from changeover.flags.router.router import RoutedStore, Router, returned
from changeover.jobs.apply.rounds import replay
from changeover.jobs.capture.service import capture
from changeover.jobs.ledger.ledger import Ledger
from changeover.session import connect
from changeover.stores.postgres.gate import FENCED
from tests.support.fix_flags import PATIENCE, PATIENT, wait_until
from tests.support.fix_migration import STORE, MakeMigration, Migration

ACCOUNTS = "CREATE TABLE accounts (id bigint PRIMARY KEY, balance numeric(12,2) NOT NULL, note text)"
FLAG = "accounts-store"
TABLE = '[[table]]\nsource = "public.accounts"\ntarget = "ledgers"\nkey = ["id"]\n'
SPEC = f'{TABLE}[flag]\nkey = "{FLAG}"\ntarget = "store"\n'
MIRRORED = f'{SPEC}mirror = "application"\n'
ROWS = 200

MAX_PAUSE = 120.0
"""Seconds that a fence may hold up writers in tests which are not about that: the first batch may be slow on a busy machine."""

Application = Callable[..., AbstractContextManager[Router]]


@pytest.fixture(autouse=True)
def patient_fences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every fence in this process the long pause, the commands' own too, and what goes before it the time it needs."""
    assert fence.__kwdefaults__ is not None
    monkeypatch.setitem(fence.__kwdefaults__, "max_pause", MAX_PAUSE)
    monkeypatch.setattr(cutover, "ACKNOWLEDGED_SECONDS", PATIENCE)


@pytest.fixture
def moved(make_migration: MakeMigration) -> Migration:
    """Return a migration of accounts that is loaded and closed, its flag at shadow."""
    return loaded(make_migration, STORE)


@pytest.fixture
def mirrored(make_migration: MakeMigration) -> Migration:
    """Return the same migration with an application that mirrors its writes itself."""
    return loaded(make_migration, STORE, spec=MIRRORED)


def loaded(make_migration: MakeMigration, *targets: str, kind: str = "slot", spec: str = SPEC) -> Migration:
    """Return a migration of accounts into some targets, loaded and closed, its flag at shadow."""
    made = make_migration(spec, ACCOUNTS, targets=targets, kind=kind)
    made.old.execute("INSERT INTO accounts SELECT i, i * 1.5, 'n' || i FROM generate_series(1, %s) i", [ROWS])
    made.prepare()
    made.backfill()
    switch(made, Stage.SHADOW)
    return made


def switch(migration: Migration, stage: Stage) -> None:
    """Turn the flag as somebody else would: by replacing its file."""
    flagfile.write_stage(migration.spec.work / "flags.json", FLAG, stage)


@contextmanager
def following(migration: Migration) -> Iterator[None]:
    """Capture and replay for as long as the block lasts."""
    stop = threading.Event()
    errors: list[BaseException] = []

    def guarded(work: Any, **options: Any) -> None:
        try:
            work(migration.spec, *options.pop("more", ()), stop=stop, **options)
        except BaseException as error:
            logging.exception("%s ended", work.__name__)
            errors.append(error)

    threads = [
        threading.Thread(target=guarded, args=(capture,)),
        threading.Thread(target=guarded, args=(replay,), kwargs={"more": (migration.spark,), "follow": True}),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors, errors


@contextmanager
def routed(
    migration: Migration, table: str = "accounts", *, to_new: RowMapping = dict, to_old: RowMapping = dict
) -> Iterator[Router]:
    """Open a router of the migration; it mirrors where the spec says so."""
    client = flagfile.client(migration.spec.work / "flags.json")
    limits = replace(PATIENT, max_pause=MAX_PAUSE)  # writers wait as long as the fence does
    mappings = {table: TableMapping(to_new, to_old)} if migration.spec.mirrors else None
    router = Router.connect(migration.spec, mappings=mappings, client=client, limits=limits)
    try:
        yield router
    finally:
        router.drain(PATIENCE)
        router.close()
        client.close()  # type: ignore[no-untyped-call]


@contextmanager
def application(migration: Migration, threads: int = 3, hushed: threading.Event | None = None) -> Iterator[Router]:
    """Write to every account through a router, again and again, until the block ends; an error fails the test.

    While `hushed` is set nobody writes: a verification beside mirrored writes asks for a quieter moment where a key never stands
    still, and how many of them do depends on how fast the machine is.
    """
    stop = threading.Event()
    errors: list[BaseException] = []
    with routed(migration) as router:

        def write(first: int) -> None:
            account = first
            while not stop.wait(0.004):
                if hushed is not None and hushed.is_set():
                    continue
                account = account % ROWS + threads
                try:
                    add(router, account)
                    router.compare(old=finding("accounts", account), new=finding("ledgers", account))
                except BaseException as error:
                    errors.append(error)
                    return

        writers = [threading.Thread(target=write, args=(number,)) for number in range(threads)]
        for writer in writers:
            writer.start()
        try:
            yield router
        finally:
            stop.set()
            for writer in writers:
                writer.join()
    assert not errors, errors


@contextmanager
def unmirrored(migration: Migration) -> Iterator[Counter[str]]:
    """Add one to account after account in the store that has authority, by plain SQL; an error fails the test.

    There is no mirror, so whatever arrives in the other store was brought by a stream. Yields how many writes each table took.
    """
    taken: Counter[str] = Counter()
    stop, errors = threading.Event(), []

    def write() -> None:
        old_dsn, new_dsn = migration.spec.source.dsn.resolve(), migration.spec.targets[STORE].dsn_value
        try:
            with (
                connect(old_dsn, "application") as old, connect(new_dsn, "application") as new,
                Ledger.open(migration.spec, "application") as ledger,
            ):  # fmt: skip
                stores = {"old": (old, "accounts"), "new": (new, "ledgers")}
                session, table = stores[ledger.authority().store]
                account = 0
                while not stop.wait(0.005):
                    account = account % ROWS + 1
                    try:
                        written = session.execute(f"UPDATE {table} SET balance = balance + 1 WHERE id = %s".encode(), [account])
                        taken[table] += written.rowcount
                    except psycopg.Error as error:
                        if error.sqlstate != FENCED:
                            raise
                        session, table = stores[ledger.authority().store]
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=write, name="application")
    writer.start()
    try:
        yield taken
    finally:
        stop.set()
        writer.join()
    assert not errors, errors


def assert_nothing_lost(migration: Migration, taken: Counter[str], seconds: float = 60.0) -> None:
    """Assert that both stores come to hold every write that one of them took (a stream has to bring it yet)."""
    wanted = sum(number * 1.5 for number in range(1, ROWS + 1)) + taken.total()
    deadline = time.monotonic() + seconds
    while rows(migration.old, "accounts") != rows(migration.new, "ledgers") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [sum(row[1] for row in rows(*store)) for store in ((migration.old, "accounts"), (migration.new, "ledgers"))] == [
        wanted, wanted,
    ]  # fmt: skip
    assert rows(migration.old, "accounts") == rows(migration.new, "ledgers")


def wait_for_writes(router: Router, more: int = 150) -> None:
    """Wait until the application has written so often again, wherever to."""
    wanted = router.counters()["writes"] + more
    wait_until(lambda: router.counters()["writes"] >= wanted)


def add(router: Router, account: int, note: str | None = None) -> Any:
    """Make the application's write: one is added to an account's balance, and its note changed if there is one."""
    return router.run(lambda store: adding(store.of("accounts", "ledgers"), account, note)(store))


def adding(table: str, account: int, note: str | None = None) -> Any:
    """Return the write for one of the two tables."""

    def write(store: RoutedStore) -> RoutedStore:
        statement = f"UPDATE {table} SET balance = balance + 1, note = coalesce(%s, note) WHERE id = %s RETURNING *"
        store.mirror(returned(store.execute(statement.encode(), [note, account])))
        return store

    return write


def finding(table: str, account: int) -> Any:
    """Return the application's read."""
    return lambda cursor: cursor.execute(f"SELECT id, note FROM {table} WHERE id = %s", [account]).fetchone()


def rows(connection: Any, table: str) -> list[tuple[Any, ...]]:
    """Return every account of a store."""
    found: list[tuple[Any, ...]] = connection.execute(f"SELECT id, balance, note FROM {table} ORDER BY id").fetchall()
    return found
