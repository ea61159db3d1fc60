"""Verification while tenants are at both stores: live writers, writes past the refusal, no reverse replication."""

from __future__ import annotations

import time

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.errors import CouldNotCheck
from changeover.flags import flagfile
from changeover.flags.fence.fence import fence
from changeover.jobs.capture.rogue import rogue
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.reverse import path as reverse
from changeover.jobs.status import status
from changeover.verifiers.verification import verify
from tests.scenarios.test_tenants import FLAG, FOLLOWS, PATIENT, SPEC, settled, writing
from tests.support.fix_accounts import following
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration

UNREFUSED = "SET changeover.epoch = '99'"
"""What a session says that goes past the refusal, as a superuser might."""


@pytest.fixture
def apart(make_migration: MakeMigration) -> Migration:
    made = make_migration(SPEC, FOLLOWS, targets=(STORE, LAKE))
    made.old.execute("INSERT INTO friends SELECT u, t, 'n' || t, u FROM generate_series(1, 6) u, generate_series(1, 30) t")
    made.prepare()
    made.backfill()
    flagfile.write_stage(made.spec.work / "flags.json", FLAG, Stage.SHADOW)
    return made


def verdicts(migration: Migration) -> dict[str, tuple[str, int]]:
    return {one.target: (one.word, one.differing_keys) for one in verify(migration.spec, migration.spark)}


def test_both_stores_are_compared_while_each_has_tenants_of_its_own(apart: Migration) -> None:
    with following(apart):
        with writing(apart):
            time.sleep(0.3)
            fence(apart.spec, Origin.NEW, tenants=["1", "2"], max_pause=PATIENT)
            time.sleep(0.5)
            assert verdicts(apart) == {STORE: ("equal", 0), LAKE: ("equal", 0)}
        settled(apart)
        assert status(apart.spec).tenants == ["1", "2"]

        apart.new.execute(f"{UNREFUSED}; UPDATE links SET note = 'rogue' WHERE member = 5 AND to_user = 3; RESET changeover.epoch")
        assert verdicts(apart) == {STORE: ("different", 1), LAKE: ("equal", 0)}
        with Ledger.open(apart.spec, "test") as ledger:
            [found] = rogue(apart.spec, ledger)
        assert (found.store, found.table, found.changes) == ("new", "public.links", 1)
        apart.new.execute(f"{UNREFUSED}; UPDATE links SET note = 'n3' WHERE member = 5 AND to_user = 3; RESET changeover.epoch")
        apart.old.execute(f"{UNREFUSED}; DELETE FROM friends WHERE from_user = 2 AND to_user = 4; RESET changeover.epoch")
        assert verdicts(apart) == {STORE: ("different", 1), LAKE: ("different", 1)}
        with Ledger.open(apart.spec, "test") as ledger:
            assert {(one.store, one.changes) for one in rogue(apart.spec, ledger)} == {("new", 2), ("old", 1)}
        restored = "INSERT INTO friends VALUES (2, 4, 'n4', 2)"
        apart.old.execute(f"{UNREFUSED}; {restored}; RESET changeover.epoch")
        assert verdicts(apart) == {STORE: ("equal", 0), LAKE: ("equal", 0)}
        with Ledger.open(apart.spec, "test") as ledger:
            assert rogue(apart.spec, ledger) == [], "a verdict at a later moment settles them"

        fence(apart.spec, Origin.NEW, max_pause=PATIENT)
        apart.new.execute("UPDATE links SET note = 'at the new store alone' WHERE to_user = 9")
        assert verdicts(apart) == {STORE: ("equal", 0), LAKE: ("equal", 0)}

        fence(apart.spec, Origin.OLD, tenants=["3"], max_pause=PATIENT)
        with Ledger.open(apart.spec, "test") as ledger:
            reverse.break_off(ledger, "its slot is gone")
        with pytest.raises(CouldNotCheck, match=r"all rows but those of the tenant 3: the new store has .* slot is gone"):
            verdicts(apart)
