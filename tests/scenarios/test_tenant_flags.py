"""Tenants advanced and rolled back one by one by the flag's commands, beside `flags watch` and an application with a router.

Each write adds one to a row's count, so what was acknowledged can be held against what the stores have: a lost write is missing,
one that was made twice is one too many.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from click.testing import CliRunner, Result
from ldclient.migrations.types import Origin, Stage

from changeover.cli.main import main
from changeover.flags import flagfile
from changeover.flags.cutover import commands as cutover
from changeover.flags.readiness import COMPARISONS
from changeover.flags.router.router import Change, Limits, Router, returned
from changeover.jobs.ledger.ledger import Ledger
from changeover.verifiers.verification import verify
from tests.support.fix_accounts import following
from tests.support.fix_flags import wrote
from tests.support.fix_migration import STORE, MakeMigration, Migration

MEMBERS = "CREATE TABLE members (org text, number integer, count bigint NOT NULL DEFAULT 0, PRIMARY KEY (org, number))"
FLAG = "members-store"
SPEC = f"""
[[table]]
source = "public.members"
target = "people"
key = ["org", "number"]
[flag]
key = "{FLAG}"
target = "store"
context = "org"
"""
ORGS = ("ann", "bob", "Zoë ☂", "dan")
NUMBERS = 20


@pytest.fixture
def members(make_migration: MakeMigration) -> Migration:
    made = make_migration(SPEC, MEMBERS, targets=(STORE,))
    made.old.execute("INSERT INTO members SELECT o, n FROM unnest(%s::text[]) o, generate_series(1, %s) n", [list(ORGS), NUMBERS])
    made.prepare()
    made.backfill()
    flagfile.write_stage(made.spec.work / "flags.json", FLAG, Stage.SHADOW)
    return made


def adding(table: str, org: str, number: int) -> Any:
    """Return the application's write for one of the two tables."""

    def write(cursor: Any) -> list[Change]:
        return returned(
            cursor.execute(f"UPDATE {table} SET count = count + 1 WHERE (org, number) = (%s, %s) RETURNING *", [org, number])
        )

    return write


def add(router: Router, org: str, number: int = 1) -> Any:
    return wrote(router, adding("members", org, number), adding("people", org, number), tenant=org)


def finding(table: str, org: str, number: int) -> Any:
    return lambda cursor: cursor.execute(
        f"SELECT org, number FROM {table} WHERE (org, number) = (%s, %s)", [org, number]
    ).fetchone()


@contextmanager
def application(migration: Migration) -> Iterator[tuple[Router, Counter[tuple[str, int]]]]:
    """Write and read all rows again and again; yields the router, and how often each row's write was acknowledged."""
    stop, done, failed = threading.Event(), Counter[tuple[str, int]](), list[BaseException]()
    client = flagfile.client(migration.spec.work / "flags.json", poll_seconds=0.05)
    patient = Limits(max_pause=120, mirror_deadline=60)
    router = Router.connect(migration.spec, client=client, limits=patient)

    def work(first: int) -> None:
        try:
            while not stop.is_set():
                for number in range(first, NUMBERS + 1, 2):
                    for org in ORGS:
                        add(router, org, number)
                        done[org, number] += 1
                        router.compare(old=finding("members", org, number), new=finding("people", org, number), tenant=org)
                        stop.wait(0.003)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        yield router, done
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        router.drain(30)
        router.close()
        client.close()  # type: ignore[no-untyped-call]
    assert not failed, failed


def flags(command: str, migration: Migration, *more: str) -> Result:
    """Run a command of the flag; where a busy machine called its fence off, or watch had the lease, it is run again."""
    for _ in range(12):
        done = CliRunner().invoke(main, ["flags", command, migration.spec.path, *more])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        if done.exit_code != 3:
            break
        time.sleep(0.3)
    return done


def held(migration: Migration) -> tuple[dict[tuple[str, int], int], dict[tuple[str, int], int]]:
    """Return the counts of both stores."""
    stores = ((migration.old, "members"), (migration.new, "people"))
    old, new = (session.execute(f"SELECT org, number, count FROM {table}").fetchall() for session, table in stores)
    return {row[:2]: row[2] for row in old}, {row[:2]: row[2] for row in new}


