"""The demo's table: who follows which channel, with the values that break careless copies.

Notification settings, a timestamp kept as TEXT, money, numbers of 40 digits, arrays, NULLs and text from everywhere. The
rows are a pure function of their number and made by the server itself. The first users are reserved: the demo's
application never writes their rows, so that damage done to them stays, and anyone can compare them by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from changeover.session import Connection

NAME = "follows"
SOURCE = "public.follows"
TARGET = "public.associations"
KEY = ("from_user", "to_channel")
FLAG = "follows-store"

RESERVED_USERS = 10
"""Users 1 to 10 are left alone by the application."""

ROWS_BY_DEFAULT = 50_000
"""Enough for chunks, races and a rate, and few enough for a coffee."""

LEAST_ROWS = 500
"""Fewer rows would leave the application nothing to meet the backfill with."""

DDL = """
CREATE TABLE public.follows (
    from_user bigint NOT NULL, to_channel bigint NOT NULL, notify boolean NOT NULL DEFAULT true, settings jsonb,
    note text, weight numeric(12,4), score double precision, credit numeric, tags text[], levels integer[],
    blocked_on text, created_at timestamptz NOT NULL, updated_at timestamptz NOT NULL, PRIMARY KEY (from_user, to_channel))
"""

ROWS = r"""
INSERT INTO public.follows
SELECT 1 + i %% %(users)s, 1 + i / %(users)s, i %% 3 <> 0,
    CASE WHEN i %% 8 <> 0 THEN
        jsonb_build_object('push', i %% 2 = 0, 'email', 'Zoë ' || i, 'quiet', jsonb_build_array(i %% 24, NULL)) END,
    CASE i %% 9 WHEN 0 THEN NULL WHEN 1 THEN '' WHEN 2 THEN 'NULL' WHEN 3 THEN 'Zoë said "hi" \ back'
        WHEN 4 THEN E'two\nlines\tand a tab' WHEN 5 THEN 'チャンネルを応援しています'
        WHEN 6 THEN 'trailing blanks   ' WHEN 7 THEN '👩‍👩‍👧 family channel' ELSE 'followed since the beginning, number ' || i END,
    CASE WHEN i %% 11 <> 0 THEN (i %% 100000)::numeric / 7 END,
    CASE i %% 13 WHEN 0 THEN 'NaN'::double precision WHEN 1 THEN '-0' WHEN 2 THEN 'Infinity' WHEN 3 THEN NULL ELSE i / 3.0 END,
    CASE WHEN i %% 10 <> 0 THEN i * 1000000000000000000000000000.000100 - 1 END,
    CASE i %% 5 WHEN 0 THEN NULL WHEN 1 THEN '{}' WHEN 2 THEN ARRAY['a,b', NULL, '', 'NULL', 'q"x\y'] ELSE ARRAY['tag ' || i] END,
    CASE i %% 4 WHEN 0 THEN NULL WHEN 1 THEN '{1,NULL,3}' WHEN 2 THEN '{}' ELSE ARRAY[i %% 100000] END,
    CASE WHEN i %% 6 <> 0 THEN
        to_char(timestamp '2016-01-01 00:00:00' + i %% 3000000 * interval '97 seconds', 'YYYY-MM-DD HH24:MI:SS') END,
    timestamptz '2015-01-01 00:00:00Z' + i %% 5000000 * interval '61.000003 seconds',
    timestamptz '2015-01-01 00:00:00Z' + i %% 5000000 * interval '61.000003 seconds'
FROM generate_series(0, %(rows)s - 1) AS i
"""

SPEC = """\
# One table to two targets; what this file says serves backfill, replay and verification alike.
name = "{name}"

[source]
dsn = "env:OLD_DSN"

[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"

[target.lake]
kind = "delta"
path = "{lake}"

[[table]]
source = "{source}"
target = "{target}"
key = ["entity_a", "kind", "entity_b"]

[table.columns]
entity_a = "from_user"
kind = "'follows'"
entity_b = "to_channel"
blocked_on = "to_timestamp(blocked_on)"

[table.reverse]
# What the application writes to the new store comes back through this; the other columns only changed their names.
blocked_on = "date_format(blocked_on, 'yyyy-MM-dd HH:mm:ss')"

[flag]
key = "{flag}"
target = "store"
file = "{flags}"

[work]
path = "{work}"
"""


@dataclass(frozen=True)
class Shape:
    """How many rows there are, and who they belong to."""

    rows: int

    @property
    def users(self) -> int:
        """Return how many users there are: each follows some forty channels, and a small table has fifty users."""
        return max(50, self.rows // 40)

    @property
    def channels(self) -> int:
        """Return how many channels the application chooses from: a few more than have followers yet."""
        return self.rows // self.users * 11 // 10 + 2

    @property
    def writes_per_second(self) -> float:
        """Return how often the application writes: 200 times, and less for a small table, whose rows would never rest."""
        return min(200.0, max(30.0, self.rows / 100))


def create(connection: Connection, shape: Shape) -> None:
    """Create the table in the old store and fill it."""
    with connection.transaction():
        connection.execute(DDL)
        connection.execute(ROWS, {"users": shape.users, "rows": shape.rows})
    connection.execute("ANALYZE public.follows")


def write_spec(path: Path, *, lake: Path, work: Path, flags: Path) -> None:
    """Write the demo's spec; it names the environment variables and holds no secret."""
    text = SPEC.format(name=NAME, lake=lake, source=SOURCE, target=TARGET, flag=FLAG, flags=flags, work=work)
    path.write_text(text, encoding="utf-8")
