"""What capture by triggers costs a writer: single-row transactions and one large statement, with the triggers and without, in turn.

Run it as `python -m benchmarks.triggers`; the last line is one JSON object, in milliseconds. The table is the demo's, the server is
one of our own with its usual settings, so that a commit is flushed.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import psycopg
from psycopg import sql

from changeover.demo.schema import DDL
from changeover.embedded.server import EmbeddedServer
from changeover.jobs.source import triggerlog
from changeover.session import connect
from changeover.spec import load

ROUNDS, WRITES, LARGE = 20, 100, 20_000
SPEC = """
name = "bench"
[source]
dsn = "env:UNUSED"
capture = "trigger"
[target.lake]
kind = "delta"
path = "/nowhere"
[ledger]
dsn = "env:UNUSED"
[[table]]
source = "logged.follows"
target = "follows"
key = ["from_user", "to_channel"]
[work]
path = "/nowhere"
"""
INSERT = (
    "INSERT INTO {} (from_user, to_channel, note, tags, created_at, updated_at) SELECT i, 1, 'a note of some length ' || i,"
    " '{{a,b}}', now(), now() FROM generate_series(%s::bigint, %s::bigint) i"
)
UPDATE = "UPDATE {} SET note = note || 'x' WHERE from_user = %s AND to_channel = 1"


def main() -> None:
    """Measure on a server of our own and print."""
    root = Path(tempfile.mkdtemp(prefix="changeover-bench-"))
    server = EmbeddedServer.start(root)
    try:
        print(json.dumps(costs(server.create_database("bench"))))
    finally:
        server.remove()


def costs(dsn: str) -> dict[str, dict[str, float]]:
    """Make the table twice in an empty database, once with the triggers, and measure."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(SPEC)
        file.flush()
        spec = load(file.name)
    with connect(dsn, "bench") as session:
        for schema in ("plain", "logged"):
            session.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
            session.execute(sql.SQL(DDL.replace("public.follows", f"{schema}.follows")))
        triggerlog.install(session, spec, [("from_user", "to_channel")])
        return measure(session)


def measure(session: psycopg.Connection[tuple[object, ...]]) -> dict[str, dict[str, float]]:
    """Return medians and p99 of each kind of write, in milliseconds."""
    times: dict[tuple[str, str], list[float]] = {}

    def timed(what: str, where: str, statement: str, *given: int) -> None:
        started = time.perf_counter()
        session.execute(sql.SQL(statement).format(sql.Identifier(where, "follows")), given)
        times.setdefault((what, where), []).append(1000 * (time.perf_counter() - started))

    at = 0
    for _ in range(ROUNDS):
        for where in ("plain", "logged"):
            for one in range(at, at + WRITES):
                timed("insert", where, INSERT, one, one)
                timed("update", where, UPDATE, one)
        at += WRITES
    for _ in range(5):
        for where in ("plain", "logged"):
            timed("insert_20000_rows", where, INSERT, at, at + LARGE - 1)
        at += LARGE
    return {
        f"{what} {where}": {
            "p50": round(statistics.median(found), 3), "p99": round(statistics.quantiles(found, n=100)[98], 3),
        }
        for (what, where), found in times.items()
    }  # fmt: skip


if __name__ == "__main__":
    main()
