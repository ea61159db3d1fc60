"""DSNs in all forms: what psycopg connects by, Java does too, to the same server as the same role; the rest is refused by name."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pyspark.sql import SparkSession

from changeover.errors import ServerUnavailable, UsageError
from changeover.session import connect, server_name
from changeover.spark import clientkey, jdbc
from changeover.spark.failures import from_spark
from tests.support.fix_tls import CLIENT, PASSWORD, TlsServer

WHO = """
SELECT session_user::text AS role, current_database()::text AS database, coalesce(ssl, false) AS tls
FROM pg_stat_ssl WHERE pid = pg_backend_pid()
"""


def seen(spark: SparkSession, dsn: str) -> tuple[str, str, bool]:
    """Return role, database and whether TLS is used, as Java's session has them."""
    row = spark.read.format("jdbc").options(**jdbc.options(dsn, "test"), query=WHO).load().collect()[0]
    return row.role, row.database, row.tls


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Take the environment's own words about PostgreSQL away, and give it a home without files."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def forms(server: TlsServer, folder: Path) -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield (DSN, environment, role expected): one for each way to say where, who and by which proof."""
    files, own = server.files, conninfo_to_dict(server.server.dsn())
    port, user, password = str(own["port"]), str(own["user"]), str(own["password"])
    where = f"host=localhost port={port} dbname=postgres"
    for key, certificate in (("pkcs8", "client"), ("pkcs1", "client"), ("ec", "ec")):
        proof = f"user={CLIENT} sslcert={files}/{certificate}.crt sslkey={files}/{key}.key"
        yield server.dsn("postgres", proof), {}, CLIENT
    proof = f"user={CLIENT} sslcert={files}/client.crt sslkey={files}/encrypted.key sslpassword='{PASSWORD}'"
    yield server.dsn("postgres", proof), {}, CLIENT
    mine = f"user={user} password={password}"
    yield server.dsn("postgres", f"{mine} channel_binding=require hostaddr=127.0.0.1"), {}, user
    yield f"{where} {mine} sslmode=require sslrootcert={files}/ca.crt", {}, user
    yield f"host=127.0.0.1,localhost port=1,{port} dbname=postgres {mine} target_session_attrs=read-write", {}, user
    yield f"hostaddr=127.0.0.1 port={port} dbname=postgres {mine} gssencmode=disable keepalives=0", {}, user
    service, passwords = folder / "services", folder / "passwords"
    service.write_text(f"[old]\nhost=localhost\nport={port}\nuser={user}\ndbname=postgres\nsslmode=require\n")
    passwords.write_text(f"localhost:{port}:*:{user}:{password}\n")
    passwords.chmod(0o600)
    named = {"PGSERVICEFILE": str(service)}
    yield "service=old", {**named, "PGPASSFILE": str(passwords)}, user
    yield f"passfile={passwords}", {**named, "PGSERVICE": "old"}, user
    yield f"postgresql://{user}@localhost:{port}/postgres?application_name=mine", {"PGPASSWORD": password}, user
    everything = {"PGHOST": "localhost", "PGPORT": port, "PGUSER": user, "PGPASSWORD": password, "PGDATABASE": "postgres"}
    yield "", {**everything, "PGSSLMODE": "verify-ca", "PGSSLROOTCERT": f"{files}/ca.crt"}, user


def test_java_connects_by_every_form_that_psycopg_takes(
    tls_server: TlsServer, spark: SparkSession, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dsn, environment, role in forms(tls_server, alone):
        with monkeypatch.context() as here:
            for name, value in environment.items():
                here.setenv(name, value)
            with connect(dsn, "test") as session:
                row = session.execute(WHO).fetchone()
                assert row is not None
            assert seen(spark, dsn) == row == (role, "postgres", True), dsn.replace(str(tls_server.files), "…")


def test_secrets_are_options_and_no_part_of_the_url(tls_server: TlsServer, alone: Path) -> None:
    proof = f"user={CLIENT} sslcert={tls_server.files}/client.crt sslkey={tls_server.files}/encrypted.key sslpassword='{PASSWORD}'"
    told = jdbc.options(tls_server.dsn("postgres", proof), "test")
    assert {name for name, value in told.items() if PASSWORD in value} == {"sslpassword"}
    key = Path(told["sslkey"])
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert jdbc.options(tls_server.dsn("postgres", proof), "test")["sslkey"] == str(key)  # once a process


def test_a_connection_that_java_can_t_have_is_a_server_out_of_reach(
    tls_server: TlsServer, spark: SparkSession, alone: Path
) -> None:
    own = conninfo_to_dict(tls_server.server.dsn())
    dsn = tls_server.dsn("postgres", f"user={own['user']} password={own['password']}")
    told = jdbc.options(dsn, "test") | {"sslrootcert": "/nowhere/ca.crt"}
    with pytest.raises(ServerUnavailable, match=r"from Java: .*root certificate file /nowhere/ca\.crt"), from_spark("t", "a chunk"):
        spark.read.format("jdbc").options(**told, query=WHO).load().collect()
    told = jdbc.options(dsn, "test") | {"password": "wrong"}
    with pytest.raises(ServerUnavailable, match="password authentication failed"), from_spark("t", "a chunk"):
        spark.read.format("jdbc").options(**told, query=WHO).load().collect()


def test_what_java_has_no_word_for_is_refused_by_name(old_dsn: str, alone: Path) -> None:
    for more, told in {"sslcrl=/x/crl": "sslcrl", "require_auth=scram-sha-256": "require_auth"}.items():
        with pytest.raises(UsageError, match=f"the DSN has {told}, and the driver of Java"):
            jdbc.options(make_conninfo(old_dsn, **dict([more.split("=")])), "test")


def test_options_of_a_service_or_the_environment_hold_beside_ours(
    old_dsn: str, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shown(dsn: str) -> tuple[str, ...]:
        with connect(dsn, "test") as session:
            row = session.execute("SELECT current_setting('work_mem'), current_setting('row_security')").fetchone()
        assert row is not None
        return row

    own = conninfo_to_dict(old_dsn)
    options = "-c work_mem=7MB -c row_security=on"
    (alone / "services").write_text("\n".join(["[old]", *(f"{name}={value}" for name, value in own.items()), f"options={options}"]))
    assert shown(make_conninfo(old_dsn, options=options)) == ("7MB", "off")
    with monkeypatch.context() as here:
        here.setenv("PGSERVICEFILE", str(alone / "services"))
        assert shown("service=old") == ("7MB", "off")
        assert server_name("service=old") == "service old"
        here.setenv("PGSERVICE", "old")
        assert shown("") == ("7MB", "off")
    monkeypatch.setenv("PGOPTIONS", options)
    assert shown(old_dsn) == ("7MB", "off")
    monkeypatch.setenv("PGHOST", "elsewhere")
    assert server_name("dbname=x") == "elsewhere:5432/x"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "can't be read"),
        ("-----BEGIN PRIVATE KEY-----\n!!!\n-----END PRIVATE KEY-----\n", "is no PEM file"),
        ("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n", "has no sslpassword"),
    ],
)
def test_a_key_that_can_t_be_used_is_refused_by_its_path(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "client.key"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=f"the client key {path} .*{told}"):
        clientkey.as_der(str(path))
