"""The folder of a PostgreSQL server of our own, and the unprivileged user that works in it.

PostgreSQL refuses root, so where we are root its programs run as another user, who can reach this folder and binaries that are
copied here if need be, and nothing else that was closed before. No mode or owner is changed outside the folder.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from changeover.embedded.binaries import major_version
from changeover.errors import EmbeddedServerFailed

SUPERUSER = "embedded"

SCRAM_SINCE = 16
"""The release from which on a hash's iterations are a setting.

They make a guess of a password dear, and each login as well: about half of its CPU time. Ours is random, of 144 bits.
"""

PROGRAMS_LOG = "programs.log"
"""Where initdb, pg_ctl and the rest write, in the server's folder."""

SIGNS = re.compile(
    r"(FATAL|PANIC|ERROR|error|fatal): |configuration parameter|parameter \"|could not |cannot |can't |[Pp]ermission denied|"
    r"No space left|No such file|not found"
)
"""What the first line of trouble holds: later lines tell of the cleaning up, as initdb's last one does."""

BEFORE = re.compile(r"^(.* \.\.\. )?(.*?(LOG|FATAL|PANIC|ERROR): +|(initdb|pg_ctl|postgres): +(error: +)?)?")
"""What stands in front of it: a step of initdb's that was under way, a log's time and level, the program's own name."""


@dataclass(frozen=True)
class Account:
    """The unprivileged user that the server runs as."""

    name: str
    uid: int
    gid: int


def server_account() -> Account | None:
    """Return the user to become, or None where we are nobody special: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = known.get("postgres") or known["nobody"]
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def run_as(account: Account | None, command: Sequence[str], root: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a server program from inside the folder; output goes to a file, since a daemon would keep a pipe open."""
    environ = {"PATH": os.defpath, "LC_ALL": "C"}
    if "TZ" in os.environ:
        environ["TZ"] = os.environ["TZ"]
    output = root / PROGRAMS_LOG
    with output.open("ab") as sink:
        return subprocess.run(
            command,
            cwd=root,
            env=environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C at the terminal is for whoever waits for this program, not for itself
            stdout=sink,
            stderr=sink,
            check=False,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )


def programs_output(root: Path) -> str:
    """Return what the server's programs have written so far, such as initdb and pg_ctl; empty before the first.

    Args:
        root: The server's folder.

    Returns:
        The whole text of the log of programs.
    """
    log = root / PROGRAMS_LOG
    return log.read_text(errors="replace") if log.exists() else ""


def first_error(output: str) -> str:
    """Return the line of a program's output that names the cause, which is the first error and not the last line (pure).

    A refused setting is a LOG line in front of a FATAL one that names the file only. initdb ends by cleaning up.

    Args:
        output: What initdb, pg_ctl or the server wrote in the attempt that failed.

    Returns:
        The first line that tells of an error, without time, level and program; the last line where none does.
    """
    lines = output.strip().splitlines() or ["no output"]
    line = next(filter(SIGNS.search, lines), lines[-1])
    return BEFORE.sub("", line).strip()


def _can_run(account: Account, command: Sequence[str], root: Path) -> bool:
    try:
        return run_as(account, command, root).returncode == 0
    except PermissionError:
        return False  # the program itself, or a folder above it, is closed to this user


LEFT_BY_A_KILLED_START = frozenset({"data", "copied", "password", PROGRAMS_LOG, "server.new", "server.log"})
"""What a start that was killed before its state file may leave; the next start makes it anew."""


def prepare_root(root: Path, bin_dir: Path, account: Account | None) -> Path:
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


def _copy_binaries(bin_dir: Path, root: Path, account: Account) -> Path:
    """Copy a closed installation (such as one in a home folder) to where the server's user may read it."""
    copies = root / "copied"
    shutil.rmtree(copies, ignore_errors=True)
    package, installation = bin_dir.parents[1], bin_dir.parent
    copied = copies / package.name / installation.name
    shutil.copytree(installation, copied, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")  # a wheel keeps its shared libraries beside the package
    if libraries.is_dir():
        shutil.copytree(libraries, copies / libraries.name, symlinks=True)
    for path in (copies, *copies.rglob("*")):
        if not path.is_symlink():
            os.chown(path, 0, account.gid)
            path.chmod(0o750 if path.is_dir() or os.access(path, os.X_OK) else 0o640)
    return copied / "bin"


def initialise(root: Path, bin_dir: Path, password: str, account: Account | None) -> None:
    """Run initdb in the folder, anew where a killed start left half of it; raises EmbeddedServerFailed where it fails."""
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
    if major_version(bin_dir) >= SCRAM_SINCE:
        options += ["-c", "scram_iterations=1"]
    begun = len(programs_output(root))
    try:
        completed = run_as(account, [*command, *options], root)
    finally:
        secret.unlink()
    if completed.returncode:
        reason = first_error(programs_output(root)[begun:])
        raise EmbeddedServerFailed(str(root), f"initdb failed ({reason}), see {root / PROGRAMS_LOG}")
    with (data / "postgresql.conf").open("a") as conf:
        conf.write("include 'changeover.conf'\n")
    (data / "changeover.conf").touch()
    if account is not None:
        os.chown(data / "changeover.conf", account.uid, account.gid)
