"""The command line with bad input: one sentence, the documented exit code, no traceback, no secret, and no JVM without need.

Commands run through click's runner; those that a signal or the absence of Java concerns run as processes of their own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pyspark.sql import SparkSession

from changeover.cli.main import main
from changeover.embedded.server import EmbeddedServer
from changeover.jobs.capture import service as capture_module
from changeover.jobs.guarantee import assumptions, definition
from changeover.jobs.install.leftovers import leftovers
from changeover.jobs.ledger.epochs import OLD
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Stream
from changeover.jobs.source.catalog import source_table
from changeover.jobs.spool.table import Spool
from changeover.position import parse_lsn
from changeover.session import Connection, connect
from changeover.spark import java
from changeover.spec import Spec, load
from changeover.stores import open_store
from changeover.stores.base.interface import TargetTable
from changeover.stores.base.pgtypes import Column
from tests.support.fix_postgres import default_binaries

COLUMNS = """
[table.columns]
entity_a = "from_user"
kind = "'follows'"
entity_b = "to_channel"
"""

SPEC = """
name = "{name}"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "public.follows"
target = "associations"
key = ["entity_a", "kind", "entity_b"]
{columns}
[work]
path = "{work}"
"""

TARGET = TargetTable(
    "public",
    "associations",
    (
        Column("entity_a", "bigint", "bigint", True),
        Column("kind", "text", "string", True),
        Column("entity_b", "bigint", "bigint", True),
    ),
    ("entity_a", "kind", "entity_b"),
)

FOLLOWS = "CREATE TABLE follows (from_user bigint, to_channel bigint, note text, PRIMARY KEY (from_user, to_channel))"
"""Three columns in place of the demo's: commands are tried on it, not values."""

WITHIN = 120.0


@dataclass
class Case:
    """A spec on disk, both of its databases reachable by the environment, and sessions to look at them."""

    path: Path
    secret: str
    old: Connection
    new: Connection
    monkeypatch: pytest.MonkeyPatch

    @property
    def spec(self) -> Spec:
        return load(self.path)

    @property
    def work(self) -> Path:
        return self.spec.work

    def change(self, before: str, after: str) -> None:
        """Change the spec's text."""
        text = self.path.read_text()
        assert before in text
        self.path.write_text(text.replace(before, after))

    def invoke(self, *arguments: str) -> Result:
        """Run a command; whatever it says, it says without a traceback and without a password."""
        done = CliRunner().invoke(main, arguments)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        assert "Traceback" not in done.output
        assert self.secret not in done.output
        return done

    def run(self, command: str, *more: str) -> Result:
        """Run a command on the spec."""
        return self.invoke(*command.split(), str(self.path), *more)

    def refused(self, code: int, command: str, *more: str) -> str:
        """Run a command that has to fail; return its one sentence."""
        done = self.run(command, *more)
        assert done.exit_code == code, done.output
        return sentence(done.stderr)


def sentence(errors: str) -> str:
    """Return the one line that a failed command says."""
    lines = errors.strip().splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("changeover: ")
    return lines[0]


