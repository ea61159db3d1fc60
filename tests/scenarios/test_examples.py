"""Each example runs as its README says: its commands in their order, beside its application, judged from outside by plain SQL.

The commands are read from the README's blocks. Those that end run through click's runner, with the session that all tests share.
The application and capture are processes of their own; replay, which follows until it is ended, is a thread.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from changeover import api
from changeover.cli.main import main
from changeover.jobs.ledger.lease import is_held
from changeover.stores.postgres.gate import FENCED

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = sorted(path for path in EXAMPLES.iterdir() if path.is_dir())
FILES = {"README.md", "changeover.toml", "schema.sql"}

BACKGROUND = re.compile(r"(?P<command>.+) & (?P<name>\w+)=\$!( *#.*)?")
REFUSED = "# refused"
"""A comment that begins so says that the command ends with exit code 1."""

PATIENCE = 300.0
"""Seconds in which an open question, such as a gate's, has to be answered: no test is about how fast the machine is."""

Rows = list[tuple[Any, ...]]


@dataclass
class Process:
    """A command in the background, as a process of its own."""

    child: subprocess.Popen[str]

    @classmethod
    def start(cls, *command: str) -> Process:
        return cls(subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True))

    def end(self) -> str:
        """End it by SIGTERM; return what it printed."""
        self.child.send_signal(signal.SIGTERM)
        printed, _ = self.child.communicate(timeout=PATIENCE)
        return printed


class Following:
    """`changeover replay SPEC --follow`, as a thread."""

    def __init__(self, spec: str, spark: SparkSession) -> None:
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(spec, spark), name="replay")
        self.thread.start()

    def _run(self, spec: str, spark: SparkSession) -> None:
        try:
            api.replay(api.load(spec), spark, follow=True, stop=self.stop)
        except BaseException as error:
            self.error = error

    def end(self) -> str:
        self.stop.set()
        self.thread.join()
        if self.error is not None:
            raise self.error
        return ""


@dataclass
class Example:
    """An example in a folder of its own, with its databases and what runs in the background."""

    folder: Path
    spark: SparkSession
    background: dict[str, Process | Following] = field(default_factory=dict)
    done: Counter[str] = field(default_factory=Counter)
    """What the applications did, all their runs together."""
    apps: dict[str, str] = field(default_factory=dict)
    """The commands of the applications, by the names that the README gives them."""

    def run(self, section: str = "") -> None:
        """Run the commands of a section of the README, those before the first heading unless one is named."""
        for line in commands((self.folder / "README.md").read_text(encoding="utf-8"), section):
            self._run(line)

    def _run(self, line: str) -> None:
        if matched := BACKGROUND.fullmatch(line):
            self.start(matched["name"], matched["command"])
            return
        match shlex.split(line, comments=True):
            case ["kill", *names]:
                for name in names:
                    self.end(name.removeprefix("$"))
            case ["psql", dsn, "-f", path]:
                with session(os.path.expandvars(dsn)) as connection:
                    connection.execute((self.folder / path).read_bytes())
            case ["changeover", *words]:
                self._command(words, 1 if REFUSED in line else 0)
            case ["export", *_]:
                pass
            case other:
                raise AssertionError(f"no test runs {other}")

    def _command(self, words: list[str], wanted: int) -> None:
        """Run a command; what its exit code calls a question of time, or of another try, is asked again."""
        passing = {3} | ({1} if words[:2] == ["flags", "advance"] or "--check" in words else set())
        deadline = time.monotonic() + PATIENCE
        while True:
            result = CliRunner().invoke(main, words)
            assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
            if result.exit_code == wanted:
                return
            assert result.exit_code in passing, f"{words} ended with {result.exit_code}: {result.output}"
            assert time.monotonic() < deadline, f"{words} still ends with {result.exit_code}: {result.output}"
            time.sleep(2.0)  # each try opens many sessions, and takes the machine from what it waits for

    def start(self, name: str, command: str) -> None:
        """Start a command in the background."""
        match shlex.split(command):
            case ["python", script]:
                self.apps[name] = command
                self.background[name] = Process.start(script)
            case ["changeover", "capture", spec]:
                self.background[name] = capture = Process.start("-m", "changeover.cli.main", "capture", spec)
                await_capture(spec, capture)
            case ["changeover", "replay", spec, "--follow"]:
                self.background[name] = Following(spec, self.spark)
            case other:
                raise AssertionError(f"no test starts {other}")

    def end(self, name: str) -> None:
        """End what runs in the background; the application tells what it did."""
        running = self.background.pop(name)
        printed = running.end()
        if name in self.apps:
            assert isinstance(running, Process)
            assert running.child.returncode == 0
            self.done.update(json.loads(printed.splitlines()[-1]))

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """End the application, have `verify` find all equal, and start the application again after the block."""
        for name in self.apps:
            self.end(name)
        self._command(["verify", "changeover.toml"], 0)
        yield
        for name, command in self.apps.items():
            self.start(name, command)

    def close(self) -> None:
        """End whatever still runs; a test that failed leaves nothing behind."""
        for running in self.background.values():
            if isinstance(running, Process):
                running.child.kill()
                running.child.communicate()
            else:
                running.stop.set()
                running.thread.join()

    def kept(self, seeded: int) -> int:
        """Return how many rows there are by what the application says of its writes, each of which was acknowledged."""
        assert self.done["inserted"], self.done
        assert self.done["deleted"], self.done
        return seeded + self.done["inserted"] - self.done["deleted"]

    def lake(self, table: str, *columns: str) -> Rows:
        """Return the live rows of a table in the lake, read by Arrow."""
        read = DeltaTable(str(self.folder / "lake" / table)).to_pyarrow_table().to_pylist()
        return sorted(tuple(row[name] for name in columns) for row in read if not row.get("_deleted"))


