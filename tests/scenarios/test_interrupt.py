"""Ctrl-C and SIGTERM while Spark works, by the real command line.

It is one sentence, nothing is left running, and the same command goes on.

The child is a session of its own, so that whatever it leaves behind, a JVM or a worker, is found by that session's number.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from changeover import failpoints
from changeover.cli.main import main
from tests.support.fix_migration import FOLLOWS, FOLLOWS_TABLE, NASTY_ROWS, STORE, MakeMigration

START_SECONDS = 300.0
END_SECONDS = 120.0
ROWS = 3
"""One a chunk: an append to Delta costs a commit."""

PROGRESS = re.compile(r"\w+: \d+ of \d+ chunks, [\d,]+ rows, [\d,]+ rows/s\n")
"""What a slow machine sees once a minute."""

SLOW = """
import os, time

def slowly(frame):
    wait, reached = {wait!r}, {reached!r}

    def stop(batches):
        while os.path.exists(wait):
            open(reached, "w").close()
            time.sleep(0.05)
        yield from batches

    return frame.mapInArrow(stop, frame.schema)
"""


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command in a session of its own; whatever is left of it when the test is over is killed."""
    child = subprocess.Popen(
        [sys.executable, "-m", "changeover.cli.main", *arguments], env={**os.environ, **environment}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        try:
            yield child
        finally:
            for pid in alive(child.pid):
                os.kill(pid, signal.SIGKILL)


def said(child: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait for a command's end and return its output and its errors, progress left out."""
    output, errors = child.communicate(timeout=START_SECONDS)
    return output, PROGRESS.sub("", errors)


def until(condition: Callable[[], object], seconds: float, child: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert child is None or child.poll() is None, child.communicate()
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)


def alive(session: int) -> dict[int, str]:
    """Return the processes of a session that have not ended, by their commands."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
    return found


def interrupted(child: subprocess.Popen[str], step: str, *, whole_group: bool) -> None:
    """Press Ctrl-C: a terminal sends the signal to the whole group, `kill` to one process."""
    assert any("java" in one for one in alive(child.pid).values()), "no JVM is there to be left behind"
    if whole_group:
        os.killpg(child.pid, signal.SIGINT)
    else:
        child.send_signal(signal.SIGINT)
    output, errors = said(child)
    assert (child.returncode, output) == (130, ""), errors
    assert errors == f"changeover: interrupted in {step}: nothing is lost, the same command goes on from here\n"
    until(lambda: not alive(child.pid), END_SECONDS)


def test_ctrl_c_while_spark_works(make_migration: MakeMigration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, reached = tmp_path / "wait", tmp_path / "reached"
    (tmp_path / "slow.py").write_text(SLOW.format(wait=str(wait), reached=str(reached)))
    monkeypatch.syspath_prepend(tmp_path)
    paths = os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    made = make_migration(FOLLOWS_TABLE + '[table.transform]\nfunction = "slow:slowly"\n', FOLLOWS)
    made.old.execute(NASTY_ROWS, {"rows": ROWS})
    made.prepare()
    path = made.spec.path

    with command("backfill", path, PYTHONPATH=paths, **{failpoints.VARIABLE: f"chunk-read:{tmp_path / 'chunk'}"}) as child:
        until((tmp_path / "chunk").exists, START_SECONDS, child)
        interrupted(child, "backfill", whole_group=True)
    assert not any(row.loaded for row in made.chunks(STORE))
    again = CliRunner().invoke(main, ["backfill", path, "--json"])
    assert again.exit_code == 0, again.output
    assert [load["rows"] for load in json.loads(again.stdout)["loads"]] == [ROWS, ROWS]

    with made.capturing():
        wait.touch()
        with command("verify", path, "--target", STORE, PYTHONPATH=paths) as child:
            until(reached.exists, START_SECONDS, child)
            interrupted(child, "verify", whole_group=False)
        wait.unlink()
        again = CliRunner().invoke(main, ["verify", path, "--target", STORE, "--json"])
    assert again.exit_code == 0, again.output
    assert [(v["verdict"], v["equal_rows"]) for v in json.loads(again.stdout)["verdicts"]] == [("equal", ROWS)]

    made.old.execute("UPDATE follows SET note = 'late' WHERE from_user = 1")
    made.capture()
    reached.unlink()
    wait.touch()
    with command("replay", path, "--target", STORE, "--follow", PYTHONPATH=paths) as child:
        until(reached.exists, START_SECONDS, child)
        child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):  # the batch under way is brought to its end
            child.wait(1)
        wait.unlink()
        output, errors = said(child)
        assert child.returncode == 130, errors
        assert output.startswith("replayed: 1 events")
        assert output.endswith("; interrupted: nothing is lost, the same command goes on from here\n")
        assert "Traceback" not in errors
        until(lambda: not alive(child.pid), END_SECONDS)
    made.assert_equal(STORE)


def test_an_error_in_a_task_is_one_sentence_and_nothing_else(make_migration: MakeMigration) -> None:
    made = make_migration(FOLLOWS_TABLE, FOLLOWS, targets=[STORE])
    made.old.execute("INSERT INTO follows (from_user, to_channel, blocked_on) VALUES (1, 2, 'no time at all')")
    made.prepare()
    with command("backfill", made.spec.path) as child:
        output, errors = said(child)
        assert (child.returncode, output) == (3, ""), errors
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith(
            "changeover: table public.follows, key (1, 2), column blocked_on: a row can't be carried over (CAST_INVALID_INPUT: "
        )
        until(lambda: not alive(child.pid), END_SECONDS)
