"""While tenants are at both stores a verdict beside writers is exact: each row is held at the position of its own authority.

Nothing replays here but verify itself, so all that was written since is under way in both directions when it asks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import pytest
from ldclient.migrations.types import Origin

from changeover.errors import CouldNotCheck
from changeover.flags.fence.fence import fence
from changeover.jobs.ledger.lease import lease_of
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import OLD_STORE
from changeover.jobs.source.changes import SlotSource
from changeover.verifiers.verification import verify
from tests.scenarios.test_tenants import FOLLOWS, PATIENT, SPEC, Writer, everywhere, writing
from tests.scenarios.test_verify_tenants import UNREFUSED
from tests.support.fix_accounts import following
from tests.support.fix_flags import wait_until
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration

EXACT = {STORE: ("equal", 0), LAKE: ("equal", 0)}
CHECKED = SPEC.replace("[table.columns]", '[[table.check]]\nname = "rows"\nsource = "SELECT count(*) FROM friends"\n'
                       'target = "SELECT count(*) FROM links"\n[table.columns]')  # fmt: skip
LARGE = "(SELECT string_agg(md5(i::text || %s), '') FROM generate_series(1, 400) i)"
"""A text that is kept out of line, so that an UPDATE of another column does not send it."""


def apart(make_migration: MakeMigration, spec: str = SPEC) -> Migration:
    """Return a migration whose tenants 1 and 2 are at the new store, and the others at the old one."""
    made = make_migration(spec, FOLLOWS, targets=(STORE, LAKE))
    made.old.execute("INSERT INTO friends SELECT u, t, 'n' || t, u FROM generate_series(1, 6) u, generate_series(1, 30) t")
    made.prepare()
    made.backfill()
    with following(made):
        fence(made.spec, Origin.NEW, tenants=["1", "2"], max_pause=PATIENT)
        made.new.execute(f"UPDATE links SET note = {LARGE} WHERE member = 1 AND to_user = 7", ["before"])
        made.old.execute(f"UPDATE friends SET note = {LARGE} WHERE from_user = 5 AND to_user = 7", ["before"])
        wait_until(lambda: len(set(map(str, everywhere(made).values()))) == 1, PATIENT)
    return made


def verified(migration: Migration) -> dict[str, tuple[str, int]]:
    """Return the word on each target, and how many keys were judged again."""
    return {one.target: (one.word, one.recheck.rechecked) for one in verify(migration.spec, migration.spark)}


def wrote(writers: list[Writer]) -> None:
    """Wait until each store has taken writes since."""
    before = [dict(writer.rows) for writer in writers]

    def changed(tenants: set[int]) -> bool:
        return any(
            {key: row for key, row in writer.rows.copy().items() if key[0] in tenants}
            != {key: row for key, row in earlier.items() if key[0] in tenants}
            for writer, earlier in zip(writers, before, strict=True)
        )  # fmt: skip

    wait_until(lambda: changed({1, 2}) and changed({3, 4, 5, 6}), PATIENT)


@contextmanager
def held_up(migration: Migration, writers: list[Writer]) -> Iterator[None]:
    """Hold all replay by its leases until the stores were written behind the verification's back, which waits for them."""
    held, asked = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def hold() -> None:
        try:
            with Ledger.open(migration.spec, "test") as ledger, ExitStack() as leases:
                for target in (OLD_STORE, STORE, LAKE):
                    leases.enter_context(ledger.lease(lease_of(target)))
                held.set()
                wait_until(asked.is_set, PATIENT)
                wrote(writers)
        except BaseException as error:
            failed.append(error)
            held.set()

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(PATIENT)
    try:
        asked.set()
        yield
    finally:
        thread.join()
    assert not failed, failed


def test_a_verdict_is_exact_while_tenants_are_at_both_stores(make_migration: MakeMigration) -> None:
    made = apart(make_migration)
    with made.capturing(), writing(made) as writers:
        wait_until(lambda: all({w.places[1], w.places[2]} == {"new"} for w in writers), PATIENT)
        wrote(writers)
        held = everywhere(made)
        assert held["old"] != held["new"], "what was written is under way"
        with held_up(made, writers):
            assert verified(made) == EXACT
        made.new.execute(f"{UNREFUSED}; UPDATE links SET note = 'rogue' WHERE member = 5 AND to_user = 3; RESET changeover.epoch")
        made.old.execute(f"{UNREFUSED}; DELETE FROM friends WHERE from_user = 2 AND to_user = 4; RESET changeover.epoch")
        verdicts = verify(made.spec, made.spark)
    assert {one.recheck.rechecked for one in verdicts} == {0}
    found = {one.target: {(*dict(row["key"]).values(), row["class"]) for row in made.differences(one)} for one in verdicts}
    assert found == {STORE: {("5", "3", "mismatched"), ("2", "4", "extra")}, LAKE: {("2", "4", "extra")}}


def test_each_row_is_held_at_the_position_of_its_own_authority(
    make_migration: MakeMigration, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = apart(make_migration)
    aligned = SlotSource.aligned

    def and_then_written(source: SlotSource, step: str, held: ExitStack) -> Any:
        found = aligned(source, step, held)
        for connection, table, column, whose in ((made.new, "links", "member", 1), (made.old, "friends", "from_user", 5)):
            connection.execute(f"UPDATE {table} SET note = {LARGE} WHERE {column} = %s AND to_user = 7", ["after", whose])
            connection.execute(f"DELETE FROM {table} WHERE {column} = {whose} AND to_user = 8".encode())
            connection.execute(f"INSERT INTO {table} ({column}, to_user) VALUES ({whose}, 500) ON CONFLICT DO NOTHING".encode())
        return found

    with made.capturing():
        made.new.execute("UPDATE links SET weight = weight + 1 WHERE member = 1 AND to_user IN (7, 8)")
        made.old.execute("UPDATE friends SET weight = weight + 1 WHERE from_user = 5 AND to_user IN (7, 8)")
        with monkeypatch.context() as patched:
            patched.setattr(SlotSource, "aligned", and_then_written)
            assert verified(made) == EXACT
        assert verified(made) == EXACT


def test_authority_that_moves_in_between_leaves_no_verdict(make_migration: MakeMigration, monkeypatch: pytest.MonkeyPatch) -> None:
    made = apart(make_migration)
    aligned = SlotSource.aligned

    def and_then_moved(source: SlotSource, step: str, held: ExitStack) -> Any:
        found = aligned(source, step, held)
        with Ledger.open(made.spec, "test") as ledger:  # as if a lease had been lost
            ledger.connection.execute("UPDATE changeover.authority SET tenants = '{1}' WHERE migration = %s", [made.spec.name])
        return found

    monkeypatch.setattr(SlotSource, "aligned", and_then_moved)
    with made.capturing(), pytest.raises(CouldNotCheck, match="authority moved while the verification began"):
        verified(made)


def test_the_specs_own_checks_see_two_moments_while_tenants_are_apart(
    make_migration: MakeMigration, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = apart(make_migration, CHECKED)
    aligned, rows = SlotSource.aligned, count(500)

    def and_then_written(source: SlotSource, step: str, held: ExitStack) -> Any:
        found = aligned(source, step, held)
        made.old.execute("INSERT INTO friends (from_user, to_user) VALUES (5, %s)", [next(rows)])
        return found

    with made.capturing():
        assert verified(made) == EXACT
        monkeypatch.setattr(SlotSource, "aligned", and_then_written)
        with pytest.raises(CouldNotCheck, match="the check rows differs, and while tenants are at both stores"):
            verify(made.spec, made.spark, targets=[STORE])
