"""Spark's JDBC sessions: the driver of Java is told what libpq made of a DSN, and is pinned as every other session of ours.

libpq resolves service and password files, environment, several hosts and their roles; a session of its own tells what came of it,
and Java gets that server, role and password. What Java has no word for is refused by name, never left out. Secrets are options
that Spark redacts, and no part of the URL.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from psycopg import sql

from changeover import settings as pins
from changeover.errors import UsageError
from changeover.session import FROM_ENVIRONMENT, connect, options_of, server_name
from changeover.spark import clientkey

JAVA = "the driver of Java by which Spark reads"

UNKNOWN = {
    "sslcrl": "reads no revocation list", "sslcrldir": "reads no revocation list",
    "require_auth": "can't be told which authentication to insist on",
}  # fmt: skip
"""What libpq takes and the driver of Java has no word for."""

SAME = {"channel_binding": "channelBinding", "sslnegotiation": "sslNegotiation", "krbsrvname": "kerberosServerName"}
"""libpq's names and those of the driver of Java, where the values are the same."""

SOCKETS = "org.newsclub.net.unix.AFUNIXSocketFactory$FactoryArg"
"""The factory of junixsocket (`changeover.spark.jars`): the driver of Java has TCP alone by itself."""

FROM_JDBC = (*FROM_ENVIRONMENT, "extra_float_digits")
"""What the driver sends of its own, above the options."""


def options(dsn: str, application: str) -> dict[str, str]:
    """Return Spark's JDBC options for a DSN of psycopg (driver).

    Args:
        dsn: The DSN.
        application: The session's name in pg_stat_activity.

    Returns:
        The options, which hold the password.

    Raises:
        ServerUnavailable: The server can't be reached.
        UsageError: The DSN has what Java can't be told.
    """
    with closing(connect(dsn, application)) as session:
        wire = session.pgconn
        parameters = {option.keyword.decode(): option.val.decode() for option in wire.info if option.val}
        parameters.update(
            host=wire.host.decode(), hostaddr=wire.hostaddr.decode(), port=wire.port.decode(), password=wire.password.decode(),
            user=wire.user.decode(), dbname=wire.db.decode(),
        )  # fmt: skip
    _require_known(dsn, parameters)
    return {
        "url": f"jdbc:postgresql://{_host(dsn, parameters)}:{parameters['port']}/{quote(parameters['dbname'], safe='')}",
        "driver": "org.postgresql.Driver",
        "ApplicationName": application,
        "options": options_of(dsn, _pinned()),
        "user": parameters["user"],
        "tcpKeepAlive": "false" if parameters.get("keepalives") == "0" else "true",
        **({"password": parameters["password"]} if parameters["password"] else {}),
        **{SAME[name]: parameters[name] for name in SAME if name in parameters},
        **({"gssEncMode": parameters["gssencmode"]} if parameters.get("gssencmode") in ("disable", "require") else {}),
        **(_by_socket(parameters) if _socket(parameters) else _tls(parameters)),
    }


def _require_known(dsn: str, parameters: Mapping[str, str]) -> None:
    for name, lack in UNKNOWN.items():
        if name in parameters:
            raise UsageError(f"{server_name(dsn)}: the DSN has {name}, and {JAVA} {lack}: leave it out")
    if not _socket(parameters):
        return
    if parameters["host"].startswith("@"):
        raise UsageError(
            f"{server_name(dsn)}: the DSN names the abstract socket {parameters['host']}, and {JAVA} takes a folder's alone: write"
            " host=/FOLDER or host=localhost"
        )
    if "requirepeer" in parameters:
        raise UsageError(
            f"{server_name(dsn)}: the DSN has requirepeer, and {JAVA} can't ask whose process a server is: leave it out"
        )


def _socket(parameters: Mapping[str, str]) -> bool:
    """Return whether libpq reached the server by a socket of its machine; an address comes before one."""
    return parameters["host"].startswith(("/", "@")) and not parameters["hostaddr"]


def _by_socket(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return what the driver of Java is told about a socket, at which libpq uses no TLS either, whatever the DSN says."""
    path = f"{parameters['host'].rstrip('/')}/.s.PGSQL.{parameters['port']}"
    return {"sslmode": "disable", "socketFactory": SOCKETS, "socketFactoryArg": path}


def _host(dsn: str, parameters: Mapping[str, str]) -> str:
    """Return the host for the URL: the address, where one is given and the name is not what TLS proves."""
    if _socket(parameters):
        return "localhost"  # which the factory of sockets takes for its own
    host, address = parameters["host"], parameters["hostaddr"]
    if parameters.get("sslmode") != "verify-full":
        host = address or host
    elif address and address not in _addresses(host):
        raise UsageError(
            f"{server_name(dsn)}: the DSN has hostaddr={address}, which {host} does not resolve to here; {JAVA} connects by the"
            " name that it verifies: let the name resolve to it"
        )
    return f"[{host}]" if ":" in host else host


def _addresses(host: str) -> set[str]:
    try:
        return {str(answer[4][0]) for answer in socket.getaddrinfo(host, None)}
    except OSError:
        return set()


def _tls(parameters: Mapping[str, str]) -> dict[str, str]:
    """Return what the driver of Java is told about TLS, by which it is as strict as libpq was."""
    mode, root = parameters.get("sslmode", "prefer"), parameters.get("sslrootcert", "")
    if root == "system":
        return {"sslmode": mode, "sslfactory": "org.postgresql.ssl.DefaultJavaSSLFactory"}
    authority = root or _default("root.crt")
    if mode == "require" and authority and Path(authority).exists():
        mode = "verify-ca"  # as libpq does where it has a root certificate
    given = {"sslmode": mode, **({"sslrootcert": root} if root else {})}
    certificate = parameters.get("sslcert") or _default("postgresql.crt")
    key = parameters.get("sslkey") or _default("postgresql.key")
    if parameters.get("sslcertmode") == "disable" or not Path(certificate).exists():
        return given
    password = {"sslpassword": parameters["sslpassword"]} if "sslpassword" in parameters else {}
    return {**given, "sslcert": certificate, "sslkey": clientkey.as_der(key, parameters.get("sslpassword")), **password}


def _default(name: str) -> str:
    """Return where libpq looks for a file of TLS that the DSN does not name."""
    return os.path.expanduser(f"~/.postgresql/{name}")


def _pinned() -> dict[str, str]:
    return {name: value for name, value in pins.pinned().items() if name != "client_encoding"}  # Java insists on its own UTF8


def start(transaction: sql.Composable) -> sql.Composed:
    """Return the statements with which a JDBC session begins: it pins what the driver sets, begins, and looks that all holds.

    Args:
        transaction: What makes the transaction what it is; it comes before anything that takes a
            snapshot.

    Returns:
        The statements, with semicolons between.
    """
    first = _pinned()
    late = sql.SQL(" ").join(
        sql.SQL("IF current_setting('server_version_num')::int >= {} THEN SET {}; END IF;").format(
            sql.Literal(setting.since), pins.assignment(setting.name, setting.value)
        )
        for setting in pins.PINNED
        if setting.since
    )
    return sql.SQL(
        "{sets}; {transaction}; DO $pins$ DECLARE other record; BEGIN {late} FOR other IN {deviations} LOOP"
        " RAISE EXCEPTION 'changeover: the session has % = % whatever we set', other.name, other.current_setting;"
        " END LOOP; END $pins$"
    ).format(
        sets=pins.statements({name: first[name] for name in FROM_JDBC}), transaction=transaction, late=late,
        deviations=pins.deviations(first),
    )  # fmt: skip
