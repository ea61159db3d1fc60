"""Sockets: a DSN that names the folder of a server's socket is taken by Java as by psycopg, in every form, and moves a table."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pyspark.sql import SparkSession

from changeover.embedded.server import EmbeddedServer
from changeover.errors import UsageError
from changeover.jobs.preflight.division import examined
from changeover.session import connect
from changeover.spark import jdbc
from tests.support.fix_migration import LAKE, STORE, MakeMigration
from tests.support.fix_postgres import default_binaries, fresh_database, passing_server

WHO = """
SELECT usename::text AS role, datname::text AS database, client_addr IS NULL AND client_port = -1 AS local
FROM pg_stat_activity WHERE pid = pg_backend_pid()
"""


@pytest.fixture(scope="module")
def socket_server() -> Iterator[EmbeddedServer]:
    """Yield a server whose socket is in its data folder."""
    with passing_server(default_binaries(), unix_socket_directories=".") as server:
        yield server


def local(server: EmbeddedServer, dsn: str) -> str:
    """Return a DSN of a server by its socket."""
    return make_conninfo(dsn, host=str(server.data))


def test_java_connects_by_the_socket_as_psycopg_does(
    socket_server: EmbeddedServer, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {name: str(value) for name, value in conninfo_to_dict(local(socket_server, socket_server.dsn())).items()}
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    plain = make_conninfo(**own)
    url = f"postgresql://{own['user']}@/{own['dbname']}?host={own['host'].replace('/', '%2F')}&port={own['port']}"
    forms = [
        (plain, {}),
        (f"{plain} sslmode=prefer channel_binding=prefer gssencmode=prefer keepalives=0", {}),
        (f"{plain} sslmode=require sslrootcert=/nowhere/ca.crt", {}),  # libpq asks for no TLS where there is no network
        (url, {"PGPASSWORD": own["password"]}),
        ("", {f"PG{name.upper().replace('DBNAME', 'DATABASE')}": value for name, value in own.items()}),
    ]
    for dsn, environment in forms:
        with monkeypatch.context() as here:
            for name, value in environment.items():
                here.setenv(name, value)
            with connect(dsn, "test") as session:
                row = session.execute(WHO).fetchone()
            assert row == (own["user"], "postgres", True)
            told = jdbc.options(dsn, "test")
            assert spark.read.format("jdbc").options(**told, query=WHO).load().collect()[0] == row, dsn


@pytest.mark.heavy
def test_what_java_can_t_do_at_a_socket_is_refused_by_name(socket_server: EmbeddedServer) -> None:
    dsn = local(socket_server, socket_server.dsn())
    peer = socket_server.data.owner()
    with pytest.raises(UsageError, match="the DSN has requirepeer, and the driver of Java"):
        jdbc.options(make_conninfo(dsn, requirepeer=peer), "test")
    assert jdbc.options(make_conninfo(socket_server.dsn(), requirepeer=peer), "test")  # libpq passes over it, too


def test_a_table_moves_between_databases_that_are_reached_by_a_socket(
    socket_server: EmbeddedServer, make_migration: MakeMigration, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fresh_database(socket_server, "old") as old, fresh_database(socket_server, "new") as new:
        monkeypatch.setenv("OLD_DSN", local(socket_server, old))
        monkeypatch.setenv("NEW_DSN", local(socket_server, new))
        with connect(old, "test") as session:
            session.execute("CREATE TABLE t (id bigint PRIMARY KEY, said text)")
            session.execute("INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 300) i")
        made = make_migration('[[table]]\nsource = "public.t"\ntarget = "t"\nkey = ["id"]\n')
        with connect(old, "test") as made.old, connect(new, "test") as made.new:
            assert examined(made.spec).reasons == []
            made.prepare()
            made.backfill()
            assert {name: verdict.word for name, verdict in made.verify().items()} == {STORE: "equal", LAKE: "equal"}
            assert made.new.execute("SELECT count(*), max(said) FROM t").fetchone() == (300, "row 99")
            made.abort()
