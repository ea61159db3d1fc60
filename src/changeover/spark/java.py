"""The Java runtime that Spark needs: found, never guessed.

JAVA_HOME is looked at first, then the path, then the folder where Linux distributions put their
runtimes. A runtime counts when it starts and says that it is Java 17 or later. Otherwise the answer
is one sentence that says what was found and the one command that helps. Nothing is installed unless
asked for by `--install`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from changeover.errors import JavaMissing

OLDEST = 17
"""Spark 4 starts on no older Java."""

SEARCH_ROOT = Path("/usr/lib/jvm")
"""Where Debian, Ubuntu, Fedora and SUSE keep their runtimes."""

PACKAGE = "openjdk-17-jre-headless"
ANSWER_WITHIN = 30.0


class Runtime(NamedTuple):
    """A Java runtime that starts: its home folder and its feature release, such as 17."""

    home: Path
    release: int


def find(environ: Mapping[str, str] | None = None, search_root: Path = SEARCH_ROOT) -> Path:
    """Return the home of the first fitting Java runtime (driver); raises JavaMissing, which names what was found."""
    runtimes: list[Runtime] = []
    for home in _homes(os.environ if environ is None else environ, search_root):
        release = _release(home)
        if release is None:
            continue
        if release >= OLDEST:
            return home
        runtimes.append(Runtime(home, release))
    raise JavaMissing(_found(runtimes), install_command())


def require() -> Path:
    """Point Spark's launcher at a fitting Java: set JAVA_HOME of this process and return it (driver, before Spark).

    Returns:
        JAVA_HOME.

    Raises:
        JavaMissing: No fitting Java is there.
    """
    home = find()
    os.environ["JAVA_HOME"] = str(home)
    return home


def install_command() -> str:
    """Return the one command that installs a fitting Java on this machine."""
    if shutil.which("apt-get"):
        command = f"apt-get install -y {PACKAGE}"
        return command if os.geteuid() == 0 else f"sudo {command}"
    if shutil.which("dnf"):
        return "sudo dnf install -y java-21-openjdk-headless"
    if shutil.which("brew"):
        return "brew install openjdk@17"
    return f"sudo apt-get install -y {PACKAGE}"


def _homes(environ: Mapping[str, str], search_root: Path) -> Iterator[Path]:
    if given := environ.get("JAVA_HOME"):
        yield Path(given)
    # An empty path means "nowhere" here; shutil.which would fall back to the system's default for None only.
    if on_path := shutil.which("java", path=environ.get("PATH", "")):
        yield Path(on_path).resolve().parent.parent
    if search_root.is_dir():
        yield from sorted(home for home in search_root.iterdir() if not home.is_symlink())


def _release(home: Path) -> int | None:
    """Return the feature release that a runtime reports, or None where there is none that starts."""
    java = home / "bin" / "java"
    if not java.is_file():
        return None
    try:
        process = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=ANSWER_WITHIN, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # a file that does not run is no runtime; the sentence of JavaMissing says what was found instead
    version = re.search(r'version "(?:1\.)?(\d+)', process.stderr + process.stdout)
    return int(version[1]) if version else None


def _found(runtimes: list[Runtime]) -> str:
    if not runtimes:
        return "none was found in JAVA_HOME, the path or " + str(SEARCH_ROOT)
    return "only " + ", ".join(f"Java {runtime.release} in {runtime.home}" for runtime in runtimes) + " was found"


def _install() -> None:
    """Install Debian's runtime, as root on a machine with apt-get only."""
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for arguments in (["update", "-q"], ["install", "-y", "-q", PACKAGE]):
        subprocess.run(["apt-get", *arguments], env=environ, check=True, stdout=sys.stderr)


def main(arguments: list[str]) -> int:
    """Print the home of a fitting Java; with `--install` install one first where root may and none is there."""
    try:
        home = find()
    except JavaMissing as missing:
        if "--install" not in arguments or os.geteuid() != 0 or not shutil.which("apt-get"):
            print(missing, file=sys.stderr)
            return missing.exit_code
        try:
            _install()
            home = find()
        except (subprocess.CalledProcessError, JavaMissing):
            print(missing, file=sys.stderr)
            return missing.exit_code
    print(home)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