def await_capture(spec: str, capture: Process) -> None:
    """Wait until capture holds its lease, as the README's comment says: `run` would start one of its own before."""
    loaded = api.load(spec)
    while capture.child.poll() is None:
        with session(loaded.ledger.resolve()) as ledger:
            if is_held(ledger, loaded.name, "capture"):
                return
        time.sleep(0.1)
    raise AssertionError(f"capture ended with {capture.child.returncode}")


def commands(readme: str, section: str) -> list[str]:
    """Return the lines of the shell blocks of a section of a README."""
    sections = re.split(r"^## ", readme, flags=re.M)
    wanted = [text for place, text in enumerate(sections) if (text.startswith(section) if section else place == 0)]
    assert len(wanted) == 1, f"{len(wanted)} sections begin with {section!r}"
    blocks = re.findall(r"^```sh\n(.*?)^```$", wanted[0], re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


@contextmanager
def session(dsn: str) -> Iterator[psycopg.Connection[Any]]:
    """Open a session as any client would."""
    with psycopg.connect(dsn, autocommit=True, options="-c TimeZone=UTC -c DateStyle=ISO") as connection:
        yield connection


def rows(variable: str, query: str) -> Rows:
    """Return the rows of a query in a store, sorted."""
    with session(os.environ[variable]) as connection:
        return sorted(connection.execute(query.encode()).fetchall(), key=repr)


def refusal(variable: str, statement: str) -> str | None:
    """Return the SQLSTATE with which a store refuses a statement, None where it takes it; nothing stays of it."""
    with session(os.environ[variable]) as connection, connection.transaction(force_rollback=True):
        try:
            connection.execute(statement.encode())
        except psycopg.Error as error:
            return error.sqlstate
    return None


def left_in_old(table: str) -> Rows:
    """Return what of changeover's is left in the old store."""
    return rows("OLD_DSN", f"""
        SELECT 'slot', slot_name::text FROM pg_replication_slots WHERE database = current_database()
        UNION ALL SELECT 'publication', pubname FROM pg_publication
        UNION ALL SELECT 'schema', nspname FROM pg_namespace WHERE nspname LIKE 'changeover%'
        UNION ALL SELECT 'trigger', tgname FROM pg_trigger WHERE tgrelid = '{table}'::regclass AND NOT tgisinternal
    """)  # fmt: skip


MakeExample = Callable[[str], Example]


@pytest.fixture
def make_example(
    old_dsn: str, new_dsn: str, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeExample]:
    """Copy an example into a folder of its own, beside two empty databases."""
    monkeypatch.setattr("changeover.jobs.load.copier.FEWEST_CHUNKS", 3)  # each costs a Spark job
    for variable, dsn in (("OLD_DSN", old_dsn), ("NEW_DSN", new_dsn), ("LEDGER_DSN", new_dsn)):
        monkeypatch.setenv(variable, dsn)
    made: list[Example] = []

    def make(name: str) -> Example:
        folder = tmp_path / name
        shutil.copytree(EXAMPLES / name, folder)
        monkeypatch.chdir(folder)
        made.append(Example(folder, spark))
        return made[-1]

    yield make
    for example in made:
        example.close()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_an_example_is_a_spec_a_schema_an_application_and_its_commands(folder: Path) -> None:
    files = {path.name for path in folder.iterdir() if path.name != "__pycache__"}
    assert files > FILES
    assert all(name.startswith("app") for name in files - FILES)
    api.load(folder / "changeover.toml")
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+\.\w+)\)", readme)) == files - {"README.md"}


