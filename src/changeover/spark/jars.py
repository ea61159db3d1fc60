"""The Java archives that Spark does not ship: Delta Lake, the PostgreSQL driver and its way to a socket, beside Spark's own.

Spark's own resolver fetches them once, and a rename moves them into pyspark's `jars` folder. So an
archive is there whole or not at all, and no session needs a network or a setting afterwards. What
is there is not fetched again, and then no JVM is started.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from changeover.errors import ChangeoverError, CouldNotFinish
from changeover.spark import java


class Artifact(NamedTuple):
    """An archive by its coordinates."""

    group: str
    name: str
    version: str

    @property
    def coordinates(self) -> str:
        """The form that the resolver takes."""
        return f"{self.group}:{self.name}:{self.version}"

    @property
    def file_name(self) -> str:
        """The name that the resolver gives the file."""
        return f"{self.group}_{self.name}-{self.version}.jar"


DELTA = Artifact("io.delta", "delta-spark_4.2_2.13", "4.4.0")
POSTGRES = Artifact("org.postgresql", "postgresql", "42.7.7")

SOCKETS = Artifact("com.kohlschutter.junixsocket", "junixsocket-common", "2.10.1")
NATIVE = Artifact(SOCKETS.group, "junixsocket-native-common", SOCKETS.version)
"""junixsocket, under the Apache License 2.0: the PostgreSQL driver has TCP alone, and many servers give a socket's folder alone."""

ROOTS = (DELTA, POSTGRES, SOCKETS, NATIVE)
"""What the resolver is asked for; it brings what they need."""

NEEDED = (*ROOTS, Artifact("io.delta", "delta-storage", "4.4.0"))
"""What read, write, merge, OPTIMIZE, VACUUM and JDBC load; the rest of the tree Spark ships or never loads."""

RESOLVE_WITHIN = 600.0

_RESOLVE = """
import sys
from pyspark.sql import SparkSession
packages, ivy = sys.argv[1:]
builder = SparkSession.builder.master("local[1]").config("spark.jars.packages", packages).config("spark.jars.ivy", ivy)
builder.config("spark.ui.enabled", "false").config("spark.driver.host", "127.0.0.1").getOrCreate().stop()
"""


@dataclass(eq=False)
class JarsMissing(CouldNotFinish):
    """Archives that Spark needs are not there and could not be fetched."""

    problem: str

    def __str__(self) -> str:
        return f"Spark lacks the archives of Delta Lake or PostgreSQL: {self.problem}"


def folder() -> Path:
    """Return the folder of pyspark's own archives, without importing pyspark; raises JarsMissing where it is absent."""
    spec = importlib.util.find_spec("pyspark")
    if spec is None or spec.origin is None:
        raise JarsMissing("pyspark is not installed: install the extra `changeover[spark]` and run again")
    return Path(spec.origin).parent / "jars"


def missing(into: Path | None = None) -> tuple[Artifact, ...]:
    """Return the archives that are not in the folder yet; an empty tuple means that no network is needed any more."""
    jars = folder() if into is None else into
    return tuple(artifact for artifact in NEEDED if not (jars / artifact.file_name).is_file())


def fetch(into: Path | None = None) -> tuple[Artifact, ...]:
    """Fetch what is missing and return it (application, once per installation); raises JarsMissing or JavaMissing."""
    jars = folder() if into is None else into
    absent = missing(jars)
    if not absent:
        return ()
    with tempfile.TemporaryDirectory(prefix="changeover-jars-") as ivy:
        _resolve(Path(ivy))
        for artifact in absent:
            _put(Path(ivy) / "jars" / artifact.file_name, jars)
    return absent


def _resolve(ivy: Path) -> None:
    """Let a Spark session of its own process resolve the tree into `ivy/jars`."""
    environ = {**os.environ, "JAVA_HOME": str(java.find())}
    command = [sys.executable, "-c", _RESOLVE, ",".join(root.coordinates for root in ROOTS), str(ivy)]
    try:
        process = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=RESOLVE_WITHIN, check=False)
    except subprocess.TimeoutExpired as error:
        raise JarsMissing(f"its resolver took more than {RESOLVE_WITHIN:g} s, run again") from error
    if process.returncode:
        raise JarsMissing(
            f"its resolver could not fetch {' and '.join(root.coordinates for root in ROOTS)} ({_reason(process.stderr)}): "
            f"check the network and run `{sys.executable} -m changeover.spark.jars` again"
        )


def _reason(output: str) -> str:
    lines = [line.strip() for line in output.splitlines()]
    telling = [line for line in lines if "unresolved dependency" in line or "not found" in line]
    return (telling or [line for line in lines if line] or ["no output"])[-1]


def _put(resolved: Path, jars: Path) -> None:
    """Copy into the folder under a passing name, then rename: a reader sees a whole archive or none."""
    if not resolved.is_file():
        raise JarsMissing(f"the resolver brought no {resolved.name}: run again")
    passing = jars / f".{resolved.name}.{os.getpid()}"
    try:
        shutil.copyfile(resolved, passing)
        passing.replace(jars / resolved.name)
    finally:
        passing.unlink(missing_ok=True)


def main() -> int:
    """Fetch what is missing and name it, one line each."""
    try:
        fetched = fetch()
    except ChangeoverError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for artifact in fetched:
        print(f"fetched {artifact.coordinates}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
