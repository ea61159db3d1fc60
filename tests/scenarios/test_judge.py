"""The judge: plain SQL over the stores that a demo kept, by hand and by nobody's reader but PostgreSQL's and Arrow's."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from deltalake import DeltaTable

from tests.support.fix_demo import DemoRun

OLD = """
SELECT from_user::text, 'follows', to_channel::text, notify::text, settings::text, note, weight::text, score::text, credit::text,
    tags::text, levels::text, (to_timestamp(blocked_on, 'YYYY-MM-DD HH24:MI:SS'))::text, created_at::text, updated_at::text
FROM follows
"""

NEW = """
SELECT entity_a::text, kind, entity_b::text, notify::text, settings::text, note, weight::text, score::text, credit::text,
    tags::text, levels::text, blocked_on::text, created_at::text, updated_at::text
FROM associations
"""

COLUMNS = ", ".join(f"c{number} text" for number in range(14))

RESERVED = 10
"""Users whose rows the demo's application never writes."""


def test_except_all_agrees_both_ways(kept_demo: DemoRun) -> None:
    with kept_demo.connect("old") as old, kept_demo.connect("new") as new:
        new.execute(f"CREATE TEMPORARY TABLE judged ({COLUMNS})".encode())
        with old.cursor().copy(f"COPY ({OLD}) TO STDOUT".encode()) as out, new.cursor().copy("COPY judged FROM STDIN") as into:
            for block in out:
                into.write(block)
        lost = new.execute(f"SELECT * FROM (TABLE judged EXCEPT ALL ({NEW})) AS lost LIMIT 3".encode()).fetchall()
        added = new.execute(f"SELECT * FROM (({NEW}) EXCEPT ALL TABLE judged) AS added LIMIT 3".encode()).fetchall()
        assert (lost, added) == ([], [])
        count = new.execute("SELECT count(*) FROM judged").fetchone()
        assert count is not None
        assert count[0] > 1000, "nothing was compared"


@pytest.fixture(scope="module")
def lake(kept_demo: DemoRun) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the lake's rows by user and channel."""
    rows = DeltaTable(f"{kept_demo.document['stores']['lake']}/associations").to_pyarrow_table().to_pylist()
    found = {(row["entity_a"], row["entity_b"]): row for row in rows}
    assert len(found) == len(rows)
    assert not any(row["_deleted"] for row in rows), "finalize left a tombstone"
    return found


def test_the_lake_holds_every_row_as_the_old_store_does(kept_demo: DemoRun, lake: dict[tuple[int, int], dict[str, Any]]) -> None:
    """The lake follows the new store since the fence, as the old store does; what came after the last stage left no trace."""
    with kept_demo.connect("old") as old:
        found = old.execute(
            "SELECT from_user, to_channel, notify, settings::text, note, weight, score, credit::text, tags, levels,"
            " to_timestamp(blocked_on, 'YYYY-MM-DD HH24:MI:SS'), created_at, updated_at FROM follows",
        ).fetchall()
    rows: list[tuple[Any, ...]] = [tuple(v.astimezone(UTC) if isinstance(v, datetime) else v for v in row) for row in found]
    assert len(rows) > 1000, "nothing was compared"
    different = [row for row in rows if row[:2] not in lake or repr(row[2:]) != repr(image(lake[row[:2]]))]
    assert different == []
    assert lake.keys() == {row[:2] for row in rows}


def image(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return a row of the lake as the query above returns it; by `repr`, NaN is itself and -0.0 is not 0.0."""
    moments = {name: row[name] and row[name].astimezone(UTC) for name in ("blocked_on", "created_at", "updated_at")}
    names = ("notify", "settings", "note", "weight", "score", "credit", "tags", "levels")
    return (*(row[name] for name in names), *moments.values())


def test_the_lake_has_rows_from_after_the_fence(kept_demo: DemoRun, lake: dict[tuple[int, int], dict[str, Any]]) -> None:
    with kept_demo.connect("new") as new:
        row = new.execute("SELECT at FROM changeover.authority WHERE epoch = 1").fetchone()
    assert row is not None
    assert max(row["updated_at"] for row in lake.values()).astimezone(UTC) > row[0]


def test_rows_that_nobody_wrote_are_the_same_in_number(kept_demo: DemoRun, lake: dict[tuple[int, int], dict[str, Any]]) -> None:
    with kept_demo.connect("old") as old:
        found = old.execute("SELECT from_user, to_channel FROM follows WHERE from_user <= %s", [RESERVED]).fetchall()
    assert set(found) == {key for key in lake if key[0] <= RESERVED}
