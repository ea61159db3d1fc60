"""The demo's place: a folder with a server of its own, two databases, the spec, the flag file, and how to get in again.

Passwords stand in files that only their owner can read: one in the form of libpq's `passfile`, to which the printed DSNs
point, and one to be sourced by a shell. What is not kept is removed at the end, but for report and logs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from psycopg.conninfo import conninfo_to_dict

from changeover.demo import schema
from changeover.embedded.binaries import find_binaries, wheel_binaries
from changeover.embedded.server import EmbeddedServer
from changeover.errors import UsageError
from changeover.flags import flagfile
from changeover.flags.stages import ORDER
from changeover.interrupt import deferred
from changeover.session import connect
from changeover.spec import Spec, load

SETTINGS = {"max_wal_size": "4GB", "shared_buffers": "256MB", "wal_sender_timeout": "10min"}
"""Beside those of every server of ours: on a machine with other work capture may not get the processor for a minute."""

VARIABLES = {"OLD_DSN": "old", "NEW_DSN": "new"}
"""Environment variable that the spec names -> database."""


@dataclass(frozen=True)
class Place:
    """Where everything is; `dsns` carry the password and never leave the process but by the environment."""

    root: Path
    server: EmbeddedServer
    dsns: dict[str, str]

    @property
    def spec_file(self) -> Path:
        """The spec."""
        return self.root / "follows.toml"

    @property
    def lake(self) -> Path:
        """The folder of the Delta target."""
        return self.root / "lake"

    @property
    def work(self) -> Path:
        """The work folder of the migration: spool, differences, logs."""
        return self.root / "work"

    @property
    def flags(self) -> Path:
        """The flag's data file."""
        return self.root / "flags.json"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.root / "report.html"

    @property
    def environment_file(self) -> Path:
        """What a shell sources to go on with the demo's spec."""
        return self.root / "demo.env"

    def public_dsn(self, database: str) -> str:
        """Return a DSN that any client on libpq can use and that holds no secret: it names the password's file."""
        parts = conninfo_to_dict(self.dsns[database])
        passfile = quote(str(self.root / "pgpass"), safe="/")
        return f"postgresql://{parts['user']}@{parts['host']}:{parts['port']}/{database}?passfile={passfile}"

    def spec(self) -> Spec:
        """Load the spec."""
        return load(self.spec_file)


@contextmanager
def made(work: Path | None, shape: schema.Shape, keep: bool, left: Left | None = None) -> Iterator[Place]:
    """Make the place and stop its server at the end, with `keep` neither that nor remove its data (driver).

    After Ctrl-C nothing of it stays, reports and logs neither, unless it is to be kept; `left` then says what does.
    Raises UsageError for a folder that holds anything, EmbeddedServerFailed without server binaries.
    """
    binaries = find_binaries(wheel_binaries())
    own = work is None or not work.exists()
    root = _folder(work)
    server = furnished = None
    interrupted = False
    try:
        with deferred():  # a server that starts has no handle yet by which it could be ended
            server = EmbeddedServer.start(root / "server", settings=SETTINGS, bin_dir=binaries)
        dsns = {name: server.create_database(name) for name in VARIABLES.values()}
        furnished = _furnished(Place(root, server, dsns), shape)
        with _environment(furnished):
            yield furnished
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if keep and furnished is not None:
            if left is not None:
                left.kept = furnished
        else:
            if server is not None:
                server.remove()
            (_remove_all if interrupted else _remove_data)(root)
            if interrupted and own:
                root.rmdir()


@dataclass
class Left:
    """What an interrupted demo leaves behind: nothing, or the place that it was asked to keep."""

    kept: Place | None = None

    def sentence(self) -> str:
        """Return what a person has to know of it."""
        if self.kept is None:
            return "everything that it made is removed, and the same command begins anew"
        end = f"kill -INT {self.kept.server.pid} && sleep 2 && rm -r {self.kept.root}"
        return f"its server runs on and its data stay in {self.kept.root}, as --keep asks; `{end}` ends it"


def _folder(work: Path | None) -> Path:
    """Make the folder; the server's own user passes through it, and can list nothing in it."""
    root = (work or Path(tempfile.mkdtemp(prefix="changeover-demo-"))).absolute()
    if root.exists() and any(root.iterdir()):
        raise UsageError(f"{root} is not empty: name a new folder for the demo, or remove this one")
    if work is None or not root.exists():
        root.mkdir(parents=True, exist_ok=True)
        root.chmod(0o711)
    return root


def _furnished(place: Place, shape: schema.Shape) -> Place:
    for folder in (place.lake, place.work):
        folder.mkdir(mode=0o700)
    schema.write_spec(place.spec_file, lake=place.lake, work=place.work, flags=place.flags)
    flagfile.write_stage(place.flags, schema.FLAG, ORDER[0])
    parts = conninfo_to_dict(place.dsns["old"])
    _secret(place.root / "pgpass", f"{parts['host']}:{parts['port']}:*:{parts['user']}:{parts['password']}\n")
    lines = [f"export {name}={shlex.quote(place.dsns[database])}\n" for name, database in VARIABLES.items()]
    _secret(place.environment_file, "".join(lines))
    with connect(place.dsns["old"], "demo:old") as old:
        schema.create(old, shape)
    return place


def _secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text, encoding="utf-8")


@contextmanager
def _environment(place: Place) -> Iterator[None]:
    """Set what the spec asks for, in this process and so for its children; put back what was there."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    os.environ.update({name: place.dsns[database] for name, database in VARIABLES.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _remove_all(root: Path) -> None:
    """Remove all that is in the folder; an empty folder that was there before stays."""
    for entry in root.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink()


def _remove_data(root: Path) -> None:
    """Remove everything that holds rows or a secret; report, logs and spec stay."""
    for name in ("lake", "work/spool", "work/differences"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("pgpass", "demo.env"):
        (root / name).unlink(missing_ok=True)
