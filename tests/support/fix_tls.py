"""Fixtures for TLS: a certificate authority of one's own, a server that shows a certificate of it, and keys for its clients."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from changeover.embedded.server import EmbeddedServer
from changeover.session import connect
from tests.support.fix_postgres import SETTINGS, binaries_by_major

CLIENT = "certy"
PASSWORD = "open sesame"
HBA = f"hostssl all {CLIENT} all cert\nhostssl all all all scram-sha-256\n"


@dataclass(frozen=True)
class TlsServer:
    """A server that takes TLS alone, the folder of its authority's files, and its port."""

    server: EmbeddedServer
    files: Path

    def dsn(self, database: str, rest: str) -> str:
        """Return a DSN that names the server as its certificate does, and verifies it."""
        root = self.files / "ca.crt"
        return f"host=localhost port={self.server.port} dbname={database} sslmode=verify-full sslrootcert={root} {rest}"


def openssl(folder: Path, *commands: str) -> None:
    """Run commands of openssl in a folder."""
    for command in commands:
        done = subprocess.run(["openssl", *command.split()], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def with_tls(bin_dir: Path) -> bool:
    """Return whether a server was built with TLS; the wheel's is not."""
    done = subprocess.run([bin_dir / "pg_config", "--configure"], capture_output=True, text=True, check=False)
    return "openssl" in done.stdout


def make_files(folder: Path) -> None:
    """Make an authority, a server's certificate, and a client's, whose key comes in each form."""
    (folder / "names").write_text("subjectAltName=DNS:localhost")
    openssl(
        folder,
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 30 -subj /CN=authority",
        "req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=localhost",
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -extfile names -out server.crt",
        f"req -newkey rsa:2048 -nodes -keyout pkcs8.key -out client.csr -subj /CN={CLIENT}",
        "x509 -req -in client.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -out client.crt",
        "rsa -in pkcs8.key -traditional -out pkcs1.key",
        "ecparam -genkey -name prime256v1 -noout -out ec.key",
        f"req -new -key ec.key -out ec.csr -subj /CN={CLIENT}",
        "x509 -req -in ec.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -out ec.crt",
    )
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", "pkcs8.key", "-passout", f"pass:{PASSWORD}", "-out", "encrypted.key"],
        cwd=folder, capture_output=True, check=True,
    )  # fmt: skip
    for key in folder.glob("*.key"):
        key.chmod(0o600)


@pytest.fixture(scope="session")
def tls_server() -> Iterator[TlsServer]:
    """Yield a server with TLS, of a release on this machine that was built with it."""
    bin_dir = next(place for place in binaries_by_major().values() if with_tls(place))
    with tempfile.TemporaryDirectory(prefix="changeover-tls-") as files:
        make_files(Path(files))
        server = EmbeddedServer.start(Path(tempfile.mkdtemp(prefix="changeover-pg-")), settings=SETTINGS, bin_dir=bin_dir)
        try:
            serve_tls(server, Path(files))
            yield TlsServer(server, Path(files))
        finally:
            server.remove()


def serve_tls(server: EmbeddedServer, files: Path) -> None:
    """Give a running server its certificate; our own connections to its loopback address stay as they are."""
    owner = server.data.stat()
    for name in ("server.key", "server.crt", "ca.crt"):
        place = server.data / name
        place.write_bytes((files / name).read_bytes())
        os.chown(place, owner.st_uid, owner.st_gid)
        place.chmod(0o600)
    rules = server.data / "pg_hba.conf"
    with connect(server.dsn(), "test") as admin:
        admin.execute(f"CREATE ROLE {CLIENT} LOGIN SUPERUSER".encode())
        admin.execute("ALTER SYSTEM SET ssl = on; ")
        admin.execute("ALTER SYSTEM SET ssl_ca_file = 'ca.crt'")
        rules.write_text(HBA + rules.read_text())
        admin.execute("SELECT pg_reload_conf()")
