"""The field of the stress: one gated table on a real server, sessions that hesitate at random, and the product's store over it.

Hesitation widens every window without touching a statement: before a statement in the client, and inside one by triggers that
sleep, between its snapshot and its first row and between rows.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import psycopg

from changeover.jobs.ledger.records import SCHEMA
from changeover.session import Connection, connect
from changeover.stores.base.interface import TargetTable
from changeover.stores.base.pgtypes import Column
from changeover.stores.postgres import gate
from changeover.stores.postgres.store import PostgresStore
from tests.stress.source import V0

NAME = "stressed"
COLUMNS = (Column("id", "integer", "int", True), Column("note", "text", "string"))
TABLE = TargetTable("public", NAME, COLUMNS, ("id",))
GATED = gate.GatedTable("public", NAME, ("id",), ("id", "note"))
TOUCHED = f'changeover."versions_public.{NAME}"'

WRITERS = 8
APPLICATION = "changeover:stress:session"

HESITATION = """
CREATE FUNCTION hesitate() RETURNS trigger LANGUAGE plpgsql AS $body$
DECLARE slow float8 := coalesce(nullif(current_setting('stress.slow', true), ''), '1')::float8;
BEGIN
    IF random() < slow * TG_ARGV[0]::float8 THEN PERFORM pg_sleep(random() * slow * TG_ARGV[1]::float8); END IF;
    IF TG_LEVEL = 'STATEMENT' THEN RETURN NULL; END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    RETURN NEW;
END $body$;
"""

SLOW = """
CREATE TRIGGER before_statement BEFORE INSERT OR UPDATE OR DELETE ON {table} FOR EACH STATEMENT
    EXECUTE FUNCTION hesitate('{share}', '{statement}');
CREATE TRIGGER before_row BEFORE INSERT OR UPDATE OR DELETE ON {table} FOR EACH ROW
    EXECUTE FUNCTION hesitate('{share}', '{row}');
ALTER TABLE {table} ENABLE ALWAYS TRIGGER before_statement, ENABLE ALWAYS TRIGGER before_row;
"""

SHARE, STATEMENT, ROW = 0.15, 0.025, 0.004
"""How many statements and rows hesitate; seconds at most, between a statement's snapshot and its first row, and before a row."""


LOADER_SLOW = 3
"""A chunk's one statement is under way for seconds in a real load, so the loader hesitates more often and for longer."""


def hesitate(share: float = SHARE, longest: float = ROW) -> None:
    """Wait, or not."""
    if random.random() < share:
        time.sleep(random.random() * longest)


class Hesitant(psycopg.Cursor[Any]):
    """A cursor that at times waits before it does what it is told."""

    def execute(self, *arguments: Any, **options: Any) -> Hesitant:
        """Wait, or not, then execute."""
        hesitate()
        super().execute(*arguments, **options)
        return self


@dataclass
class Field:
    """A gated table and the sessions of those who work on it; sessions live from trial to trial.

    `mutated` says that a rule is taken away, so that a deadlock may be the mutant's.
    """

    admin: Connection
    writers: list[Connection]
    loader: Connection
    closer: PostgresStore
    truncater: PostgresStore
    collector: PostgresStore
    mutated: bool = False

    @classmethod
    @contextmanager
    def on(cls, dsn: str) -> Iterator[Field]:
        """Make the table in an empty database."""
        with ExitStack() as held:
            admin = held.enter_context(connect(dsn, APPLICATION))
            admin.execute(f"CREATE TABLE {NAME} (id integer PRIMARY KEY, note text)".encode())
            gate.install(admin, GATED, V0)
            admin.execute(SCHEMA)
            admin.execute(HESITATION)
            for table in (NAME, TOUCHED):
                admin.execute(SLOW.format(table=table, share=SHARE, statement=STATEMENT, row=ROW).encode())

            def session(**options: Any) -> Connection:
                made = held.enter_context(connect(dsn, APPLICATION, **options))
                made.cursor_factory = Hesitant
                return made

            def store(name: str) -> PostgresStore:
                return PostgresStore(name, dsn, "stress", name, session())

            writers = [session(autocommit=False) for _ in range(WRITERS)]
            loader = session(autocommit=False, settings={"stress.slow": str(LOADER_SLOW)})
            yield cls(admin, writers, loader, store("close"), store("truncate"), store("collect"))

    def reset(self) -> None:
        """Empty the table, its versions and the ledger, and install the gate as it now is."""
        self.admin.execute(f"TRUNCATE {NAME}, {TOUCHED}; DELETE FROM changeover.gate".encode())
        gate.install(self.admin, GATED, V0)

    def rows(self) -> dict[int, str]:
        """Return the live rows."""
        return dict(self.admin.execute(f"SELECT id, note FROM {NAME}".encode()).fetchall())

    def ghosts(self) -> list[int]:
        """Return the keys that live beside their tombstone."""
        ghosts = f"SELECT id FROM {NAME} JOIN {TOUCHED} AS t USING (id) WHERE t._changeover_deleted"
        return [row[0] for row in self.admin.execute(ghosts.encode()).fetchall()]

    def floor(self) -> tuple[int, str, int]:
        """Return the floor as the gate's function takes it."""
        row = self.admin.execute("SELECT epoch, lsn::text, ordinal FROM changeover.gate").fetchone()
        assert row is not None
        return row[0], row[1], row[2]
