"""The demo: the whole way by the command line, what it says of itself, and damage that it has to name."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from changeover.demo import tour
from changeover.demo.damage import KINDS, Damaged
from changeover.demo.place import Place
from changeover.embedded.server import EmbeddedServer
from changeover.jobs.install.leftovers import leftovers
from changeover.verifiers.compare.verdict import Difference
from tests.support.fix_demo import ROWS, DemoRun, RunDemo

STEPS = [step.name for step in tour.STEPS]


def test_both_targets_are_equal_at_the_end(kept_demo: DemoRun) -> None:
    assert kept_demo.document["verdicts"] == {"store": "equal", "lake": "equal"}
    assert kept_demo.document["stage"] == "complete"


def test_the_object_says_what_was_done(kept_demo: DemoRun) -> None:
    told = kept_demo.document
    assert told["rows"] == ROWS
    assert list(told["seconds"]) == STEPS
    assert told["writes_during"] > 0
    assert told["changed_meanwhile"] > 0


def test_what_was_written_to_the_new_store_alone_came_back(kept_demo: DemoRun) -> None:
    assert kept_demo.document["came_back"] > 0
    assert re.search(r"^reverse .* flags show: .*bytes behind, the stream is captured; ", kept_demo.err, re.MULTILINE)
    with kept_demo.connect("old") as old:
        row = old.execute("SELECT note FROM follows WHERE (from_user, to_channel) = (%s, %s)", list(tour.COMES_BACK)).fetchone()
    assert row == (tour.CHANGED,)


def test_a_step_up_says_what_kept_it_waiting_and_no_other_stage(kept_demo: DemoRun) -> None:
    switched = re.findall(r"^(\w+) .* s  (\w+) → (\w+), (?:first not ready: .*; then )?ready", kept_demo.err, re.MULTILINE)
    assert switched == [
        ("dualwrite", "off", "dualwrite"), ("shadow", "dualwrite", "shadow"), ("live", "shadow", "live"),
        ("rampdown", "live", "rampdown"), ("complete", "rampdown", "complete"),
    ]  # fmt: skip


def test_the_application_met_no_error_and_no_mismatch(kept_demo: DemoRun) -> None:
    assert (kept_demo.document["errors"], kept_demo.document["mismatches"]) == (0, 0)


def test_standard_output_holds_the_object_alone(kept_demo: DemoRun) -> None:
    assert len(kept_demo.out.splitlines()) == 1


def test_no_secret_is_printed(kept_demo: DemoRun) -> None:
    lines = (kept_demo.place / "pgpass").read_text().splitlines()
    password = lines[0].rpartition(":")[2]
    assert password not in kept_demo.out + kept_demo.err + (kept_demo.place / "report.html").read_text()
    for name in ("pgpass", "demo.env"):
        assert (kept_demo.place / name).stat().st_mode & 0o777 == 0o600


def test_nothing_of_ours_is_left_in_the_old_store(kept_demo: DemoRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD_DSN", kept_demo.document["stores"]["old"])
    monkeypatch.setenv("NEW_DSN", kept_demo.document["stores"]["new"])
    server = EmbeddedServer.attach(kept_demo.place / "server")
    assert leftovers(Place(kept_demo.place, server, {}).spec()) == []


def test_the_processes_have_ended(kept_demo: DemoRun) -> None:
    spec = str(kept_demo.place / "follows.toml").encode()
    ours = [entry for entry in Path("/proc").iterdir() if entry.name.isdigit() and spec in _command(entry)]
    assert ours == []


def _command(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""  # it ended meanwhile


def test_the_report_is_a_page(kept_demo: DemoRun) -> None:
    assert "public.follows" in Path(kept_demo.document["report"]).read_text()


@pytest.fixture(scope="module")
def damaged(demo: RunDemo) -> Iterator[DemoRun]:
    """Run the demo up to its first verdict, with every kind of damage after it."""
    run = demo("--rows", "600", "--json", *(word for kind in (*KINDS, "ghost") for word in ("--break", kind)))
    yield run
    shutil.rmtree(run.place)


def test_damage_exits_1_and_is_of_the_store_alone(damaged: DemoRun) -> None:
    assert damaged.code == 1, damaged.err
    assert damaged.document["verdicts"] == {"store": "different", "lake": "equal"}
    assert not (damaged.place / "server").exists(), "the server outlived a run that was not to be kept"
    assert not (damaged.place / "lake").exists()


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("ghost", r"class extra, key \(entity_a=3, kind=follows, entity_b=1\)"),
        ("lost-update", r"class mismatched, key \(entity_a=4, kind=follows, entity_b=2\) in column note"),
        ("timezone", r"class mismatched, key \(entity_a=5, kind=follows, entity_b=1\) in column blocked_on"),
        ("truncate", r"class mismatched, key \(entity_a=6, kind=follows, entity_b=3\) in column note"),
    ],
)
def test_damage_is_named_by_class_key_and_column(damaged: DemoRun, kind: str, named: str) -> None:
    assert re.search(named, damaged.err), kind


def test_damage_is_told_by_class_user_and_column_alone() -> None:
    ghost, note = Damaged("back", "extra", 3, None), Damaged("older", "mismatched", 4, "note")
    back = Difference("extra", {"entity_a": "3"}, (), None, {})
    older = Difference("mismatched", {"entity_a": "4"}, ("note",), {}, {})
    assert [[one.is_told(found) for found in (back, older)] for one in (ghost, note)] == [[True, False], [False, True]]
    assert not note.is_told(replace(older, columns=("note", "weight")))
    assert not note.is_told(replace(older, key={"entity_a": "5"}))


@pytest.mark.parametrize("arguments", [("--rows", "10"), ("--break", "nonsense")])
def test_bad_arguments_are_a_usage_error(demo: RunDemo, arguments: tuple[str, ...]) -> None:
    assert demo(*arguments).code == 2


def test_a_folder_with_something_in_it_is_refused(demo: RunDemo, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    run = demo("--work", str(tmp_path))
    assert run.code == 2
    assert "is not empty" in run.err
    assert "Traceback" not in run.err


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Make a folder for temporary ones that a server's own user can pass through."""
    folder = Path(tempfile.mkdtemp(prefix="changeover-interrupted-"))
    folder.chmod(0o711)
    yield folder
    for server in folder.glob("*/server"):
        EmbeddedServer.attach(server).remove()
    shutil.rmtree(folder)


