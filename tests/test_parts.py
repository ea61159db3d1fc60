"""The parts of the suite: both run and end together, and a quick run starts no server and no Java."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.fix_parts import NEED, OTHERS, QUICK, SPARK
from tests.support.fix_postgres import default_binaries

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[1]
PATIENCE = 120.0

CONFTEST = f"""
import pytest
from hypothesis import settings

pytest_plugins = ["tests.support.fix_parts"]
settings.register_profile("suite")
for name in {sorted(NEED | {SPARK})}:
    globals()[name] = pytest.fixture(lambda: None, name=name)
"""

ONE_OF_EACH = """
import pytest

def test_plain():
    print("said by the others")

@pytest.mark.heavy
def test_heavy():
    pass

def test_with_spark(spark):
    print("said by Spark's")

""" + "".join(f"def test_with_{name}({name}):\n    pass\n\n" for name in sorted(NEED))

STARTING = """
import subprocess
import sys
import pytest

COMMAND = {command!r}
CHILD = "import subprocess, sys; subprocess.run(sys.argv[1:], check=True)"

def test_here():
    subprocess.run(COMMAND, check=True)

def test_hidden():
    with pytest.raises(RuntimeError):
        subprocess.run(COMMAND, check=True)

def test_in_a_child():
    assert subprocess.run([sys.executable, "-c", CHILD, *COMMAND], check=False).returncode

def test_a_script_of_that_name(tmp_path):
    script = tmp_path / "java"
    script.write_text("#!/bin/sh\\n")
    script.chmod(0o755)
    subprocess.run([script], check=True)
"""

WAITING = """
import time
from pathlib import Path
import pytest

@pytest.fixture
def place(request):
    place = Path(__file__).with_name(request.node.name)
    place.touch()
    yield
    place.with_suffix(".ended").touch()

def test_others(place):
    time.sleep({patience})

def test_spark(spark, place):
    time.sleep({patience})
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Make a suite of its own, with the plugin of the parts and nothing behind its fixtures."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider -rA\n")
    return tmp_path


def start(suite: Path, module: str, tests: str, *words: str) -> subprocess.Popen[str]:
    """Start pytest or both parts on tests of one's own."""
    (suite / "test_it.py").write_text(tests)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *words, "-c", str(suite / "pytest.ini"), str(suite)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(run: subprocess.Popen[str], code: int) -> str:
    """Return what a run says that ends with a code."""
    said, _ = run.communicate(timeout=PATIENCE)
    assert run.returncode == code, said
    return said


def test_each_test_is_in_one_of_the_two_parts_and_what_the_second_says_follows(suite: Path) -> None:
    said = output(start(suite, "tests.parts", ONE_OF_EACH), 0)
    first, _, second = said.partition(f"the part {OTHERS}")
    assert "said by Spark's" in first
    assert f"1 passed, {2 + len(NEED)} deselected" in first
    assert "said by the others" in second
    assert f"{2 + len(NEED)} passed, 1 deselected" in second


@pytest.mark.parametrize("broken", ["test_plain", "test_with_spark"])
def test_a_failure_of_either_part_is_one_of_both(suite: Path, broken: str) -> None:
    tests = ONE_OF_EACH + f"_ = {broken}\n\ndef {broken}({'spark' if 'spark' in broken else ''}):\n    assert False\n"
    assert "1 failed" in output(start(suite, "tests.parts", tests), 1)


def test_a_part_without_a_test_is_no_failure_unless_both_are(suite: Path) -> None:
    output(start(suite, "tests.parts", ONE_OF_EACH, "-k", "plain"), 0)
    output(start(suite, "tests.parts", ONE_OF_EACH, "-k", "nothing"), 5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_both_as_it_ends_one(suite: Path, number: int) -> None:
    run = start(suite, "tests.parts", WAITING.format(patience=PATIENCE))
    names = ("test_others", "test_spark")
    deadline = time.monotonic() + PATIENCE
    while not all((suite / name).exists() for name in names):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(number)
    assert output(run, 130).count("KeyboardInterrupt") >= 2
    assert all((suite / f"{name}.ended").exists() for name in names), "a fixture was not torn down"


def test_a_quick_run_is_of_the_tests_that_need_nothing(suite: Path) -> None:
    said = output(start(suite, "pytest", ONE_OF_EACH, "--part", QUICK), 0)
    assert f"1 passed, {2 + len(NEED)} deselected" in said
    assert "test_plain" in said


@pytest.mark.parametrize(
    "command", [[str(default_binaries() / "initdb"), "--help"], ["java", "-version"]], ids=["a server's program", "Java"]
)
def test_a_quick_run_refuses_a_server_and_java_and_says_so(suite: Path, command: list[str]) -> None:
    said = output(start(suite, "pytest", STARTING.format(command=command), "--part", QUICK), 1)
    assert f"Refused: a quick test starts {command[0]}: mark the test `heavy`" in said
    errors = [line for line in said.splitlines() if line.startswith("E  ")]  # a summary repeats them where CI is set
    assert sum(f"Failed: a quick test starts a server or Java: {command[0]}" in line for line in errors) == 3
    refused = [line.rpartition("::")[2].partition(" ")[0] for line in said.splitlines() if line.startswith("ERROR ")]
    assert refused == ["test_here", "test_hidden", "test_in_a_child"]
    assert "1 failed, 3 passed, 3 errors" in said


def test_without_a_quick_run_nothing_is_refused(suite: Path) -> None:
    tests = STARTING.format(command=[str(default_binaries() / "initdb"), "--help"])
    assert "2 failed, 2 passed" in output(start(suite, "pytest", tests), 1)
