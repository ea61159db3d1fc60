"""What moving tenants one by one costs a writer whose own tenant has not moved: the product's refusal beside a row read FOR SHARE.

Run it as `python -m benchmarks.tenants`; the last line is one JSON object, in milliseconds. Writers of one tenant, each with a
session of its own, update rows by key in single-row transactions that are not flushed, so that what is measured is not the disk.
`share` is the other way to do it: a row of authority for each tenant, which every writing transaction locks FOR SHARE.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import threading
import time
from pathlib import Path

from psycopg import sql

from changeover.embedded.server import EmbeddedServer
from changeover.session import Connection, connect
from changeover.stores.postgres import refusal
from changeover.tenants import Tenants

ROUNDS, WRITES, WRITERS = 7, 300, 4
REFUSED = {"one": 1, "thousand": 1_000, "most": 10_000}
SHARE = """
CREATE TABLE share_authority (tenant text PRIMARY KEY, here boolean NOT NULL);
INSERT INTO share_authority SELECT i::text, i > 1 FROM generate_series(1, 10000) i;
CREATE FUNCTION share_check() RETURNS trigger LANGUAGE plpgsql AS $body$ BEGIN
    PERFORM FROM share_authority WHERE tenant = NEW.whose::text AND here FOR SHARE;
    IF NOT FOUND THEN RAISE EXCEPTION 'no authority'; END IF;
    RETURN NEW; END $body$;
CREATE TRIGGER share BEFORE INSERT OR UPDATE ON share FOR EACH ROW EXECUTE FUNCTION share_check();
"""


def main() -> None:
    """Measure on a server of our own and print."""
    server = EmbeddedServer.start(Path(tempfile.mkdtemp(prefix="changeover-bench-")))
    try:
        print(json.dumps(measure(server.create_database("bench"))))
    finally:
        server.remove()


def measure(dsn: str) -> dict[str, dict[str, float]]:
    """Return median and p99 of a write by kind of table and number of writers, in milliseconds."""
    with connect(dsn, "bench") as session:
        for name in ("plain", "share", *REFUSED):
            _make(session, name)
        session.execute(SHARE)
        for name, count in REFUSED.items():
            moved = Tenants(frozenset(str(10**6 + one) for one in range(count)), others=False)
            what = refusal.Refusal((refusal.TenantEpoch(1, moved),), None, "whose")
            assert refusal.install(session, "public", name, what, time.monotonic() + 10)
    times: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for writers in (1, WRITERS):
            for name in ("plain", "share", *REFUSED):
                times.setdefault(f"{name} {writers}", []).extend(_written(dsn, name, writers))
    return {
        what: {"p50": round(statistics.median(found), 4), "p99": round(statistics.quantiles(found, n=100)[98], 4)}
        for what, found in times.items()
    }


def _make(session: Connection, name: str) -> None:
    session.execute(
        sql.SQL(
            "CREATE TABLE {0} (whose bigint, id bigint, note text, PRIMARY KEY (whose, id));"
            "INSERT INTO {0} SELECT 2, i, 'n' FROM generate_series(1, 10000) i"
        ).format(sql.Identifier(name))
    )


def _written(dsn: str, name: str, writers: int) -> list[float]:
    """Write with so many sessions at a time; return each write's milliseconds."""
    found: list[float] = []
    together = threading.Barrier(writers)

    def write(number: int) -> None:
        statement = sql.SQL("UPDATE {} SET note = note || 'x' WHERE whose = 2 AND id = %s").format(sql.Identifier(name))
        own = []
        with connect(dsn, "bench") as session:
            session.execute("SET synchronous_commit = off")
            session.execute(statement, [number])
            together.wait()
            for place in range(WRITES):
                started = time.perf_counter()
                session.execute(statement, [number * 1000 + place])
                own.append(1000 * (time.perf_counter() - started))
        found.extend(own)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


if __name__ == "__main__":
    main()