def moves(migration: Migration) -> list[tuple[str, frozenset[str] | None]]:
    with Ledger.open(migration.spec, "test") as ledger:
        return [(one.store, one.tenants) for one in ledger.authorities()]


def wait_for(condition: Any, what: str, said: object = "", seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no sign of {what}: {said}"
        time.sleep(0.05)


@contextmanager
def watched(migration: Migration) -> Iterator[list[str]]:
    """Run `flags watch` beside the block; yields what it says."""
    stop, said = threading.Event(), list[str]()
    thread = threading.Thread(target=cutover.watch, args=(migration.spec, stop), kwargs={"say": said.append})
    thread.start()
    try:
        yield said
    finally:
        stop.set()
        thread.join()


def test_tenants_go_there_and_back_one_by_one_and_no_acknowledged_write_is_lost_or_doubled(members: Migration) -> None:
    with following(members):
        with application(members) as (router, done), watched(members) as said:
            wait_for(lambda: any("switched from off to shadow" in line for line in said), "the stage on record", said)
            wait_for(lambda: router.counters()["comparisons"]["at_stage"]["compared"] >= COMPARISONS, "compared reads")
            assert [verdict.word for verdict in verify(members.spec, members.spark)] == ["equal"]
            told = flags("advance", members, "--tenant", "ann", "--tenant", "Zoë ☂", "--tenant", "nobody", "--json")
            assert told.exit_code == 0, told.stderr
            first = json.loads(told.stdout)
            assert (first["tenants"], first["unknown"], first["epoch"]) == (["ann", "Zoë ☂", "nobody"], ["nobody"], 1)
            wait_for(lambda: router.stage_of("ann") is Stage.LIVE, "the first tenant at live")
            places = {org: (w.origin, w.epoch) for org in ORGS for w in [add(router, org)]}
            ours = Counter({(org, 1): 1 for org in ORGS})
            new, old = (Origin.NEW, 1), (Origin.OLD, 0)
            assert places == {"ann": new, "bob": old, "Zoë ☂": new, "dan": old}
            assert "at the new store: 3 tenants (Zoë ☂, ann, nobody), epoch 1" in flags("show", members).stdout

            flagfile.write_tenants(members.spec.work / "flags.json", FLAG, "org", ["bob"], Stage.LIVE)
            wait_for(lambda: router.stage_of("bob") is Stage.LIVE, "a tenant that was switched elsewhere", said)
            wait_for(lambda: any("switched to live for 1 tenant (bob)" in line for line in said), "what watch says", said)
            assert router.stage_of("dan") is Stage.SHADOW

            back = flags("rollback", members, "--tenant", "ann")
            assert back.exit_code == 0, back.stderr
            assert back.stdout.startswith("1 tenant (ann): live → shadow (epoch 3, writers were held up")
            assert back.stdout.endswith("; nothing lost\n")
            wait_for(lambda: router.stage_of("ann") is Stage.SHADOW, "it at shadow")
            assert flags("advance", members, "--override", "test").exit_code == 0
            wait_for(lambda: {router.stage_of(org) for org in ORGS} == {Stage.LIVE}, "all at live")

            assert flags("rollback", members, "--tenant", "dan").exit_code == 0
            refused = flags("advance", members, "--override", "test")
            assert (refused.exit_code, "and 1 tenant (dan) are at the old store" in refused.stderr) == (1, True)
            assert flags("advance", members, "--tenant", "dan", "--override", "test").exit_code == 0
            assert flags("advance", members, "--override", "test").stdout.startswith("live → rampdown")
            wait_for(lambda: {router.stage_of(org) for org in ORGS} == {Stage.RAMPDOWN}, "all at rampdown")
        acknowledged = dict(done + ours)
        wait_for(lambda: held(members) == (acknowledged, acknowledged), "what was acknowledged, in both stores")
    assert moves(members) == [
        ("new", frozenset({"ann", "Zoë ☂", "nobody"})), ("new", frozenset({"bob"})), ("old", frozenset({"ann"})), ("new", None),
        ("old", frozenset({"dan"})), ("new", frozenset({"dan"})),
    ]  # fmt: skip