@pytest.fixture
def case(old_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    path = tmp_path / "spec.toml"
    name = f"c{random.getrandbits(40):x}"
    path.write_text(SPEC.format(name=name, work=tmp_path / "work", columns=COLUMNS))
    with connect(old_dsn, "test-old") as old, connect(new_dsn, "test-new") as new:
        old.execute(FOLLOWS)
        yield Case(path, str(conninfo_to_dict(old_dsn)["password"]), old, new, monkeypatch)


@pytest.fixture
def prepared(case: Case) -> Case:
    """Make a migration as prepare leaves it, by plain SQL and so without Spark."""
    make_prepared(case.spec, case.old)
    return case


def make_prepared(spec: Spec, old: Connection) -> None:
    slot = sql.Identifier(spec.slot)
    old.execute(sql.SQL("CREATE PUBLICATION {} FOR TABLE follows").format(slot))
    made = old.execute(
        "SELECT lsn::text, (SELECT system_identifier::text FROM pg_control_system()),"
        " (SELECT timeline_id FROM pg_control_checkpoint()) FROM pg_create_logical_replication_slot(%s, 'pgoutput')",
        [spec.slot],
    ).fetchone()
    assert made is not None
    with Ledger.open(spec, "test") as ledger:
        ledger.create()
        stream = Stream(parse_lsn(made[0]), made[1], made[2], spec.slot, spec.slot, "none", "none")
        ledger.record_migration(spec, stream)
        definition.record(ledger, OLD, assumptions.present(spec, old, spec.slot))
        (table,) = spec.tables
        seen = source_table(old, table)
        assert seen is not None
        ledger.record_table(table.source, seen.filenode, seen.columns)
        ledger.record_load(table.source, "store", stream.l0, created=True)
        with open_store(spec, spec.targets["store"], "test") as store:
            store.create(TARGET)
            store.install(TARGET, stream.image)
        ledger.audit("prepare", "done", {})
    spec.work.mkdir(exist_ok=True)
    Spool(spec.work / "spool").create()


@contextmanager
def server_with(**settings: str) -> Iterator[EmbeddedServer]:
    """Run a server of the test's own, which it may stop."""
    root = Path(tempfile.mkdtemp(prefix="changeover-pg-"))
    server = EmbeddedServer.start(root, settings={"fsync": "off", **settings}, bin_dir=default_binaries())
    try:
        yield server
    finally:
        server.remove()


# -- a side that can't be reached


@pytest.mark.parametrize("command", ["check", "run", "status", "abort", "backfill", "capture", "finalize", "flags show"])
def test_a_server_that_is_not_there_is_one_sentence(case: Case, command: str) -> None:
    case.change("[work]", '[flag]\nkey = "k"\ntarget = "store"\n[work]')
    for name in ("OLD_DSN", "NEW_DSN"):
        case.monkeypatch.setenv(name, make_conninfo(os.environ[name], port=1))
    said = case.run(command)
    assert said.exit_code == 3
    last = said.stderr.strip().splitlines()[-1]
    assert "127.0.0.1:1/" in last
    assert "can't be reached" in last
    assert "run the same command again" in last


def test_a_wrong_password_is_not_repeated(case: Case) -> None:
    case.monkeypatch.setenv("OLD_DSN", make_conninfo(os.environ["OLD_DSN"], password="not-the-password"))
    said = case.refused(3, "check")
    assert "password authentication failed" in said
    assert "not-the-password" not in said


@pytest.mark.parametrize(
    "dsn", ["s3cret", "host=h password='s3cret", "postgresql://u:s3cret@[::1/d", "postgresql://u:s3@cret@127.0.0.1/d"]
)
def test_a_dsn_that_is_none_names_its_variable_and_repeats_nothing(case: Case, dsn: str) -> None:
    case.monkeypatch.setenv("OLD_DSN", dsn)
    said = case.refused(2, "check")
    assert "source.dsn: the environment variable OLD_DSN is not a PostgreSQL DSN" in said
    assert "s3cret" not in said
    assert "cret@" not in said


def test_a_server_that_goes_down_midway_is_named_and_nothing_is_lost(case: Case) -> None:
    case.monkeypatch.setitem(capture_module.capture.__kwdefaults__ or {}, "patience", 0.5)
    with server_with() as server:
        dsn = server.create_database("old")
        case.monkeypatch.setenv("OLD_DSN", dsn)
        with connect(dsn, "test") as old:
            old.execute(FOLLOWS)
            make_prepared(case.spec, old)
            old.execute("INSERT INTO follows VALUES (1, 1, 'before')")
        spool = Spool(case.work / "spool")

        def stop_midway() -> None:
            wait_for(lambda: spool.end() > 0)
            server.stop(immediate=True)

        stopper = threading.Thread(target=stop_midway)
        stopper.start()
        said = case.refused(3, "capture")
        stopper.join()
        assert f"127.0.0.1:{server.port}/old can't be reached" in said
        before = len(spool.events())
        server.restart()
        with connect(dsn, "test") as old:
            old.execute("INSERT INTO follows VALUES (1, 2, 'after')")
        child = start("capture", str(case.path))
        wait_for(lambda: len(spool.events()) > before)
        stop(child, signal.SIGINT)
    assert [row["row"] for row in events(case)] == [
        {"from_user": "1", "to_channel": "1", "note": "before"},
        {"from_user": "1", "to_channel": "2", "note": "after"},
    ]


# -- a plan that is refused


def test_a_sound_plan_is_safe_and_check_changes_nothing(case: Case) -> None:
    done = case.run("check")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == "safe"
    assert leftovers(case.spec) == []
    assert not case.work.exists()


REFUSALS = [
    ("DROP TABLE follows", "there is no table public.follows"),
    ("ALTER TABLE follows DROP CONSTRAINT follows_pkey", "has no primary key and no replica identity"),
    ("ALTER TABLE follows REPLICA IDENTITY NOTHING", "has no primary key and no replica identity"),
    ("ALTER TABLE follows ADD COLUMN at point", "public.follows.at has the type point, which is not proven exact"),
    ("ALTER TABLE follows SET UNLOGGED", "is not a permanent table"),
    ("CREATE TABLE later () INHERITS (follows)", "takes part in inheritance"),
    (
        "ALTER TABLE follows DROP CONSTRAINT follows_pkey, ADD PRIMARY KEY (from_user, to_channel) DEFERRABLE",
        "the key of public.follows is deferrable",
    ),
]


@pytest.mark.parametrize(("statement", "reason"), REFUSALS, ids=[reason[:32] for _, reason in REFUSALS])
def test_an_unsafe_plan_is_refused_with_its_reason(case: Case, statement: str, reason: str) -> None:
    case.old.execute(statement.encode())
    done = case.run("check")
    assert done.exit_code == 1
    assert any(line.startswith("refused: ") and reason in line for line in done.stdout.splitlines())
    said = case.run("run")
    assert said.exit_code == 1
    assert reason in said.stderr.strip().splitlines()[-1]
    assert leftovers(case.spec) == []


IDENTITY = "ticket is GENERATED ALWAYS AS IDENTITY outside the key"


def test_an_identity_that_no_update_can_bring_is_refused_on_the_side_that_is_written_to(case: Case) -> None:
    case.old.execute("ALTER TABLE follows ADD ticket bigint GENERATED ALWAYS AS IDENTITY")
    assert case.run("check").exit_code == 0, "without a flag nothing is written to the old store"
    case.change("[work]", '[flag]\nkey = "k"\ntarget = "store"\n[work]')
    assert f"refused: public.follows.{IDENTITY}, so no mirrored update can bring it" in case.run("check").stdout
    case.old.execute("ALTER TABLE public.follows ALTER ticket SET GENERATED BY DEFAULT")
    case.new.execute(
        "CREATE TABLE associations (entity_a bigint GENERATED ALWAYS AS IDENTITY, kind text, entity_b bigint,"
        " ticket bigint GENERATED ALWAYS AS IDENTITY, PRIMARY KEY (entity_a, kind, entity_b))"
    )
    refused = [line for line in case.run("check").stdout.splitlines() if line.startswith("refused")]
    assert len(refused) == 1, "one of the key is no hindrance"
    assert IDENTITY in refused[0]


def test_a_part_of_a_partitioned_table_is_refused(case: Case) -> None:
    case.old.execute("DROP TABLE follows")
    case.old.execute("CREATE TABLE whole (from_user bigint PRIMARY KEY, to_channel bigint) PARTITION BY RANGE (from_user)")
    case.old.execute("CREATE TABLE follows PARTITION OF whole DEFAULT")
    assert "is a partition of whole: name the whole table" in case.run("check").stdout


def test_rows_in_the_target_before_prepare_are_refused(case: Case) -> None:
    case.new.execute(
        "CREATE TABLE associations (entity_a bigint, kind text, entity_b bigint, PRIMARY KEY (entity_a, kind, entity_b))"
    )
    case.new.execute("INSERT INTO associations VALUES (1, 'follows', 2)")
    done = case.run("check")
    assert done.exit_code == 1
    assert "target store: table associations has rows" in done.stdout


def test_a_server_without_logical_decoding_is_refused(case: Case) -> None:
    with server_with(wal_level="replica") as server:
        dsn = server.create_database("old")
        case.monkeypatch.setenv("OLD_DSN", dsn)
        with connect(dsn, "test") as old:
            old.execute(FOLLOWS)
        done = case.run("check")
        assert done.exit_code == 1
        assert "wal_level is replica: set wal_level = logical and restart the server" in done.stdout


# -- a spec that is wrong


@pytest.mark.parametrize("command", ["check", "plan", "run", "status"])
def test_a_spec_half_written_names_the_line(case: Case, command: str) -> None:
    case.path.write_text(case.path.read_text() + '[flag]\nkey = "follows')
    lines = len(case.path.read_text().splitlines())
    assert f"at line {lines}" in case.refused(2, command).replace("end of document", f"at line {lines}")


def test_a_broken_line_in_the_middle_is_named(case: Case) -> None:
    case.change('kind = "postgres"', "kind = postgres")
    line = 1 + next(i for i, text in enumerate(case.path.read_text().splitlines()) if text == "kind = postgres")
    assert f"at line {line}" in case.refused(2, "check")


def test_an_unknown_key_has_a_hint(case: Case) -> None:
    case.change("[table.columns]", "[table.colums]")
    assert "colums: unknown key: did you mean columns?" in case.refused(2, "check")


@pytest.mark.parametrize("variable", ["OLD_DSN", "NEW_DSN"])
def test_a_missing_secret_is_named(case: Case, variable: str) -> None:
    case.monkeypatch.delenv(variable)
    assert f"the environment variable {variable}, which is not set" in case.refused(2, "check")


@pytest.mark.parametrize(
    ("before", "after", "where"),
    [
        ('entity_a = "from_user"', 'entity_a = "from_usr"', "columns.entity_a"),
        ("[table.columns]", 'drop = ["from_usr"]\n[table.columns]', "drop"),
    ],
)
def test_a_misspelt_column_is_found_before_spark_starts(case: Case, before: str, after: str, where: str) -> None:
    case.change(before, after)
    said = case.refused(2, "check")
    assert f"table public.follows: {where}: there is no column from_usr in public.follows: did you mean from_user?" in said


def test_an_unknown_target_or_option_is_a_usage_error(prepared: Case) -> None:
    said = prepared.refused(2, "backfill", "--target", "stoer")
    assert "no target is named stoer: the targets are store" in said
    assert prepared.run("verify", "--tagret", "store").exit_code == 2


def test_a_misspelt_column_inside_an_expression_is_one_sentence(
    case: Case, spark: SparkSession, capfd: pytest.CaptureFixture[str]
) -> None:
    case.change('entity_a = "from_user"', 'entity_a = "from_user"\nother = "upper(noet)"')
    said = case.refused(2, "prepare")
    assert "table public.follows: columns.other: 'upper(noet)' is not a valid expression" in said
    assert "`note`" in said
    assert capfd.readouterr().err == ""
    assert leftovers(case.spec) == []


def test_no_spec_at_all(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["check", str(tmp_path / "none.toml")])
    assert done.exit_code == 2
    assert "can't be read (No such file or directory): `changeover init` writes one" in sentence(done.stderr)


# -- steps out of order, and the same step twice


@pytest.mark.parametrize("command", ["capture", "backfill", "replay", "verify", "status", "history", "finalize", "flags show"])
def test_a_step_before_prepare_says_what_it_needs(case: Case, command: str, java_starts: Path) -> None:
    case.change("[work]", '[flag]\nkey = "k"\ntarget = "store"\n[work]')
    said = case.refused(2, command)
    assert "needs prepare first: run `changeover prepare SPEC`" in said
    assert not java_starts.exists(), "Spark's seconds are not spent on it"


def test_a_row_is_not_explained_before_prepare(case: Case) -> None:
    assert "explain needs prepare first" in case.refused(2, "explain", "1", "follows", "2")


def test_a_key_of_another_length_is_a_usage_error(prepared: Case) -> None:
    assert "no table has a key of 1 columns" in prepared.refused(2, "explain", "1")


def test_finalize_before_the_tables_are_loaded_is_refused(prepared: Case) -> None:
    assert "not loaded yet: public.follows in store" in prepared.refused(1, "finalize")


def test_a_second_capture_is_told_of_the_first(prepared: Case) -> None:
    prepared.monkeypatch.setattr(capture_module, "LEASE_SECONDS", 0.1)
    with Ledger.open(prepared.spec, "test") as ledger, ledger.lease("capture"):
        assert "another capture of this migration is running" in prepared.refused(3, "capture")


# -- ctrl-c


def test_ctrl_c_in_capture_loses_nothing_and_the_same_command_goes_on(prepared: Case) -> None:
    spool = Spool(prepared.work / "spool")
    for number in (1, 2):
        prepared.old.execute("INSERT INTO follows VALUES (1, %s)", [number])
        child = start("capture", str(prepared.path))
        wait_for(lambda number=number: len(spool.events()) >= number)
        output, errors = stop(child, signal.SIGINT)
        assert child.returncode == 130, errors
        assert "interrupted: nothing is lost, the same command goes on from here" in output
        assert "Traceback" not in errors
    assert [row["row"]["to_channel"] for row in events(prepared)] == ["1", "2"]


def test_ctrl_c_anywhere_else_is_one_sentence(case: Case) -> None:
    def interrupted(spec: Spec) -> None:
        raise KeyboardInterrupt

    case.monkeypatch.setattr("changeover.jobs.preflight.division.preflight", interrupted)
    assert "interrupted in check: nothing is lost, the same command goes on from here" in case.refused(130, "check")


def test_an_unforeseen_error_is_one_sentence_and_its_log_has_the_rest(prepared: Case) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise ValueError("first line\nsecond line")

    prepared.monkeypatch.setattr("changeover.jobs.capture.service.capture", broken)
    said = prepared.refused(3, "capture")
    log = said.partition("unexpected ValueError: first line; ")[2].removesuffix(" has the details")
    assert "second line" in Path(log).read_text()


# -- no JVM


COUNTED = """#!/bin/sh
echo "$@" >> "{seen}"
[ "$1" = -version ] && {{ echo 'openjdk version "21.0.1" 2025-01-01' >&2; exit 0; }}
exit 1
"""


@pytest.fixture
def java_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a Java in front of all others that tells of each start in the file that is returned."""
    seen, program = tmp_path / "java-starts", tmp_path / "java" / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(COUNTED.format(seen=seen))
    program.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "java"))
    return seen


JVM_FREE = [
    ("--help",), ("check", "SPEC"), ("plan", "SPEC"), ("status", "SPEC"), ("history", "SPEC"),
    ("explain", "SPEC", "1", "follows", "2"), ("init", "env:OLD_DSN", "public.follows"), ("abort", "SPEC"),
]  # fmt: skip


def test_commands_that_need_no_spark_start_no_jvm(prepared: Case, java_starts: Path) -> None:
    for arguments in JVM_FREE:
        child = start(*(str(prepared.path) if word == "SPEC" else word for word in arguments))
        output, errors = child.communicate(timeout=120)
        assert child.returncode == 0, (arguments, output, errors)
    assert not java_starts.exists()


def test_the_counting_java_would_have_told(case: Case, java_starts: Path) -> None:
    child = start("prepare", str(case.path))
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 3
    assert "-version" in java_starts.read_text()
    assert len(java_starts.read_text().splitlines()) > 1, "Spark's launcher was not asked"
    assert "Traceback" not in errors


def test_run_without_java_says_how_to_get_it_and_leaves_nothing(case: Case, tmp_path: Path) -> None:
    case.monkeypatch.setenv("PATH", "")
    case.monkeypatch.setenv("JAVA_HOME", "")
    case.monkeypatch.setattr(java.find, "__defaults__", (None, tmp_path / "no-jvm"))
    done = case.run("run")
    assert done.exit_code == 3
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("changeover: Spark needs Java 17 or later and none was found")
    assert java.install_command() in last
    assert leftovers(case.spec) == []


# -- init


def test_init_writes_a_spec_that_check_accepts(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "drafted.toml"
    done = case.invoke("init", "env:OLD_DSN", "public.follows", "--output", str(path))
    assert (done.exit_code, done.stdout) == (0, "")
    spec = load(path)
    assert (spec.name, spec.tables[0].source, spec.tables[0].key) == ("follows", "public.follows", ("from_user", "to_channel"))
    assert case.invoke("check", str(path)).exit_code == 0
    again = case.invoke("init", "env:OLD_DSN", "follows", "--output", str(path))
    assert again.exit_code == 2
    assert "is there already" in sentence(again.stderr)


def test_every_line_of_a_draft_holds_once_its_comment_is_taken_off(case: Case, tmp_path: Path) -> None:
    case.old.execute('CREATE TABLE "9 Zoë\'s ""rows""" ("a key" int PRIMARY KEY, "Größe" text, plain text)')
    done = case.invoke("init", "env:OLD_DSN", '9 Zoë\'s "rows"')
    assert done.exit_code == 0
    path = tmp_path / "drafted.toml"
    path.write_text(done.stdout.replace("\n# ", "\n"))
    table = load(path).tables[0]
    assert dict(table.columns) == {"a key": "`a key`", "Größe": "`Größe`", "plain": "plain"}
    assert table.source == 'public.9 Zoë\'s "rows"'


@pytest.mark.parametrize(
    ("dsn", "table", "code", "problem"),
    [
        ("env:OLD_DSN", "public.nowhere", 1, "there is no table public.nowhere"),
        ("env:OLD_DSN", "keyless", 1, "has no primary key and no replica identity with a key"),
        ("env:NOT_SET", "follows", 2, "the environment variable NOT_SET, which is not set"),
        ("postgresql://u:s3cret@127.0.0.1/d", "follows", 2, "put the DSN into an environment variable"),
    ],
)
def test_init_with_bad_input(case: Case, dsn: str, table: str, code: int, problem: str) -> None:
    case.old.execute("CREATE TABLE keyless (a int)")
    done = case.invoke("init", dsn, table)
    assert (done.exit_code, done.stdout) == (code, "")
    assert problem in sentence(done.stderr)
    assert "s3cret" not in done.output


def test_init_into_a_folder_that_is_not_there(case: Case, tmp_path: Path) -> None:
    done = case.invoke("init", "env:OLD_DSN", "follows", "--output", str(tmp_path / "no" / "spec.toml"))
    assert done.exit_code == 2
    assert "can't be written (No such file or directory)" in sentence(done.stderr)


# -- machine output


KEYS = {
    "check": {"safe", "reasons", "grants"},
    "plan": {"steps"},
    "status": {"name", "steps", "loads", "stream", "stage", "routers", "store", "epoch", "verdicts"},
    "history": {"runs"},
    "abort": {"removed", "left"},
}


def test_json_is_one_object_and_nothing_else(prepared: Case) -> None:
    for command, keys in KEYS.items():
        done = prepared.run(command, "--json")
        assert done.exit_code == 0, done.output
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1
        assert keys <= json.loads(done.stdout).keys(), command
    assert json.loads(done.stdout)["left"] == []
    assert leftovers(prepared.spec) == []


def test_abort_before_prepare_finds_nothing(case: Case) -> None:
    done = case.run("abort", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, {"removed": [], "left": [], "kept": []})


def test_a_failure_leaves_standard_output_empty(case: Case) -> None:
    done = case.run("status", "--json")
    assert (done.exit_code, done.stdout) == (2, "")


# -- processes


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the command line as a process of its own."""
    command = [sys.executable, "-m", "changeover.cli.main", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stop(child: subprocess.Popen[str], number: int) -> tuple[str, str]:
    """Send a signal and return what the process said."""
    child.send_signal(number)
    return child.communicate(timeout=120)


def wait_for(condition: Any) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + WITHIN
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.05)


def events(case: Case) -> list[dict[str, Any]]:
    """Return what stands in the spool."""
    found: list[dict[str, Any]] = Spool(case.work / "spool").events().to_pylist(maps_as_pydicts="strict")
    return found