def interrupted(temporary: Path, when: Callable[[Path, list[str]], bool], *arguments: str) -> str:
    """Run the demo, send it both signals one after the other once it has come so far, and return the sentence that it ends with."""
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "changeover.cli.main", "demo", "--rows", "600", *arguments],
        env={**os.environ, "TMPDIR": str(temporary)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, err = child.stdout, child.stderr
    assert out is not None
    assert err is not None
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(out))
    reader.start()
    try:
        deadline = time.monotonic() + 300
        while not any(when(place, said) for place in temporary.glob("changeover-demo-*")):
            assert child.poll() is None, err.read()
            assert time.monotonic() < deadline, said
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        time.sleep(0.05)
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
        assert child.wait(300) == 130, err.read()
        errors = err.read()
        assert "Traceback" not in errors
        return errors.splitlines()[-1]
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        reader.join()
        out.close()
        err.close()


def processes_of(folder: Path) -> list[bytes]:
    """Return the commands of the processes that name a folder or work in it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            command = _command(entry)
            with suppress(OSError):
                if bytes(folder) in command or (entry / "cwd").resolve(strict=True).is_relative_to(folder):
                    found.append(command)
    return found


@pytest.mark.heavy
@pytest.mark.parametrize(
    "when",
    [
        lambda place, said: (place / "server" / "data").exists(),
        lambda place, said: any(line.startswith("capture") for line in said),
    ],
    ids=["while its server starts", "in the backfill"],
)
def test_an_interrupted_demo_leaves_nothing_and_says_so(temporary: Path, when: Callable[[Path, list[str]], bool]) -> None:
    said = interrupted(temporary, when)
    assert said == "changeover: interrupted in demo: everything that it made is removed, and the same command begins anew"
    assert list(temporary.glob("changeover-*")) == []
    assert processes_of(temporary) == []


@pytest.mark.heavy
def test_an_interrupted_demo_that_is_to_be_kept_says_what_stays_and_how_it_ends(temporary: Path) -> None:
    said = interrupted(temporary, lambda place, said: any(line.startswith("set-up") for line in said), "--keep")
    (place,) = temporary.glob("changeover-demo-*")
    server = EmbeddedServer.attach(place / "server")
    assert server.running
    assert f"interrupted in demo: its server runs on and its data stay in {place}, as --keep asks" in said
    own = [command for command in processes_of(temporary) if b"-m\0changeover" in command]
    assert own == [], "the application, capture or the demo itself stays"
    ends = said.partition("`")[2].partition("`")[0]
    subprocess.run(["sh", "-c", ends], check=True, timeout=120)
    assert (server.running, place.exists()) == (False, False)
