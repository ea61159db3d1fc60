"""The transform: one set of expressions, of which a row that is left out meets none, whichever way it comes."""

from __future__ import annotations

from chispa import assert_df_equality

from tests.support.fix_migration import LAKE, STORE, MakeMigration

VISITS = """
CREATE TABLE visits (id integer PRIMARY KEY, kind text COLLATE "unicode" NOT NULL, code character(4) NOT NULL,
    seen text, at timestamptz, weight float8)
"""

VISITS_TABLE = """
[[table]]
source = "public.visits"
target = "calls"
key = ["id"]
where = "kind > 'B' AND code <> 'ab'"
[table.columns]
seen = "to_timestamp(seen)"
share = "1 / coalesce(weight, 0)"
"""

GOOD = ("a post", "xy", "2020-01-01 00:00:00", "2024-01-01 00:00Z", 2)
BAD = ("A DRAFT", "xy", "not a time", "infinity", 0)
"""No expression takes a value of it: the text is no time, Spark has no such moment, and nothing is divided by nothing."""

PADDED = ("a post", "ab", "2020-01-01 00:00:00", None, 4)
"""Spark, which decides, tells 'ab  ' from 'ab', and 'a' comes after 'B'; to PostgreSQL neither is so in these columns."""

INSERT = "INSERT INTO visits VALUES (%s, %s, %s, %s, %s, %s)"
UPDATE = "UPDATE visits SET (kind, code, seen, at, weight) = (%s, %s, %s, %s, %s::float8) WHERE id = %s"


def test_a_row_that_is_left_out_stops_nothing(make_migration: MakeMigration) -> None:
    made = make_migration(VISITS_TABLE, VISITS)
    for number, row in enumerate([GOOD, BAD, PADDED, GOOD, GOOD, BAD]):
        made.old.execute(INSERT, [number, *row])
    made.prepare()
    for number, row in enumerate([GOOD, BAD, PADDED, BAD, GOOD], start=10):
        made.old.execute(INSERT, [number, *row])
    for number, row in [(3, BAD), (5, GOOD), (13, GOOD), (14, BAD)]:
        made.old.execute(UPDATE, [*row, number])
    made.old.execute("DELETE FROM visits WHERE id = 4")
    made.backfill()
    made.catch_up()
    kept = [(0, 0.5), (2, 0.25), (5, 0.5), (10, 0.5), (12, 0.25), (13, 0.5)]
    assert made.new.execute("SELECT id, share FROM calls ORDER BY id").fetchall() == kept
    calls = made.lake("calls").select("id", "share").orderBy("id")
    assert_df_equality(calls, made.spark.createDataFrame(kept, "id int, share double"), ignore_nullable=True)
    verdicts = made.verify()
    assert {target: verdict.word for target, verdict in verdicts.items()} == {STORE: "equal", LAKE: "equal"}
    assert {verdict.equal_rows for verdict in verdicts.values()} == {len(kept)}
