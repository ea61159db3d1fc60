"""The flag's commands on a live migration: turned by us, turned by somebody else, and taken back, with what that loses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ldclient.migrations.types import Origin, Stage

from changeover.cli.main import main
from changeover.errors import Refused, SpecError
from changeover.flags import flagfile, history
from changeover.flags.cutover import commands as cutover
from changeover.flags.fence.fence import fence
from changeover.flags.readiness import COMPARISONS
from changeover.flags.router.router import Router, returned
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import Authority
from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.spool.table import spool_of
from changeover.verifiers.verification import verify
from tests.support.fix_accounts import FLAG, MAX_PAUSE, MIRRORED, add, application, following, loaded, routed, rows, switch
from tests.support.fix_flags import PATIENCE, wrote
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration, lake_rows
from tests.support.fix_migration import rows as comparable


def run(command: str, migration: Migration, *more: str) -> Result:
    """Run a command of the flag on the migration's spec."""
    done = CliRunner().invoke(main, ["flags", command, migration.spec.path, *more])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    return done


def authority(migration: Migration) -> Authority:
    with Ledger.open(migration.spec, "test") as ledger:
        return ledger.authority()


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no sign of {what}"
        time.sleep(0.05)


@contextmanager
def watching(migration: Migration) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Run `changeover flags watch` as a process; yields it and the lines that it says."""
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "changeover.cli.main", "flags", "watch", migration.spec.path],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said: list[str] = []
    out = child.stdout
    assert out is not None
    reader = threading.Thread(target=lambda: said.extend(line.rstrip() for line in out))
    reader.start()
    try:
        yield child, said
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        reader.join()
        out.close()
        if child.stderr is not None:
            child.stderr.close()


def test_somebody_elses_switch_waits_for_readiness_and_then_for_the_fence(moved: Migration) -> None:
    def heard(words: str) -> bool:
        return any(words in line for line in said)

    hushed = threading.Event()
    with following(moved):
        with application(moved, hushed=hushed) as router, watching(moved) as (child, said):
            wait_for(lambda: heard("switched from off to shadow"), "the stage on record")
            switch(moved, Stage.LIVE)
            wait_for(lambda: heard("not ready for live"), "a refusal")
            assert heard("public.accounts was never verified in store")
            assert (authority(moved).epoch, router.stage) == (0, Stage.SHADOW)
            wait_for(lambda: router.counters()["comparisons"]["at_stage"]["compared"] >= COMPARISONS, "compared reads")
            hushed.set()
            assert [verdict.word for verdict in verify(moved.spec, moved.spark)] == ["equal"]
            hushed.clear()
            wait_for(lambda: heard("from shadow to live: the new store has authority (epoch 1)"), "the fence")
            wait_for(lambda: router.stage is Stage.LIVE, "the router at live")
            written = add(router, 7)
            assert (written.origin, written.epoch) == (Origin.NEW, 1)
            child.send_signal(signal.SIGTERM)
            assert child.wait(120) == 130
            assert child.stderr is not None
            assert (
                child.stderr.read()
                == "changeover: interrupted in flags watch: nothing is lost, the same command goes on from here\n"
            )
        wait_for(lambda: rows(moved.old, "accounts") == rows(moved.new, "ledgers"), "the last writes in the old store")
    assert authority(moved).store == "new"
    with Ledger.open(moved.spec, "test") as ledger:
        recorded = [(outcome, detail["from"], detail["to"]) for _, _, outcome, detail in ledger.audits("flags")]
    assert recorded[0] == ("followed", "shadow", "live")
    assert recorded[-1] == ("followed", "off", "shadow")
    assert ("refused", "shadow", "live") in recorded
    assert len(said) < 20, "the same refusal with other figures is said once"


def test_watch_needs_prepare_and_goes_on_after_a_broken_flag_file(moved: Migration) -> None:
    with watching(moved) as (child, said):
        wait_for(lambda: len(said) >= 2, "the stage on record")
        file = moved.spec.work / "flags.json"
        whole = file.read_text()
        file.write_text("{ half a fi")
        wait_for(lambda: any("not valid JSON" in line for line in said), "the broken file")
        file.write_text(whole)
        switch(moved, Stage.DUALWRITE)
        wait_for(lambda: any("from shadow to dualwrite" in line for line in said), "the turn")
        child.send_signal(signal.SIGINT)
        assert child.wait(120) == 130
    moved.abort()
    refused = run("watch", moved)
    assert refused.exit_code == 2
    assert "flags watch needs prepare first" in refused.stderr


def test_a_stage_that_is_skipped_over_the_fence_is_refused(moved: Migration) -> None:
    switch(moved, Stage.COMPLETE)
    with watching(moved) as (_, said):
        wait_for(lambda: any("shadow to complete is not one step up" in line for line in said), "the refusal")
    assert authority(moved).store == "old"


def test_a_rollback_below_the_fence_loses_nothing(mirrored: Migration) -> None:
    moved = mirrored
    switch(moved, Stage.DUALWRITE)
    with routed(moved) as router:
        wait_for(lambda: router.stage is Stage.DUALWRITE, "dualwrite")
        assert add(router, 1).mirrored
        done = run("rollback", moved)
        assert (done.exit_code, done.stdout) == (0, "dualwrite → off (epoch 0); nothing lost\n")
        wait_for(lambda: router.stage is Stage.OFF, "off")
        assert not add(router, 1).mirrored
    refused = run("rollback", moved)
    assert refused.exit_code == 1
    assert refused.stderr == "changeover: flags rollback: off is the first stage, there is none below\n"


def test_a_rollback_over_the_fence_prints_what_it_lost_and_writers_go_on(mirrored: Migration) -> None:
    moved = mirrored
    moved.old.execute("ALTER TABLE accounts ADD CONSTRAINT short CHECK (length(note) < 20)")
    moved.old.execute("INSERT INTO accounts VALUES (1000, 0, 'of nobody else')")
    with following(moved), application(moved) as router:
        assert run("advance", moved, "--override", "test").exit_code == 0
        wait_for(lambda: router.stage is Stage.LIVE, "live")
        add(router, 1000, "a note that the old store refuses")
        wait_for(lambda: router.counters()["mirror_old"]["lost"] == {"1": 1}, "the failed write")
        wait_for(
            lambda: "back: shadow: 1 write that never reached the old store would be lost" in run("show", moved).stdout,
            "what the old store refuses from the stream as well",
        )
        shown = run("show", moved)
        assert "reverse path: the router's mirror alone keeps the old store up to date: public.accounts: " in shown.stdout
        done = run("rollback", moved, "--json")
        told = json.loads(done.stdout)
        assert {**told, "pause_seconds": None} == {
            "from": "live", "to": "shadow", "epoch": 2, "pause_seconds": None, "lost": 1, "lacking": told["lacking"],
        }  # fmt: skip
        assert 0 < told["pause_seconds"] < MAX_PAUSE
        assert told["lacking"].startswith("public.accounts: ")
        wait_for(lambda: router.stage is Stage.SHADOW, "shadow")
        written = add(router, 3)
        assert (written.origin, written.epoch) == (Origin.OLD, 2)
        assert "back: dualwrite: nothing would be lost" in run("show", moved).stdout
    lost = [row for row in rows(moved.new, "ledgers") if row not in rows(moved.old, "accounts")]
    assert [row[0] for row in lost] == [1000]


def test_a_flag_with_fewer_stages_is_walked_by_its_own_and_keeps_its_variations(moved: Migration) -> None:
    file = moved.spec.work / "flags.json"
    four = ["live", "off", "complete", "shadow"]  # whose order is the customer's
    flag = flagfile.read_flag(file, FLAG)
    flagfile.write_flag(file, FLAG, {**flag, "variations": four, "fallthrough": {"variation": 1}, "offVariation": 1})
    with following(moved):
        steps = [cutover.advance(moved.spec, override="test") for _ in range(2)]
        steps.append(cutover.rollback(moved.spec))
        steps += [cutover.advance(moved.spec, override="test") for _ in range(2)]
    assert [(step.before.value, step.after.value) for step in steps] == [
        ("off", "shadow"), ("shadow", "live"), ("live", "shadow"), ("shadow", "live"), ("live", "complete"),
    ]  # fmt: skip
    assert flagfile.read_flag(file, FLAG)["variations"] == four
    assert flagfile.read_stage(file, FLAG) is Stage.COMPLETE
    with pytest.raises(SpecError, match="has no variation rampdown: it has live, off, complete, shadow"):
        flagfile.write_stage(file, FLAG, Stage.RAMPDOWN)


def test_complete_is_final_wherever_the_flag_points(moved: Migration) -> None:
    with following(moved):
        for stage in (Stage.LIVE, Stage.RAMPDOWN, Stage.COMPLETE):
            assert cutover.advance(moved.spec, override="test").after is stage
    sentence = "changeover: flags rollback: complete was reached and is final: the old store lacks every write since\n"
    refused = run("rollback", moved)
    assert (refused.exit_code, refused.stderr) == (1, sentence)
    switch(moved, Stage.RAMPDOWN)
    refused = run("rollback", moved)
    assert (refused.exit_code, refused.stderr) == (1, sentence)
    assert json.loads(run("show", moved, "--json").stdout)["back"] is None
    switch(moved, Stage.SHADOW)
    with pytest.raises(Refused, match="complete was reached"):
        cutover._follow(moved.spec)
    assert authority(moved).store == "new"


def test_the_gate_to_shadow_waits_for_what_was_not_mirrored(moved: Migration) -> None:
    def reasons() -> str:
        return " ".join(cutover.show(moved.spec).reasons)

    switch(moved, Stage.OFF)
    with routed(moved) as router:
        wait_for(lambda: router.stage is Stage.OFF, "off")
        add(router, 5, "the old store alone")
        switch(moved, Stage.DUALWRITE)
        assert "where dualwrite began is not on record" in reasons()
        switch(moved, Stage.OFF)
        wait_for(lambda: router.stage is Stage.OFF, "off")
        cutover.advance(moved.spec, override="test")
        assert router.stage is Stage.DUALWRITE, "advance waits until every router is there"
        with Ledger.open(moved.spec, "test") as ledger:
            began = history.mirrored_since(history.switches(ledger))
        assert began is not None
        assert "and dualwrite began at" in reasons()
        moved.catch_up()
        assert "dualwrite began" not in reasons()
        with Ledger.open(moved.spec, "test") as ledger:
            assert all(load.applied >= began for load in ledger.loads())
        arrived = moved.new.execute("SELECT note FROM ledgers WHERE id = 5").fetchall()
        assert arrived == [("the old store alone",)]


def lake(migration: Migration) -> list[str]:
    return lake_rows(migration.lake("ledgers").select("id", "balance", "note"))


def old(migration: Migration) -> list[str]:
    return comparable(rows(migration.old, "accounts"))


def settle(migration: Migration) -> None:
    """Wait until replay has passed everything that the old store holds."""
    with Ledger.open(migration.spec, "test") as ledger:
        row = migration.old.execute("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint").fetchone()
        assert row is not None
        emit_marker(migration.old, "settle")
        wait_for(lambda: min(load.applied for load in ledger.loads()) >= row[0], "replay")


def test_without_a_reverse_path_the_lake_learns_by_the_echo_what_was_written_while_the_new_store_had_authority(
    make_migration: MakeMigration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reverse_setup, "obstacles", lambda *stores: ["the new store can't tell"])
    made = loaded(make_migration, STORE, LAKE, spec=MIRRORED)
    with following(made):
        with routed(made) as router:
            add(router, 1, "before the fence")
            settle(made)
            at_the_fence = old(made)
            fence(made.spec, Origin.NEW)
            switch(made, Stage.LIVE)
            wait_for(lambda: router.stage is Stage.LIVE, "live")
            write_at_live(router)
            assert router.drain(PATIENCE)
            assert router.counters()["mirror_old"]["applied"] == 4
            assert old(made) == comparable(rows(made.new, "ledgers")) != at_the_fence
            assert lake(made) == at_the_fence, "the lake stays at the fence while the new store has authority"
            switch(made, Stage.SHADOW)
            back = fence(made.spec, Origin.OLD)
            wait_for(lambda: router.stage is Stage.SHADOW, "shadow")
            add(router, 2, "after the rollback")
        settle(made)
    assert back.epoch == 2
    echo = events_of_epoch_1(made)
    # the mirror's workers keep the order of a key, and none between keys
    assert sorted((event["op"], dict(event["row"] or event["key"])["id"]) for event in echo) == [
        ("D", "4"), ("I", "1000"), ("U", "1"), ("U", "3"),
    ]  # fmt: skip
    assert lake(made) == old(made) == comparable(rows(made.new, "ledgers"))
    versions = made.spark.read.format("delta").load(str(made.spec.targets[LAKE].folder / "ledgers")).collect()
    epochs = {row["id"]: (row["_version"]["epoch"], row["_deleted"]) for row in versions if row["_version"]["epoch"]}
    assert epochs == dict.fromkeys([1, 3, 1000, 2], (2, False)) | {4: (2, True)}, "the echo is of the log that goes on"
    assert all(verdict.equal for verdict in verdicts(made))


def verdicts(migration: Migration) -> list[Any]:
    with following(migration):
        return verify(migration.spec, migration.spark)


def write_at_live(router: Router) -> None:
    """Update two accounts, delete one and open one, in the new store."""
    add(router, 1, "at live")
    add(router, 3, "at live")
    for statement in ("DELETE FROM {} WHERE id = 4 RETURNING *", "INSERT INTO {} VALUES (1000, 1, 'opened at live') RETURNING *"):
        wrote(router, written(statement.format("accounts")), written(statement.format("ledgers")))


def written(statement: str) -> Any:
    return lambda cursor: returned(cursor.execute(statement.encode()))


def events_of_epoch_1(migration: Migration) -> list[dict[str, Any]]:
    """Return what the mirror wrote to the old store, as the stream brought it."""
    with Ledger.open(migration.spec, "test") as ledger:
        there, back = (one.from_lsn for one in ledger.authorities())
    found = spool_of(migration.spec).events(there, back).to_pylist()
    return [event for event in found if event["relation"] == "public.accounts"]
