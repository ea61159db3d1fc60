"""A partitioned source end to end, with generated columns: copied, followed, verified, stopped by name, and begun anew."""

from __future__ import annotations

import pytest

from changeover import pipeline
from changeover.errors import TableStopped
from changeover.jobs.ledger.ledger import Ledger
from tests.support.fix_migration import LAKE, STORE, MakeMigration, Migration, rows

ROWS = 3000

EVENTS = """
CREATE TABLE events (id integer, day date, note text, big text, shout text GENERATED ALWAYS AS (upper(note)) STORED,
    again integer GENERATED ALWAYS AS (id + 1) VIRTUAL, PRIMARY KEY (id, day)) PARTITION BY RANGE (day);
CREATE TABLE january PARTITION OF events FOR VALUES FROM ('2026-01-01') TO ('2026-02-01');
CREATE TABLE february (junk integer, big text, shout text GENERATED ALWAYS AS (upper(note)) STORED,
    again integer GENERATED ALWAYS AS (id + 1) VIRTUAL, note text, day date NOT NULL, id integer NOT NULL, PRIMARY KEY (id, day));
ALTER TABLE february DROP junk;
ALTER TABLE events ATTACH PARTITION february FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
CREATE TABLE rest PARTITION OF events DEFAULT PARTITION BY HASH (id);
CREATE TABLE rest_0 PARTITION OF rest FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE rest_1 PARTITION OF rest FOR VALUES WITH (MODULUS 2, REMAINDER 1);
ALTER TABLE events ALTER big SET STORAGE EXTERNAL;
ALTER TABLE january ALTER big SET STORAGE EXTERNAL;
ALTER TABLE february ALTER big SET STORAGE EXTERNAL;
"""

TABLE = """
[[table]]
source = "public.events"
target = "moved"
key = ["id", "day"]
[table.columns]
loud = "upper(note)"
"""

FILL = "INSERT INTO events SELECT i, date '2026-01-01' + i %% 75, 'n' || i, repeat('x', 3000) FROM generate_series(1, %s) i"

CHANGES = """
UPDATE events SET day = day + 31 WHERE id % 10 = 0;
UPDATE events SET note = 'big was not sent' WHERE id % 10 = 1;
DELETE FROM events WHERE id % 10 = 2;
INSERT INTO events VALUES (9001, '2026-02-14', 'new', 'y');
UPDATE events SET id = id + 10000 WHERE id % 10 = 3
"""


def assert_equal(migration: Migration) -> None:
    """Compare what the three hold, each read by itself."""
    columns = "id, day, note, big, upper(note)"
    expected = rows(migration.old.execute(f"SELECT {columns} FROM events".encode()).fetchall())
    assert rows(migration.new.execute("SELECT id, day, note, big, loud FROM moved").fetchall()) == expected
    lake = migration.lake("moved").select("id", "day", "note", "big", "loud").toArrow().to_pylist()
    assert rows([tuple(row.values()) for row in lake]) == expected


@pytest.fixture
def events(make_migration: MakeMigration) -> Migration:
    made = make_migration(TABLE, EVENTS)
    # a target that is partitioned itself, with a column that its own server fills
    made.new.execute(
        "CREATE TABLE moved (id integer, day date, note text, big text, loud text,"
        " longer text GENERATED ALWAYS AS (note || '!') STORED, PRIMARY KEY (id, day)) PARTITION BY HASH (id);"
        " CREATE TABLE moved_0 PARTITION OF moved FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
    )
    made.old.execute(FILL, [ROWS])
    made.old.execute("ANALYZE events")
    return made


def test_a_partitioned_table_is_moved_as_one(events: Migration) -> None:
    events.prepare()
    assert [name for name, _ in events.lake("moved").dtypes] == ["id", "day", "loud", "note", "big"]
    events.old.execute(CHANGES.encode())
    events.backfill()
    events.catch_up()
    assert_equal(events)
    made = [chunk for chunk in events.chunks(STORE) if chunk.rows]
    assert len(made) > 1, "its ranges are planned over all partitions"
    verdicts = events.verify()
    assert {target: (verdict.equal, verdict.source_rows) for target, verdict in verdicts.items()} == {
        target: (True, ROWS - ROWS // 10 + 1) for target in (STORE, LAKE)
    }
    events.old.execute("TRUNCATE events; INSERT INTO events VALUES (1, '2026-01-01', 'first', NULL)")
    events.catch_up()
    assert_equal(events)
    partitions_of_their_own(events)
    events.abort()
    assert events.leftovers() == []


def partitions_of_their_own(events: Migration) -> None:
    """A partition that is created goes on, one that is truncated alone stops the table, and so does one that is detached."""
    events.old.execute(FILL, [100])
    events.catch_up()
    events.old.execute("TRUNCATE january; INSERT INTO events VALUES (77000, '2026-01-02', 'after', NULL)")
    events.capture()
    with pytest.raises(TableStopped, match=r"the rows of public.january alone were truncated.*`changeover prepare --anew SPEC`"):
        events.replay()
    assert pipeline.prepare(events.spec, events.spark, anew=True).stream.epoch == 1
    events.backfill()
    events.catch_up()
    assert_equal(events)
    assert all(verdict.equal for verdict in events.verify().values())
    events.old.execute("ALTER TABLE events DETACH PARTITION february")
    with pytest.raises(TableStopped, match=r"its partition public.february was detached or dropped since prepare"):
        events.verify()
    pipeline.prepare(events.spec, events.spark, anew=True)
    events.old.execute("CREATE SCHEMA parts")
    events.old.execute("CREATE TABLE parts.again PARTITION OF events FOR VALUES FROM ('2026-02-01') TO ('2026-03-01')")
    events.old.execute("INSERT INTO events VALUES (88000, '2026-02-02', 'in a partition of now', 'z')")
    events.backfill()
    events.catch_up()
    assert_equal(events)
    assert all(verdict.equal for verdict in events.verify().values())
    with Ledger.open(events.spec, "test") as ledger:
        assert ledger.stopped().get("public.events") is None
