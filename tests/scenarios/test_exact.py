"""While only the streams write to a store without authority, a verdict beside writers is exact: no key is judged again.

Nothing replays here but verify itself, so all that an application wrote since is under way when it asks.
"""

from __future__ import annotations

from ldclient.migrations.types import Origin, Stage

from changeover.flags.fence.fence import fence
from changeover.verifiers.verification import verify
from tests.support.fix_accounts import application, following, loaded, rows, switch, wait_for_writes
from tests.support.fix_flags import wait_until
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration


def verified(migration: Migration) -> dict[str, tuple[str, int]]:
    """Return the word on each target, and how many keys were judged again."""
    return {verdict.target: (verdict.word, verdict.recheck.rechecked) for verdict in verify(migration.spec, migration.spark)}


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
            made.old.execute("ALTER TABLE accounts DISABLE TRIGGER changeover_refusal")
            made.old.execute("INSERT INTO accounts VALUES (5000, 0, 'behind its back')")
            made.old.execute("ALTER TABLE accounts ENABLE ALWAYS TRIGGER changeover_refusal")
            found = verified(made)
        assert found == {STORE: ("different", 0), LAKE: ("different", 0)}
