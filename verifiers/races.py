"""The races: replayed on the user's own two servers, in a scratch schema, with tombstones and without.

The gate and the loader are the product's own statements, and the versions are real positions in the
old server's log. The judge is a comparison of both tables, row by row. What differs without
tombstones is what a plain copy would have lost or brought back. The scratch schema is removed
whatever happens; no table of the user's is touched. Runs on the driver, without Spark.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import psycopg
from psycopg import sql

from changeover.errors import UsageError
from changeover.position import Version, format_lsn, image_version
from changeover.session import Connection, application_name, connect, one_row, server_name, speaking_to, wal_position
from changeover.spec import Spec
from changeover.stores.postgres import batches, gate
from changeover.stores.postgres.truncate import truncate

TABLE = "rows"
SEED = "INSERT INTO {rows} SELECT i, 'seed ' || i FROM generate_series(1, 3) AS i"

Row = tuple[int, str | None]


@dataclass(frozen=True)
class Change:
    """What one write left behind: its version, the key, and the image or None for a delete."""

    version: Version
    id: int
    note: str | None


@dataclass
class Scratch:
    """A table in both stores, what was read of it, and the changes that were not offered yet.

    `table` is the old store's, `gated` the new one's; `dsn` is the new store's.
    """

    old: Connection
    new: Connection
    dsn: str
    table: sql.Identifier
    gated: gate.GatedTable
    tombstones: bool
    images: list[Row] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)

    def read(self) -> None:
        """Read the old store's rows, as a chunk of a backfill does."""
        self.images = rows_of(self.old, self.table)

    def write(self, statement: str) -> None:
        """Write in the old store, with a version that is read in the same transaction."""
        with self.old.transaction():
            for row in self.old.execute(sql.SQL(statement).format(rows=self.table)).fetchall():
                self.changes.append(Change(Version(0, wal_position(self.old), len(self.changes)), *row))

    def offer(self, *, backwards: bool = False) -> None:
        """Offer all changes that wait, one by one."""
        for change in reversed(self.changes) if backwards else self.changes:
            with self._session() as cursor:
                batches.prepare_batch(cursor, self.gated, versions=True)
                cursor.execute(
                    sql.SQL("INSERT INTO {} VALUES (%s, %s, %s, %s, %s, %s)").format(batches.BATCH),
                    [change.version.epoch, format_lsn(change.version.lsn), change.version.ordinal, change.note is None,
                     change.id, change.note],
                )  # fmt: skip
                batches.apply_batch(cursor, self.gated)
                cursor.connection.commit()
            self._forget()
        self.changes.clear()

    def load(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Load what was read; `meanwhile` happens before the loader commits."""
        with self._session() as cursor:
            batches.prepare_batch(cursor, self.gated, versions=False)
            for row in self.images:
                cursor.execute(sql.SQL("INSERT INTO {} VALUES (%s, %s)").format(batches.BATCH), row)
            batches.load_batch(cursor, self.gated)
            meanwhile()
            cursor.connection.commit()

    def close(self) -> None:
        """Barrier and sweep."""
        gate.barrier(self.new, self.gated, server_name(self.dsn))
        gate.sweep(self.new, self.gated)

    def truncate(self) -> None:
        """Truncate the old table, and offer that."""
        self.old.execute(sql.SQL("TRUNCATE {}").format(self.table))
        truncate(self.new, self.gated, Version(0, wal_position(self.old), 0), server_name(self.dsn))
        self._forget()

    @contextmanager
    def _session(self) -> Iterator[psycopg.Cursor[tuple[object, ...]]]:
        with connect(self.dsn, "changeover:prove:offer", autocommit=False) as connection, connection.cursor() as cursor:
            yield cursor

    def _forget(self) -> None:
        if not self.tombstones:
            self.new.execute(sql.SQL("DELETE FROM {} WHERE _changeover_deleted").format(self.gated.row_versions))


def rows_of(connection: Connection, table: sql.Identifier) -> list[Row]:
    """Return a scratch table's rows."""
    return [(row[0], row[1]) for row in connection.execute(sql.SQL("SELECT id, note FROM {} ORDER BY id").format(table))]


INSERT = "INSERT INTO {{rows}} VALUES ({0}, '{1}') RETURNING id, note"
UPDATE = "UPDATE {{rows}} SET note = '{1}' WHERE id = {0} RETURNING id, note"
DELETE = "DELETE FROM {{rows}} WHERE id = {0} RETURNING id, NULL"


@dataclass(frozen=True)
class Race:
    """A schedule of the two stores: its name, what happens, and the steps."""

    name: str
    story: str
    steps: Callable[[Scratch], None]


def _late_image(*writes: str) -> Callable[[Scratch], None]:
    """Writes that are offered after the rows were read and before their old images are loaded."""

    def steps(scratch: Scratch) -> None:
        scratch.read()
        for statement in writes:
            scratch.write(statement)
        scratch.offer()
        scratch.load()

    return steps


def _skew(scratch: Scratch) -> None:
    scratch.read()
    scratch.write(DELETE.format(1))
    scratch.load(meanwhile=scratch.offer)


def _out_of_order(scratch: Scratch) -> None:
    scratch.read()
    scratch.load()
    scratch.write(UPDATE.format(1, "older"))
    scratch.write(DELETE.format(1))
    scratch.offer(backwards=True)


def _truncate(scratch: Scratch) -> None:
    scratch.read()
    scratch.truncate()
    scratch.load()


RACES = (
    Race("ghost", "a row is read, then deleted in both stores, then its old image is loaded", _late_image(DELETE.format(1))),
    Race("write skew", "a row is deleted while the loader that brings its old image has not committed", _skew),
    Race("late update", "a row is read, then updated in both stores, then its old image is loaded",
         _late_image(UPDATE.format(1, "newer"))),
    Race("out of order", "a row is updated and then deleted, and the update comes last", _out_of_order),
    Race("reinsert", "a row is read, then deleted and inserted anew, then its old image is loaded",
         _late_image(DELETE.format(1), INSERT.format(1, "again"))),
    Race("key move", "a row is read, then moves to another key, then its old image is loaded",
         _late_image(DELETE.format(1), INSERT.format(9, "seed 1"))),
    Race("truncate", "a table is read, then truncated, then its old rows are loaded", _truncate),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How one race ended: keys and rows that differ between the stores, with tombstones and without."""

    race: str
    story: str
    with_tombstones: Sequence[str]
    without: Sequence[str]


def as_table(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes for a person, and the sentence for a colleague in doubt.

    Args:
        outcomes: How each race ended.

    Returns:
        The lines, with line breaks between.
    """
    lines = []
    for outcome in outcomes:
        with_tombstones, without = (", ".join(wrong) or "equal" for wrong in (outcome.with_tombstones, outcome.without))
        lines.append(f"{outcome.race:12}  {with_tombstones:12}  {without:12}  {outcome.story}")
    wrong = sum(bool(outcome.without) for outcome in outcomes)
    lost = sum(bool(outcome.with_tombstones) for outcome in outcomes)
    verdict = f"{lost} of {len(outcomes)} races end differently with tombstones, {wrong} without"
    return "\n".join(
        [f"{'race':12}  {'tombstones':12}  {'without':12}  what happens", *lines, "", f"{verdict}, on these two servers."]
    )


def prove(spec: Spec) -> list[Outcome]:
    """Run every race both ways on the spec's old store and its PostgreSQL target (driver).

    Args:
        spec: The migration's spec.

    Returns:
        How each race ended, with tombstones and without.

    Raises:
        UsageError: No target is PostgreSQL.
        ServerUnavailable: A store can't be reached.
        DatabaseFailed: A role may not create a schema.
    """
    target = next((candidate for candidate in spec.targets.values() if candidate.kind == "postgres"), None)
    if target is None:
        raise UsageError("prove: no target of the spec is PostgreSQL; a lake has its gate in MERGE, which verify judges")
    old, new = spec.source.dsn.resolve(), target.dsn_value
    return [Outcome(race.name, race.story, _run(spec, old, new, race, True), _run(spec, old, new, race, False)) for race in RACES]


def _run(spec: Spec, old: str, new: str, race: Race, tombstones: bool) -> list[str]:
    with _scratch(spec, old, new, tombstones) as scratch, speaking_to(new, f"proving {race.name}"):
        race.steps(scratch)
        scratch.close()
        source, target = dict(rows_of(scratch.old, scratch.table)), dict(rows_of(scratch.new, scratch.gated.table))
    return [
        f"{kind} {key}"
        for kind, keys in (
            ("extra", target.keys() - source.keys()),
            ("missing", source.keys() - target.keys()),
            ("stale", {key for key in source.keys() & target.keys() if source[key] != target[key]}),
        )
        for key in sorted(keys)
    ]


@contextmanager
def _scratch(spec: Spec, old: str, new: str, tombstones: bool) -> Iterator[Scratch]:
    """Make the table in both stores, which may be one database, and remove all of it again."""
    name = f"changeover_prove_{secrets.token_hex(4)}"
    application = application_name(spec.name, "prove")
    with ExitStack() as held:
        old_session, new_session = _side(held, old, application, f"{name}_old"), _side(held, new, application, f"{name}_new")
        table = sql.Identifier(f"{name}_old", TABLE)
        old_session.execute(sql.SQL(SEED).format(rows=table))
        start = wal_position(old_session)
        present = one_row(new_session.execute("SELECT to_regnamespace('changeover') IS NOT NULL"))
        gated = gate.GatedTable(f"{name}_new", TABLE, ("id",), ("id", "note"))
        with speaking_to(new, "installing the gate of the scratch table"):
            if not present[0]:
                held.callback(new_session.execute, "DROP SCHEMA changeover")
            held.callback(gate.remove, new_session, f"{name}_new", TABLE)
            gate.install(new_session, gated, image_version(start))
        yield Scratch(old_session, new_session, new, table, gated, tombstones)


def _side(held: ExitStack, dsn: str, application: str, schema: str) -> Connection:
    side = held.enter_context(connect(dsn, application))
    with speaking_to(dsn, "making the scratch schema"):
        side.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        held.callback(side.execute, sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
        side.execute(sql.SQL("CREATE TABLE {} (id bigint PRIMARY KEY, note text)").format(sql.Identifier(schema, TABLE)))
    return side
