"""While only the streams write to a store without authority, a verdict beside writers is exact: no key is judged again.

Nothing replays here but verify itself, so all that an application wrote since is under way when it asks.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
from ldclient.migrations.types import Origin, Stage

from changeover.flags.fence.fence import fence
from changeover.jobs.source.changes import SlotSource
from changeover.verifiers.verification import verify
from tests.support.fix_accounts import application, following, loaded, rows, switch, wait_for_writes
from tests.support.fix_flags import wait_until
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration, unrefused


def verified(migration: Migration, *targets: str) -> dict[str, tuple[str, int]]:
    """Return the word on each target (all unless named), and how many keys were judged again."""
    verdicts = verify(migration.spec, migration.spark, targets=targets or None)
    return {verdict.target: (verdict.word, verdict.recheck.rechecked) for verdict in verdicts}


def test_a_verdict_beside_writers_is_exact_before_the_fence_and_behind_it(make_migration: MakeMigration) -> None:
    made = loaded(make_migration, STORE, LAKE)
    exact = {STORE: ("equal", 0), LAKE: ("equal", 0)}
    with application(made) as router:
        with made.capturing():
            wait_for_writes(router)
            assert rows(made.old, "accounts") != rows(made.new, "ledgers"), "what was written is under way"
            assert verified(made) == exact
        with following(made):
            fence(made.spec, Origin.NEW)
            switch(made, Stage.LIVE)
            wait_until(lambda: router.stage is Stage.LIVE)
        with made.capturing():
            wait_for_writes(router)
            assert rows(made.old, "accounts") != rows(made.new, "ledgers")
            assert verified(made) == exact
            wait_for_writes(router)
            assert verified(made, LAKE) == {LAKE: ("equal", 0)}, "which the old store is held against, at one position"
            with unrefused(made.old, "accounts"):
                made.old.execute("INSERT INTO accounts VALUES (5000, 0, 'behind its back')")
            found = verified(made)
        assert found == {STORE: ("different", 0), LAKE: ("different", 0)}


LARGE = "SELECT string_agg(md5(i::text || %s), '') FROM generate_series(1, 400) i"
"""A text that is kept out of line, so that an UPDATE of another column does not send it."""


def test_what_an_update_did_not_send_is_read_at_the_position_that_is_compared(
    make_migration: MakeMigration, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = loaded(make_migration, STORE, LAKE)
    with following(made):
        fence(made.spec, Origin.NEW)
        made.new.execute(f"UPDATE ledgers SET note = ({LARGE}) WHERE id = 7".encode(), ["before"])
        wait_until(lambda: rows(made.old, "accounts") == rows(made.new, "ledgers"))
    aligned = SlotSource.aligned

    def and_then_written(source: SlotSource, step: str, held: ExitStack) -> Any:
        found = aligned(source, step, held)
        made.new.execute(f"UPDATE ledgers SET note = ({LARGE}) WHERE id = 7".encode(), ["after"])
        made.new.execute("DELETE FROM ledgers WHERE id = 8")
        return found

    monkeypatch.setattr(SlotSource, "aligned", and_then_written)
    with made.capturing():
        made.new.execute("UPDATE ledgers SET balance = balance + 1 WHERE id IN (7, 8)")
        assert verified(made) == {STORE: ("equal", 0), LAKE: ("equal", 0)}
