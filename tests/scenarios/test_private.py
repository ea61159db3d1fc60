"""Nobody but the owner reads what is kept of rows, sensitive values are shown nowhere, and a purge leaves none of them.

The command line is run as a person would: from another folder, with a spec whose paths are relative, under a generous umask.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from deltalake import DeltaTable

from changeover.jobs.transform.masking import MASK, hashed

SPEC = """
name = "private"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[target.lake]
kind = "delta"
path = "lake"
[[table]]
source = "people"
target = "persons"
key = ["mail"]
sensitive = ["mail", "name"]
[table.columns]
called = "upper(name)"
[flag]
key = "people"
target = "store"
[work]
path = "work"
"""
SECRETS = ("ann@example.com", "Annabel", "ANNABEL", "bob@example.com")


@pytest.fixture
def folder(tmp_path: Path, old_dsn: str, new_dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    (tmp_path / "spec.toml").write_text(SPEC)
    (tmp_path / "elsewhere").mkdir()
    yield tmp_path
    for pid in captures(tmp_path):
        os.kill(pid, signal.SIGTERM)  # SIGINT may be ignored where the tests were started in the background
    while captures(tmp_path):
        pass


def captures(folder: Path) -> list[int]:
    """Return the captures of this spec that run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"changeover.jobs.capture.service" in words and str(folder / "spec.toml").encode() in words:
            found.append(int(path.parent.name))
    return found


def changeover(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command from another folder, under a umask that lets everybody read."""
    command = [sys.executable, "-m", "changeover.cli.main", arguments[0], str(folder / "spec.toml"), *arguments[1:]]
    return subprocess.run(
        command, cwd=folder / "elsewhere", umask=0o022, capture_output=True, text=True, check=False, timeout=900
    )  # fmt: skip


def open_to_others(folder: Path) -> list[str]:
    found = [path for path in folder.rglob("*") if stat.S_IMODE(path.lstat().st_mode) & 0o077]
    return [str(path) for path in [*found, *([folder] if folder.stat().st_mode & 0o077 else [])]]


def everything_said(folder: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in (folder / "work" / "logs").iterdir())


def test_what_is_kept_is_private_and_what_is_sensitive_is_masked(folder: Path, old_dsn: str, new_dsn: str) -> None:
    with psycopg.connect(old_dsn, autocommit=True) as old, psycopg.connect(new_dsn, autocommit=True) as new:
        old.execute("CREATE TABLE people (mail text PRIMARY KEY, name text, age integer)")
        old.execute("INSERT INTO people SELECT 'p' || i || '@example.com', 'N' || i, i FROM generate_series(1, 400) i")
        old.execute("INSERT INTO people VALUES ('ann@example.com', 'Annabel', 30), ('bob@example.com', 'Bob', 40)")
        done = changeover(folder, "run")
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in (folder / "elsewhere").iterdir()) == []
        assert [open_to_others(folder / name) for name in ("work", "lake")] == [[], []]
        assert (folder / "work" / "scratch").is_dir()

        new.execute("UPDATE persons SET age = 31 WHERE mail = 'ann@example.com'")
        new.execute("UPDATE persons SET called = 'X' WHERE mail = 'bob@example.com'")
        report = folder / "report.html"
        told = changeover(folder, "verify", "--target", "store", "--json", "--report", str(report))
        assert told.returncode == 1, told.stderr
        document = json.loads(told.stdout)["verdicts"][0]
        assert document["counts"]["mismatched"] == 2
        keys = {one["key"]["mail"]: one for one in document["sample"]}
        assert set(keys) == {hashed("ann@example.com"), hashed("bob@example.com")}
        assert keys[hashed("bob@example.com")]["target"]["called"] == MASK
        assert keys[hashed("ann@example.com")]["target"]["age"] == "31"
        in_ledger = new.execute("SELECT string_agg(detail::text, '') FROM changeover.verdict").fetchone()
        assert in_ledger is not None
        story = changeover(folder, "explain", "ann@example.com")
        assert story.returncode == 0, story.stderr
        shown = [told.stdout, told.stderr, done.stderr, done.stdout, report.read_text(), in_ledger[0], story.stdout]
        shown.append(everything_said(folder))
        assert [secret for secret in SECRETS for text in shown if secret in text] == []
        kept = DeltaTable(str(folder / "work" / "differences")).to_pyarrow_table().to_pylist()
        assert "bob@example.com" in {dict(row["key"])["mail"] for row in kept}
        assert open_to_others(folder / "work") == []
        assert report.stat().st_mode & 0o077 == 0

        refused = changeover(folder, "purge")
        assert refused.returncode == 1
        assert "the migration goes on and needs its rows" in refused.stderr
        _end(folder, new)
        assert "removed: differences in the work folder" in changeover(folder, "purge").stdout
        assert changeover(folder, "purge").stdout == "no row is kept\n"
        _assert_nothing_kept(folder, new)


def _end(folder: Path, new: Any) -> None:
    """Bring the migration to its end: the new store has authority over everything."""
    for pid in captures(folder):
        os.kill(pid, signal.SIGTERM)  # SIGINT may be ignored where the tests were started in the background
    while captures(folder):
        pass
    new.execute("INSERT INTO changeover.authority (migration, epoch, store, from_lsn) VALUES ('private', 1, 'new', '0/1')")
    ended = changeover(folder, "finalize")
    assert ended.returncode == 0, ended.stderr
    assert "rows are still kept: differences in the work folder" in ended.stdout
    assert "`changeover purge SPEC` removes them" in ended.stdout


def _assert_nothing_kept(folder: Path, new: Any) -> None:
    work = folder / "work"
    assert sorted(path.name for path in work.iterdir() if path.is_dir()) == ["logs"]
    left = new.execute("SELECT (SELECT string_agg(v::text, '') FROM changeover.verdict v), (SELECT string_agg(c::text, '')"
                       " FROM changeover.chunk c)").fetchone()  # fmt: skip
    assert not any("@example.com" in text for text in left)
    lake = DeltaTable(str(folder / "lake" / "persons"))
    on_disk = {path.name for path in (folder / "lake" / "persons").glob("*.parquet")}
    assert on_disk == {path.rsplit("/", 1)[-1] for path in lake.file_uris()}
