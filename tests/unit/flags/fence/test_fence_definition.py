"""A stream whose definition was altered between a verdict and the fence: nobody may take over, whatever it reads by then."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from ldclient.migrations.types import Origin, Stage
from psycopg import sql
from pyspark.sql import SparkSession

from changeover.errors import ChangeoverError, SourceChanged, TableStopped
from changeover.flags.cutover import commands as cutover
from changeover.flags.fence.fence import fence
from changeover.jobs.apply.rounds import replay
from changeover.jobs.capture.service import capture
from changeover.jobs.guarantee import assumptions, definition
from changeover.jobs.ledger.epochs import OLD
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.restart import restart
from changeover.jobs.source.marker import mark
from changeover.session import connect
from changeover.spec import load
from tests.support.fix_accounts import ACCOUNTS, ROWS, SPEC, switch
from tests.support.fix_flags import wait_until
from tests.support.fix_migration import STORE, Migration, spec_text

ALTERED = [
    ["ALTER PUBLICATION {p} DROP TABLE accounts", "ALTER PUBLICATION {p} ADD TABLE accounts"],
    ["ALTER PUBLICATION {p} SET (publish = 'insert')", "ALTER PUBLICATION {p} SET (publish = 'insert, update, delete, truncate')"],
    ["ALTER PUBLICATION {p} SET TABLE accounts WHERE (id > 100000)", "ALTER PUBLICATION {p} SET TABLE accounts"],
    ["ALTER PUBLICATION {p} RENAME TO passing", "ALTER PUBLICATION passing RENAME TO {p}"],
]
"""Each statement alters the stream, and the next puts it back; what is written between them is in no event."""


@pytest.fixture
def moved(any_dsn: str, new_dsn: str, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Migration]:
    monkeypatch.setenv("OLD_DSN", any_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    path = tmp_path / "spec.toml"
    path.write_text(spec_text("m10", SPEC, tmp_path, [STORE]), encoding="utf-8")
    with connect(any_dsn, "test-old") as old, connect(new_dsn, "test-new") as new:
        old.execute(ACCOUNTS)
        old.execute("INSERT INTO accounts SELECT i, i * 1.5, 'n' || i FROM generate_series(1, %s) i", [ROWS])
        made = Migration(load(path), spark, old, new)
        made.prepare()
        made.backfill()
        switch(made, Stage.SHADOW)
        yield made


@contextmanager
def followed(migration: Migration) -> Iterator[None]:
    """Capture and replay until the block ends, or one of them says that the stream is not whole."""
    stop = threading.Event()
    others: list[BaseException] = []

    def guarded(work: object, *more: object, **options: object) -> None:
        try:
            work(migration.spec, *more, stop=stop, **options)  # type: ignore[operator]
        except (TableStopped, SourceChanged):
            pass
        except BaseException as error:
            others.append(error)

    threads = [
        threading.Thread(target=guarded, args=(capture,)),
        threading.Thread(target=guarded, args=(replay, migration.spark), kwargs={"follow": True}),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not others, others


def applied(migration: Migration, place: int) -> bool:
    """Return whether replay has passed a position."""
    with Ledger.open(migration.spec, "test") as ledger:
        return all(load.applied >= place for load in ledger.loads())


def put_right(migration: Migration) -> None:
    """Take what is there for the definition on record, and the table for one that never stopped."""
    with Ledger.open(migration.spec, "test") as ledger:
        ledger.connection.execute("UPDATE changeover.load SET stopped = NULL")
        definition.record(ledger, OLD, assumptions.present(migration.spec, migration.old, migration.spec.slot))


def test_what_was_altered_after_the_verdict_is_found_under_the_refusal(moved: Migration) -> None:
    assert moved.verify(STORE)[STORE].equal
    name = sql.Identifier(moved.spec.slot).as_string(moved.old)
    row_filters = moved.old.info.server_version >= 150000
    for number, (there, back) in enumerate(one for one in ALTERED if row_filters or "WHERE" not in one[0]):
        with followed(moved):
            wait_until(partial(applied, moved, mark(moved.old, f"running {number}")))  # both follow, and have asked already
            moved.old.execute(there.format(p=name).encode())
            moved.old.execute("UPDATE accounts SET note = %s WHERE id <= 3", [f"lost {number}"])
            moved.old.execute(back.format(p=name).encode())
            assert any("may be in no event" in reason for reason in cutover.show(moved.spec).reasons)
            with pytest.raises(ChangeoverError, match="may be in no event") as refused:
                fence(moved.spec, Origin.NEW)
        assert refused.value.exit_code == 1, there
        assert "prepare --anew" in str(refused.value)
        with Ledger.open(moved.spec, "test") as ledger:
            assert ledger.authority().store == "old"
            assert "may be in no event" in ledger.stopped()["public.accounts"]
        moved.old.execute("UPDATE accounts SET note = 'writers go on' WHERE id = 9")
        put_right(moved)
    # a capture that ended over it writes nothing down where it met the publication under its passing name
    for statement in ALTERED[-1]:
        moved.old.execute(statement.format(p=name).encode())
    with pytest.raises(TableStopped, match="may be in no event"):
        fence(moved.spec, Origin.NEW)
    # from here on it is refused without a wait, by the gate as well, until all is begun anew
    with pytest.raises(TableStopped, match="is stopped"):
        fence(moved.spec, Origin.NEW)
    assert any("public.accounts goes no further: its change stream's" in reason for reason in cutover.show(moved.spec).reasons)
    restart(moved.spec, moved.spark)
    moved.backfill()
    moved.catch_up(STORE)
    assert moved.verify(STORE)[STORE].equal
