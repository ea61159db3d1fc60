"""Prove: with tombstones every race ends equal, without them those that need one do not; nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from changeover.cli.main import main
from changeover.session import connect
from changeover.stores.postgres import gate
from changeover.verifiers.races import RACES

NEED_TOMBSTONES = {"ghost", "write skew", "out of order", "key move"}

SPEC = """
name = "proof"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "public.t"
target = "u"
key = ["id"]
[work]
path = "{work}"
"""

LEFT = "SELECT nspname FROM pg_namespace WHERE nspname ~ 'changeover'"


@pytest.fixture
def spec(old_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    path = tmp_path / "proof.toml"
    path.write_text(SPEC.format(work=tmp_path), encoding="utf-8")
    return path


def assert_nothing_left(*dsns: str) -> None:
    for dsn in dsns:
        with connect(dsn, "test") as connection:
            assert connection.execute(LEFT).fetchall() == []


def test_every_race_ends_equal_and_some_do_not_without_tombstones(spec: Path, old_dsn: str, new_dsn: str) -> None:
    done = CliRunner().invoke(main, ["prove", str(spec), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert told["equal"]
    assert [race["race"] for race in told["races"]] == [race.name for race in RACES]
    assert all(race["with_tombstones"] == [] for race in told["races"])
    assert {race["race"] for race in told["races"] if race["without"]} == NEED_TOMBSTONES
    assert told["races"][0]["without"] == ["extra 1"]
    assert_nothing_left(old_dsn, new_dsn)


def test_one_database_for_both_sides(spec: Path, old_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEW_DSN", old_dsn)
    done = CliRunner().invoke(main, ["prove", str(spec)])
    assert done.exit_code == 0, done.output
    guide = (Path(__file__).parents[3] / "docs" / "guides" / "cutover.md").read_text(encoding="utf-8")
    assert f"```text\n{done.output}```" in guide, "what the guide shows is what it prints"
    assert_nothing_left(old_dsn)


def test_a_gate_that_does_not_hold_is_seen(spec: Path, old_dsn: str, new_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "sweep", lambda connection, table: 0)
    done = CliRunner().invoke(main, ["prove", str(spec)])
    assert done.exit_code == 1, done.output
    assert "1 of 7 races end differently with tombstones" in done.output
    assert_nothing_left(old_dsn, new_dsn)


def test_a_lake_alone_is_refused(spec: Path, tmp_path: Path) -> None:
    text = spec.read_text(encoding="utf-8").replace(
        'kind = "postgres"\ndsn = "env:NEW_DSN"', f'kind = "delta"\npath = "{tmp_path}/lake"\n[ledger]\ndsn = "env:NEW_DSN"'
    )
    spec.write_text(text, encoding="utf-8")
    done = CliRunner().invoke(main, ["prove", str(spec)])
    assert done.exit_code == 2
    assert "no target of the spec is PostgreSQL" in done.output
