"""Status and history: their figures against what is known by other ways, at every step from prepare to finalize."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from ldclient.migrations.types import Stage

from changeover.cli.main import main
from changeover.errors import CouldNotCheck, StepOrder
from changeover.flags.cutover import commands as cutover
from changeover.jobs.finalize import finalize
from changeover.jobs.ledger.ledger import Ledger
from changeover.position import format_lsn, parse_lsn
from changeover.verifiers import verification as verifying
from changeover.verifiers.verification import verify
from tests.support.fix_accounts import ACCOUNTS, ROWS, SPEC, following, switch
from tests.support.fix_migration import CHUNKS, LAKE, STORE, MakeMigration, Migration


def run(command: str, migration: Migration, *more: str) -> str:
    done = CliRunner().invoke(main, [command, migration.spec.path, *more])
    assert done.exit_code == 0, done.output
    return done.stdout


def status(migration: Migration) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("status", migration, "--json"))
    return found


def states(told: dict[str, Any]) -> dict[str, str]:
    return {step["step"]: step["state"] for step in told["steps"]}


def loads(told: dict[str, Any], *names: str) -> dict[str, list[Any]]:
    return {load["target"]: [load[name] for name in names] for load in told["loads"]}


def position(migration: Migration) -> int:
    row = migration.old.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    return parse_lsn(row[0])


@pytest.fixture
def accounts(make_migration: MakeMigration) -> Migration:
    """Return a migration of accounts into both targets, prepared."""
    made = make_migration(SPEC, ACCOUNTS, targets=(STORE, LAKE))
    made.old.execute("INSERT INTO accounts SELECT i, i * 1.5, 'n' || i FROM generate_series(1, %s) i", [ROWS])
    made.prepare()
    return made


def test_each_target_has_its_own_chunks_rows_and_position(accounts: Migration) -> None:
    prepared = status(accounts)
    assert states(prepared) == {
        "prepare": "done", "capture": "not running", "backfill": "0 of 0 chunks",
        "replay": states(prepared)["replay"], "verify": "never", "finalize": "not yet",
    }  # fmt: skip
    with Ledger.open(accounts.spec, "test") as ledger:
        l0 = ledger.stream("test").l0
    assert prepared["stream"]["spool_end"] == format_lsn(l0), "nothing was spooled, and nothing before it is to be"
    accounts.backfill(STORE)
    half = status(accounts)
    assert loads(half, "state", "chunks", "chunks_loaded", "rows") == {
        STORE: ["closed", CHUNKS, CHUNKS, ROWS], LAKE: ["pending", 0, 0, 0],
    }  # fmt: skip
    assert states(half)["backfill"] == f"{CHUNKS} of {CHUNKS} chunks"
    accounts.backfill(LAKE)
    accounts.old.execute("UPDATE accounts SET note = 'x' WHERE id <= 7")
    accounts.catch_up(STORE)
    told = status(accounts)
    assert states(told)["backfill"] == "done"
    assert loads(told, "rows", "events") == {STORE: [ROWS, 7], LAKE: [ROWS, 0]}
    applied = {target: parse_lsn(found[0]) for target, found in loads(told, "applied").items()}
    behind = {target: found[0] for target, found in loads(told, "behind_bytes").items()}
    source = parse_lsn(told["stream"]["source_lsn"])
    assert applied[LAKE] == l0 < applied[STORE] == parse_lsn(told["stream"]["spool_end"])
    assert behind == {target: source - lsn for target, lsn in applied.items()}
    assert told["stream"]["behind_bytes"] == behind[STORE] < behind[LAKE]
    assert source <= position(accounts)
    text = run("status", accounts)
    assert f"public.accounts in lake: closed, 3 of 3 chunks, {ROWS} rows, 0 refused by a tombstone, 0 swept" in text
    assert f"public.accounts in store: 7 events, up to {format_lsn(applied[STORE])}" in text


def test_the_stream_is_told_as_the_server_has_it(accounts: Migration) -> None:
    accounts.old.execute("UPDATE accounts SET note = repeat('x', 5000)")
    before = kept(accounts)
    told = status(accounts)["stream"]
    assert before <= told["kept_wal_bytes"] <= kept(accounts)
    assert told["behind_bytes"] > ROWS * 100, "what compresses well is still some"
    with following(accounts):
        accounts.backfill()
        assert states(status(accounts))["capture"] == "running"
    accounts.old.execute("SELECT pg_drop_replication_slot(%s)", [accounts.spec.slot])
    gone = status(accounts)
    assert (states(gone)["capture"], gone["stream"]["kept_wal_bytes"]) == ("the slot is missing", None)
    assert "capture   the slot is missing" in run("status", accounts)


def kept(migration: Migration) -> int:
    row = migration.old.execute(
        "SELECT (pg_current_wal_insert_lsn() - restart_lsn)::bigint FROM pg_replication_slots WHERE slot_name = %s",
        [migration.spec.slot],
    ).fetchone()
    assert row is not None
    return int(row[0])


def test_a_stopped_table_the_stage_and_the_end_are_told(accounts: Migration) -> None:
    accounts.backfill()
    switch(accounts, Stage.SHADOW)
    with Ledger.open(accounts.spec, "test") as ledger:
        ledger.beat("web-1", "shadow", 0, {})
        ledger.beat("web-2", "shadow", 0, {})
        ledger.beat("web-3", "dualwrite", 0, {})
        # alive however long the fence takes, and long dead
        ledger.connection.execute(
            "UPDATE changeover.heartbeat SET at = now() + CASE process WHEN 'web-3' THEN -1 ELSE 1 END * interval '10 minutes'"
        )
    with following(accounts):
        cutover.advance(accounts.spec, override="test")
    told = status(accounts)
    assert (told["stage"], told["store"], told["epoch"], told["routers"]) == ("live", "new", 1, {"shadow": 2})
    assert set(loads(told, "behind_bytes")) == {STORE, LAKE}
    assert states(told)["replay"] == "at rest"
    assert "flag      live; the new store has authority (epoch 1)\n    routers: 2 at shadow" in run("status", accounts)
    with Ledger.open(accounts.spec, "test") as ledger:
        ledger.stop("it was truncated", "public.accounts")
    assert loads(status(accounts), "stopped") == {STORE: ["it was truncated"], LAKE: ["it was truncated"]}
    assert "0 swept; stopped: it was truncated" in run("status", accounts)
    finalize(accounts.spec)
    ended = status(accounts)
    assert (states(ended)["finalize"], states(ended)["capture"], states(ended)["replay"]) == ("done", "ended", "at rest")
    assert (ended["stream"]["slot"], ended["stream"]["spool_end"]) == ("missing", None)
    assert "finalize  done (20" in run("status", accounts)


def recorded(migration: Migration) -> list[dict[str, Any]]:
    """Return the runs on record, oldest first."""
    runs: list[dict[str, Any]] = json.loads(run("history", migration, "--json"))["runs"]
    return runs[::-1]


def outcomes(runs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(one["step"], one["outcome"]) for one in runs]


def test_history_has_every_run_with_what_came_of_it(accounts: Migration) -> None:
    accounts.backfill()
    accounts.old.execute("UPDATE accounts SET note = 'x' WHERE id <= 7")
    accounts.catch_up(STORE)
    with following(accounts):
        assert verify(accounts.spec, accounts.spark, targets=[STORE])[0].equal
        accounts.new.execute("UPDATE ledgers SET note = 'damaged' WHERE id = 100")
        assert not verify(accounts.spec, accounts.spark, targets=[STORE])[0].equal
    runs = recorded(accounts)
    assert outcomes(runs)[:7] == [
        ("prepare", "creating"), ("prepare", "creating"), ("prepare", "done"), ("backfill", "done"), ("capture", "started"),
        ("capture", "done"), ("replay", "done"),
    ]  # fmt: skip
    captured, replayed = runs[5], runs[6]
    assert (captured["events"], captured["transactions"], captured["pid"]) == (8, 2, os.getpid())
    assert (replayed["target"], replayed["events"]) == (STORE, 7)
    verified = [(one["outcome"], one["verdicts"]) for one in runs if one["step"] == "verify"]
    verdict = {"source": "public.accounts", "target": STORE, "rows": ROWS}
    assert verified == [("equal", [{**verdict, "verdict": "equal"}]), ("different", [{**verdict, "verdict": "different"}])]
    text = run("history", accounts).splitlines()
    assert any(
        line.endswith("verify    different: verdicts (rows 200, source public.accounts, target store, verdict different)")
        for line in text
    )
    assert any("replay    done: taken 7, events 7, target store, applied 0/" in line for line in text)


def test_history_has_runs_that_failed_and_why(accounts: Migration, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StepOrder):
        verify(accounts.spec, accounts.spark)
    accounts.backfill()

    def unanswered(*arguments: object, **options: object) -> None:
        raise CouldNotCheck("public.accounts", "a key range that nobody compared")

    def broken(*arguments: object, **options: object) -> None:
        raise psycopg.OperationalError("Key (id)=(7) holds somebody's value")

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with following(accounts):
        for ends in (unanswered, broken, interrupted):
            monkeypatch.setattr(verifying, "compare", ends)
            with pytest.raises((CouldNotCheck, psycopg.OperationalError, KeyboardInterrupt)):
                verify(accounts.spec, accounts.spark, targets=[STORE])
    runs = [(one["outcome"], one["error"]) for one in recorded(accounts) if one["step"] == "verify"]
    assert runs == [
        ("failed", str(StepOrder("verify", "backfill"))),
        ("failed", "could not check public.accounts: a key range that nobody compared"),
        ("failed", "OperationalError"),
        ("interrupted", "KeyboardInterrupt"),
    ]


def probe(migration: Migration) -> tuple[int, list[str]]:
    """Return what a probe gets: the exit code and the lines, which are in the JSON too."""
    done = CliRunner().invoke(main, ["status", "--check", migration.spec.path])
    told = json.loads(CliRunner().invoke(main, ["status", "--json", migration.spec.path]).stdout)
    lines = done.stdout.splitlines()
    assert (told["healthy"], [f"attention {one}" for one in told["problems"]] or ["healthy"]) == (not done.exit_code, lines)
    return done.exit_code, lines


def test_a_probe_gets_a_line_for_each_reason(accounts: Migration) -> None:
    assert probe(accounts) == (1, ["attention capture: not running"])
    with following(accounts):
        accounts.backfill()
        accounts.replay()
        verify(accounts.spec, accounts.spark)
        assert probe(accounts) == (0, ["healthy"])
        accounts.old.execute("UPDATE accounts SET note = 'behind'")
        behind = CliRunner().invoke(main, ["status", "--check", "--max-behind", "0", accounts.spec.path])
        assert (behind.exit_code, [line.split(" is ")[0] for line in behind.stdout.splitlines()][-2:]) == (
            1, ["attention public.accounts in lake", "attention public.accounts in store"],
        )  # fmt: skip
    # a replay that runs would end at the stopped table
    with Ledger.open(accounts.spec, "test") as ledger:
        ledger.stop("it was truncated", "public.accounts")
        run = ledger.record_verdict("public.accounts", STORE, "different", None, {})
    assert probe(accounts) == (
        1,
        ["attention capture: not running", "attention public.accounts is stopped: it was truncated",
         f"attention the last verdict on public.accounts in store is different (run {run})"],
    )  # fmt: skip
    accounts.old.execute("SELECT pg_drop_replication_slot(%s)", [accounts.spec.slot])
    code, lines = probe(accounts)
    assert (code, "attention capture: the slot is missing" in lines) == (1, True)
