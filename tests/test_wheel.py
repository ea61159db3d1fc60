"""The wheel: the same content from the tree and from the sdist, all of it real files, built without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
INGREDIENTS = (
    "pyproject.toml",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "CHANGELOG.md",
    "src",
    "jobs",
    "verifiers",
    "flags",
)
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.pyc")


def build(kind: str, tree: Path, into: Path) -> Path:
    """Build in a process of its own, as installers do, with the setuptools that is installed."""
    code = f"from setuptools import build_meta; import sys; print(build_meta.build_{kind}(sys.argv[1]))"
    into.mkdir(parents=True, exist_ok=True)
    environ = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(into)], cwd=tree, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return into / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built from, links kept, so that no build writes into the checkout."""
    place = tmp_path_factory.mktemp("tree")
    for name in INGREDIENTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, place / name, symlinks=True, ignore=NOT_SHIPPED)
        elif source.is_file():
            shutil.copy(source, place / name)
    return place


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


def content(wheel: Path) -> dict[str, bytes]:
    """Return the files of a wheel; RECORD lists their hashes and is compared through them."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def expected() -> set[str]:
    """Return the files of the package as the checkout has them."""
    shipped = {".py", ".json", ".j2", ".properties", ".toml", ".typed"}
    found = set()
    for name, folder in {"": "src/changeover", "jobs/": "jobs", "verifiers/": "verifiers", "flags/": "flags"}.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            if path.is_file() and path.suffix in shipped and (name or inside.parts[0] not in LINKED):
                found.add(f"changeover/{name}{inside}")
    return found


LINKED = ("jobs", "verifiers", "flags")


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    packaged = {name for name in content(wheel) if ".dist-info/" not in name}
    assert packaged == expected()


def test_the_wheel_holds_the_linked_packages_as_files(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert not [info.filename for info in archive.infolist() if (info.external_attr >> 28) == 0o12]
    assert {f"changeover/{name}/__init__.py" for name in LINKED} <= set(content(wheel))


def test_the_wheel_from_the_sdist_is_the_same(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert content(build("wheel", unpacked, tmp_path / "wheel")) == content(wheel)


def test_the_metadata_names_the_base_install_and_the_extras(wheel: Path) -> None:
    (metadata,) = (data.decode() for name, data in content(wheel).items() if name.endswith("/METADATA"))
    lines = metadata.partition("\n\n")[0].splitlines()
    base = {line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line}
    assert {line.split()[1].split(">")[0].split("~")[0] for line in base} == {
        "click",
        "launchdarkly-server-sdk",
        "msgspec",
        "psycopg[binary]",
    }
    assert {f"Provides-Extra: {extra}" for extra in ("spark", "demo", "dev")} <= set(lines)


def test_the_wheel_runs_from_its_zip(wheel: Path) -> None:
    """`--py-files` of spark-submit takes the wheel renamed to .zip, which is imported without being unpacked."""
    archive = shutil.copy(wheel, wheel.with_suffix(".zip"))
    code = "import changeover.jobs, changeover.spec; print(changeover.jobs.__file__)"
    environ = {**os.environ, "PYTHONPATH": str(archive)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(archive))