def test_follows_go_to_a_store_and_a_lake(make_example: MakeExample) -> None:
    example = make_example("01-follows")
    old = """SELECT from_user, 'follows', to_channel, note, to_timestamp(blocked_on, 'YYYY-MM-DD HH24:MI:SS'), created_at
             FROM follows"""
    new = "SELECT entity_a, kind, entity_b, note, blocked_on, created_at FROM associations"
    example.run()
    example.run("Copy and prove")
    with example.quiet():
        before = rows("OLD_DSN", old)
        assert len(before) == example.kept(1000)
        assert rows("NEW_DSN", new) == before
        columns = ("entity_a", "kind", "entity_b", "note", "blocked_on", "created_at")
        assert sorted(map(repr, utc(example.lake("associations", *columns)))) == sorted(map(repr, utc(before)))
    example.run("Hand over")
    with example.quiet():
        assert len(rows("NEW_DSN", new)) == example.kept(1000)
        assert rows("NEW_DSN", new) == rows("OLD_DSN", old)
    example.run("Finish")
    assert len(rows("NEW_DSN", new)) == example.kept(1000)
    assert left_in_old("follows") == []


def test_a_lake_alone_holds_the_orders_that_are_not_deleted(make_example: MakeExample) -> None:
    example = make_example("02-lake")
    columns = ("id", "customer", "state", "total", "created_at", "deleted_at")
    example.run()
    example.run("Copy and prove")
    example.run("Follow")
    assert "equal" in (example.folder / "report.html").read_text(encoding="utf-8")
    example.run("Finish")
    live = rows("OLD_DSN", f"SELECT {', '.join(columns)} FROM orders WHERE deleted_at IS NULL")
    assert len(rows("OLD_DSN", "SELECT id FROM orders")) == example.kept(600)
    assert sorted(map(repr, utc(example.lake("orders", *columns)))) == sorted(map(repr, utc(live)))
    assert {*DeltaTable(str(example.folder / "lake" / "orders")).schema().to_arrow().names}.isdisjoint({"card"})
    assert left_in_old("orders") == []


def test_tenants_move_one_after_the_other(make_example: MakeExample) -> None:
    example = make_example("03-tenants")
    put_old, put_new = "INSERT INTO follows VALUES ({}, 1000)", "INSERT INTO associations VALUES ({}, 'follows', 1000)"

    def authority() -> dict[int, str]:
        """Return for some users which stores take a write of theirs that goes by no router."""
        stores = (("old", "OLD_DSN", put_old), ("new", "NEW_DSN", put_new))
        answers = {(user, name): refusal(variable, put.format(user)) for user in (7, 8, 9) for name, variable, put in stores}
        assert set(answers.values()) <= {None, FENCED}, answers
        return {user: "+".join(name for name, *_ in stores if answers[user, name] is None) for user in (7, 8, 9)}

    example.run()
    example.run("Copy and prove")
    example.run("Two tenants first")
    assert authority() == {7: "new", 8: "old", 9: "new"}
    example.run("One of them back")
    assert authority() == {7: "old", 8: "old", 9: "new"}
    example.run("All the others")
    assert authority() == {7: "new", 8: "new", 9: "new"}
    with example.quiet():
        after = rows("NEW_DSN", "SELECT entity_a, entity_b FROM associations WHERE kind = 'follows'")
        assert len(after) == example.kept(400)
        assert rows("OLD_DSN", "SELECT * FROM follows") == after
    example.run("Finish")
    assert len(rows("NEW_DSN", "SELECT * FROM associations")) == example.kept(400)
    assert left_in_old("follows") == []


def test_seven_steps_go_forward_back_and_forward_again(make_example: MakeExample) -> None:
    example = make_example("04-timestamps")
    old = "SELECT entry_id, to_timestamp(data, 'YYYY-MM-DD HH24:MI:SS.US') FROM entries"
    new = "SELECT moment_id, created_date FROM moments"
    example.run()
    example.run("Step 1")
    assert rows("NEW_DSN", "SELECT to_regclass('public.moments')::text") == [("moments",)]
    for step in (2, 3, 4, 5, 6):
        example.run(f"Step {step}")
        with example.quiet():
            assert rows("NEW_DSN", new) == rows("OLD_DSN", old)
            assert len(rows("NEW_DSN", new)) == example.kept(500)
    example.run("Step 7")
    assert len(rows("NEW_DSN", new)) == example.kept(500)
    assert left_in_old("entries") == []


def test_frameworks_go_there_and_back_at_once(make_example: MakeExample) -> None:
    example = make_example("05-frameworks")
    orders, items = "SELECT id, customer, placed FROM orders", "SELECT order_id, line, sku, price FROM items"

    def require_equal() -> None:
        for query in (orders, items):
            assert rows("NEW_DSN", query) == rows("OLD_DSN", query)
        assert len(rows("NEW_DSN", orders)) == example.kept(300)
        assert not [kind for kind in example.done if kind.startswith("failed")], example.done

    example.run()
    example.run("Copy and prove")
    example.run("There and back")
    with example.quiet():
        require_equal()
    example.run("Finish")
    assert len(rows("NEW_DSN", orders)) == example.kept(300)
    assert left_in_old("orders") == []


def utc(found: Rows) -> Rows:
    """Return rows with moments as text, since two readers give them two kinds of time zone."""
    return [tuple(value.isoformat() if hasattr(value, "isoformat") else value for value in row) for row in found]
