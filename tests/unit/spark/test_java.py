"""Java: the one that fits is found, and one that is missing or too old is one sentence with one command."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from changeover.errors import JavaMissing
from changeover.spark import java


def runtime(home: Path, says: str, exit_code: int = 0) -> Path:
    """Make a runtime that reports a version the way Java does, on standard error."""
    program = home / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{says}\" 2025-01-01' >&2\nexit {exit_code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return home


def test_nothing_anywhere_is_one_sentence_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(JavaMissing) as caught:
        java.find({"PATH": "", "JAVA_HOME": ""}, tmp_path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "none was found" in sentence
    assert java.install_command() in sentence
    assert str(pickle.loads(pickle.dumps(caught.value))) == sentence


def test_too_old_is_named_with_its_place(tmp_path: Path) -> None:
    old = runtime(tmp_path / "old", "1.8.0_402")
    older = runtime(tmp_path / "jvm" / "java-11", "11.0.22")
    with pytest.raises(JavaMissing, match=r"Java 8 in .*, Java 11 in") as caught:
        java.find({"PATH": str(old / "bin")}, older.parent)
    assert str(old) in str(caught.value)


def test_java_home_comes_before_the_path_and_the_path_before_the_folder(tmp_path: Path) -> None:
    first, second, third = (runtime(tmp_path / name, "21.0.2") for name in ("home", "path", "jvm/java-21"))
    environ = {"JAVA_HOME": str(first), "PATH": str(second / "bin")}
    assert java.find(environ, third.parent) == first
    assert java.find({"PATH": environ["PATH"]}, third.parent) == second
    assert java.find({}, third.parent) == third


@pytest.mark.parametrize("says", ["17", "17.0.15", "17-ea", "25.0.1"])
def test_releases_that_fit(tmp_path: Path, says: str) -> None:
    home = runtime(tmp_path / "java", says)
    assert java.find({"JAVA_HOME": str(home)}, tmp_path / "none") == home


def test_an_unusable_java_home_does_not_hide_the_next_one(tmp_path: Path) -> None:
    old, good = runtime(tmp_path / "old", "11.0.2"), runtime(tmp_path / "good", "17.0.1")
    assert java.find({"JAVA_HOME": str(old), "PATH": str(good / "bin")}, tmp_path / "none") == good


def test_a_program_that_is_no_java_is_passed_over(tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "bin" / "java"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"\x7fELF nothing")
    broken.chmod(0o755)
    with pytest.raises(JavaMissing, match="none was found"):
        java.find({"JAVA_HOME": str(broken.parent.parent)}, tmp_path / "none")


def test_require_sets_java_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = runtime(tmp_path / "java", "17.0.1")
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert java.require() == home
    assert os.environ["JAVA_HOME"] == str(home)


@pytest.mark.heavy
def test_the_command_prints_the_home_of_this_machine() -> None:
    done = subprocess.run([sys.executable, "-m", "changeover.spark.java"], capture_output=True, text=True, check=True)
    assert (Path(done.stdout.strip()) / "bin" / "java").is_file()


def test_the_command_says_the_sentence_without_a_traceback(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from changeover.spark import java; "
        f"java.find.__defaults__ = (None, pathlib.Path({str(tmp_path)!r})); sys.exit(java.main([]))"
    )
    environ = {**os.environ, "PATH": "", "JAVA_HOME": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == JavaMissing.exit_code
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Java 17 or later" in done.stderr
