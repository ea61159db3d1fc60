"""The embedded server on both releases: settings, restart, a killed parent, closed folders, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from changeover.embedded import binaries
from changeover.embedded import server as embedded
from changeover.embedded.cluster import first_error
from changeover.embedded.server import EmbeddedServer
from changeover.errors import EmbeddedServerFailed, ServerUnavailable
from changeover.session import connect
from tests.support.fix_postgres import SETTINGS, binaries_by_major, default_binaries


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a folder's name that the server's user can reach; pytest's own folders are closed to other users."""
    parent = Path(tempfile.mkdtemp(prefix="changeover-embedded-"))
    parent.chmod(0o755)
    yield parent / "server"
    if (parent / "server" / embedded.STATE_FILE).exists():
        EmbeddedServer.attach(parent / "server").remove()
    subprocess.run(["rm", "-rf", str(parent)], check=True)


def value(dsn: str, query: str) -> object:
    """Return the one value of a query."""
    with connect(dsn, "changeover:tests:embedded") as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def test_every_server_decodes_logically_on_loopback_with_a_password(any_server: EmbeddedServer) -> None:
    dsn = any_server.dsn()
    expected = {"wal_level": "logical", "listen_addresses": "127.0.0.1", "max_replication_slots": "20", "fsync": "off"}
    assert {name: value(dsn, f"SHOW {name}") for name in expected} == expected
    assert value(dsn, "SELECT usesuper FROM pg_user WHERE usename = current_user") is True
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(dsn, password="wrong")


def test_a_server_runs_a_decoding_slot(any_dsn: str) -> None:
    assert value(any_dsn, "SELECT slot_name FROM pg_create_logical_replication_slot('left_behind', 'pgoutput')")


def test_databases_of_tests_are_gone_with_their_slots(any_server: EmbeddedServer) -> None:
    assert value(any_server.dsn(), "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'left_behind'") == 0


def test_a_database_may_have_any_name(server: EmbeddedServer) -> None:
    name = 'it\'s "quoted" \\ ünïcode'
    dsn = server.create_database(name)
    try:
        assert value(dsn, "SELECT current_database()") == name
    finally:
        with connect(server.dsn(), "changeover:tests:embedded") as admin:
            admin.execute(psycopg.sql.SQL("DROP DATABASE {}").format(psycopg.sql.Identifier(name)))


@pytest.mark.heavy
def test_the_whole_life(place: Path) -> None:
    with EmbeddedServer.start(place, settings=SETTINGS, bin_dir=default_binaries()) as server:
        dsn, pid = server.create_database("kept"), server.pid
        with connect(dsn, "changeover:tests:embedded") as held:
            held.execute("CREATE TABLE t AS SELECT 1 AS x")
            server.restart(immediate=True)
            with pytest.raises(psycopg.OperationalError):
                held.execute("SELECT 1")
        assert server.pid != pid
        assert value(dsn, "SELECT x FROM t") == 1
        assert "automatic recovery" in server.log.read_text()
    assert not server.running
    server.stop()
    again = EmbeddedServer.start(place, settings=SETTINGS)
    assert value(again.dsn("kept"), "SELECT x FROM t") == 1
    again.remove()
    assert not place.exists()


@pytest.mark.heavy
def test_secrets_are_closed_and_no_process_shows_them(place: Path) -> None:
    with EmbeddedServer.start(place, settings=SETTINGS, bin_dir=default_binaries()) as server:
        state = place / embedded.STATE_FILE
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        assert stat.S_IMODE(place.stat().st_mode) & 0o007 == 0
        kept = json.loads(state.read_text())
        assert (kept["port"], kept["pid"]) == (server.port, server.pid)
        assert not (place / "password").exists()
        assert kept["password"] not in Path(f"/proc/{server.pid}/cmdline").read_text()
        assert kept["password"] not in server.log.read_text()


@pytest.mark.heavy
def test_a_server_outlives_its_killed_parent_and_is_found_again(place: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from changeover.embedded.server import EmbeddedServer\n"
        "server = EmbeddedServer.start(Path(sys.argv[1]), settings={'fsync': 'off'}, bin_dir=Path(sys.argv[2]))\n"
        "server.create_database('mine'); print('up', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(place), str(default_binaries())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "up\n"
        parent.send_signal(signal.SIGKILL)
    server = EmbeddedServer.attach(place)
    assert server.running
    assert value(server.dsn("mine"), "SELECT current_database()") == "mine"
    with pytest.raises(EmbeddedServerFailed, match="attach to it, or stop it first"):
        EmbeddedServer.start(place)
    server.stop()
    assert not EmbeddedServer.attach(place).running
    with pytest.raises(ServerUnavailable):
        value(server.dsn(), "SELECT 1")


@pytest.mark.heavy
def test_a_killed_postmaster_is_not_taken_for_a_running_one(place: Path) -> None:
    server = EmbeddedServer.start(place, settings=SETTINGS, bin_dir=default_binaries())
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while server.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not server.running
    server.restart()
    assert value(server.dsn(), "SELECT 1") == 1


@pytest.mark.heavy
def test_the_id_of_another_process_in_the_pid_file_is_left_alone(place: Path) -> None:
    server = EmbeddedServer.start(place, settings=SETTINGS, bin_dir=default_binaries())
    server.stop()
    (server.data / "postmaster.pid").write_text(f"{os.getpid()}\n{server.data}\n")
    assert not server.running
    server.stop()
    (server.data / "postmaster.pid").unlink()


@pytest.mark.heavy
def test_a_start_that_was_killed_early_is_made_anew(place: Path) -> None:
    place.mkdir()
    (place / "data").mkdir()
    (place / "data" / "PG_VERSION").write_text("half")
    (place / "password").write_text("old")
    with EmbeddedServer.start(place, settings=SETTINGS, bin_dir=default_binaries()) as server:
        assert value(server.dsn(), "SELECT 1") == 1


@pytest.mark.heavy
def test_a_taken_port_is_changed_for_another(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        real, asked = embedded._free_port, []

        def first_the_taken_one() -> int:
            asked.append(1)
            return port if len(asked) == 1 else real()

        monkeypatch.setattr(embedded, "_free_port", first_the_taken_one)
        with EmbeddedServer.start(place, settings=SETTINGS, bin_dir=default_binaries()) as server:
            assert server.port != port
            assert value(server.dsn(), "SELECT 1") == 1


@pytest.mark.heavy
def test_a_refused_setting_is_named_with_the_log(place: Path) -> None:
    with pytest.raises(EmbeddedServerFailed, match=r"did not start .*no_such_setting.*server\.log"):
        EmbeddedServer.start(place, settings={"no_such_setting": "1"}, bin_dir=default_binaries())


@pytest.mark.heavy
def test_an_initdb_that_failed_names_its_first_error(place: Path) -> None:
    """The program is real, and its installation damaged; its last line tells of cleaning up, as wherever it fails midway."""
    package = default_binaries().parents[1]
    for folder in (package, package.with_name(f"{package.name}.libs")):
        subprocess.run(["cp", "-a", str(folder), str(place.parent)], check=True)
    installation = place.parent / package.name / "pginstall"
    with next(installation.rglob("postgres.bki")).open("a") as script:
        script.write("nonsense\n")
    with pytest.raises(EmbeddedServerFailed, match=r"initdb failed \(syntax error at line \d+\), see .*programs\.log"):
        EmbeddedServer.start(place, bin_dir=installation / "bin")
    assert (place / "programs.log").read_text().splitlines()[-1].startswith("initdb: removing contents of data directory")


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        (
            'selecting default "max_connections" ... sh: 1: cannot create /dev/null: Permission denied\n20\n'
            'child process exited with exit code 2\ninitdb: removing contents of data directory "/data"\n',
            "sh: 1: cannot create /dev/null: Permission denied",
        ),
        (
            "LOG:  starting PostgreSQL 18.6\n2026-01-01 00:00:00 UTC [7] FATAL:  could not map memory\nHINT:  less\n",
            "could not map memory",
        ),
        ("all is well\nand ended\n", "and ended"),
        ("", "no output"),
    ],
)
def test_the_first_error_of_an_output_is_its_cause(output: str, cause: str) -> None:
    assert first_error(output) == cause


@pytest.mark.heavy
@pytest.mark.parametrize("settings", [{"a b": "1"}, {"work_mem": "1\nport = 1"}])
def test_a_setting_can_not_smuggle_a_line(place: Path, settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="PostgreSQL setting"):
        EmbeddedServer.start(place, settings=settings, bin_dir=default_binaries())


def test_a_folder_with_other_files_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    before = stat.S_IMODE(tmp_path.stat().st_mode)
    with pytest.raises(EmbeddedServerFailed, match="holds other files"):
        EmbeddedServer.start(tmp_path, bin_dir=default_binaries())
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]
    assert stat.S_IMODE(tmp_path.stat().st_mode) == before


def test_attach_to_nothing_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerFailed, match="no server lives there"):
        EmbeddedServer.attach(tmp_path)


def test_binaries_are_found_by_variable_then_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = default_binaries()
    monkeypatch.setenv(binaries.BIN_VARIABLE, str(default))
    assert binaries.find_binaries() == default
    assert binaries.all_binaries()[0] == default.resolve()
    monkeypatch.setenv(binaries.BIN_VARIABLE, str(tmp_path))
    with pytest.raises(EmbeddedServerFailed, match="CHANGEOVER_PG_BIN holds no initdb, pg_ctl, postgres"):
        binaries.find_binaries()
    monkeypatch.delenv(binaries.BIN_VARIABLE)
    linked = tmp_path / "bin"
    linked.mkdir()
    (linked / "pg_ctl").symlink_to(default / "pg_ctl")
    monkeypatch.setenv("PATH", str(linked))
    assert binaries.find_binaries() == default.resolve()


def test_majors_are_told_apart() -> None:
    assert all(binaries.major_version(place) == major for major, place in binaries_by_major().items())


@pytest.mark.heavy
def test_closed_binaries_are_copied_and_their_modes_kept(place: Path) -> None:
    """Only as root does the server's user differ; a copy is then the way to run from a closed folder."""
    closed = place.parent / "closed"
    closed.mkdir(mode=0o700)
    package = default_binaries().parents[1]
    for folder in (package, package.with_name(f"{package.name}.libs")):
        subprocess.run(["cp", "-a", str(folder), str(closed)], check=True)
    closed_bin = closed / package.name / "pginstall" / "bin"
    with EmbeddedServer.start(place, settings=SETTINGS, bin_dir=closed_bin) as server:
        assert value(server.dsn(), "SELECT 1") == 1
        assert (place / "copied").exists() == (os.geteuid() == 0)
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


def test_a_parent_closed_to_the_servers_user_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    if os.geteuid() != 0:
        EmbeddedServer.start(tmp_path / "server", settings=SETTINGS, bin_dir=default_binaries()).remove()
        return
    with pytest.raises(EmbeddedServerFailed, match="can't reach the folder"):
        EmbeddedServer.start(tmp_path / "server", bin_dir=default_binaries())
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700
