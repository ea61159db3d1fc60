"""Fixtures for whole migrations: a table of follows with nasty values, its spec, and both targets, all of them real.

`make_migration` builds one from any DDL and spec; `migration` is the table of follows. What a store holds is told as Python
values by psycopg and by Arrow, never by the product's own readers, so that a test's judge is not the judged.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from psycopg import sql
from pyspark.sql import DataFrame, SparkSession

from changeover.demo.schema import DDL
from changeover.jobs import finalize
from changeover.jobs import prepare as preparing
from changeover.jobs.apply.rounds import Replayed, replay
from changeover.jobs.capture.service import capture
from changeover.jobs.install.leftovers import leftovers
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import ChunkRow
from changeover.jobs.load.copier import Loaded, backfill
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.spool.table import Spool, spool_of
from changeover.session import Connection, connect
from changeover.spec import Spec, load
from changeover.stores.base.interface import Mark, Store, TargetTable
from changeover.stores.delta.store import live_rows
from changeover.stores.postgres.refusal import TRIGGERS
from changeover.verifiers.compare.verdict import Verdict
from changeover.verifiers.verification import verify

ROWS = 2000
CHUNKS = 3
"""Fewer than the product plans at least: an append to Delta costs a Spark job."""

FOLLOWS = f"{DDL}; ALTER TABLE public.follows ALTER created_at SET DEFAULT now(), ALTER updated_at SET DEFAULT now()"
"""The demo's table; a test writes rows without the two times."""

NASTY_ROWS = r"""
INSERT INTO follows (from_user, to_channel, notify, note, weight, score, tags, levels, blocked_on, created_at, settings, credit)
SELECT i %% 100 + 1, i / 100 + 1, i %% 3 = 0,
    CASE i %% 7 WHEN 0 THEN NULL WHEN 1 THEN '' WHEN 2 THEN 'NULL' WHEN 3 THEN 'Zoë ☂ "q" \ back'
        WHEN 4 THEN E'two\nlines\tand tab\r' ELSE '\N' || i END,
    CASE WHEN i %% 11 = 0 THEN NULL ELSE (i::numeric / 7)::numeric(12,4) END,
    CASE i %% 13 WHEN 0 THEN 'NaN' WHEN 1 THEN '-0.0' WHEN 2 THEN 'Infinity' ELSE i / 3.0 END,
    CASE i %% 5 WHEN 0 THEN NULL WHEN 1 THEN '{}' WHEN 2 THEN ARRAY['a,b', NULL, '', 'NULL', 'q"x\y'] ELSE ARRAY['t' || i] END,
    CASE i %% 4 WHEN 0 THEN NULL WHEN 1 THEN '{1,NULL,3}' ELSE ARRAY[i] END,
    CASE WHEN i %% 6 = 0 THEN NULL ELSE to_char(timestamp '2016-01-01' + i * interval '7 minutes', 'YYYY-MM-DD HH24:MI:SS') END,
    timestamptz '2015-01-01 00:00:00Z' + i * interval '61.000003 seconds', jsonb_build_object('i', i, 'x', 'é'),
    i * 1000000000000000000000000.000100
FROM generate_series(0, %(rows)s::integer - 1) i
"""

FOLLOWS_TABLE = """
[[table]]
source = "public.follows"
target = "associations"
key = ["entity_a", "kind", "entity_b"]
[table.columns]
entity_a = "from_user"
kind = "'follows'"
entity_b = "to_channel"
blocked_on = "to_timestamp(blocked_on)"
"""

STORE, LAKE = "store", "lake"

TARGETS = {
    STORE: '[target.store]\nkind = "postgres"\ndsn = "env:NEW_DSN"\n',
    LAKE: '[target.lake]\nkind = "delta"\npath = "{folder}/lake"\n',
}

SOURCE_IMAGE = """
SELECT from_user, 'follows', to_channel, notify, note, weight, score, tags, levels,
    to_timestamp(blocked_on, 'YYYY-MM-DD HH24:MI:SS'), created_at, updated_at, settings::text, credit::text FROM follows
"""

STORE_IMAGE = """
SELECT entity_a, kind, entity_b, notify, note, weight, score, tags, levels, blocked_on, created_at, updated_at, settings::text,
    credit::text FROM associations
"""

LAKE_COLUMNS = (
    "entity_a", "kind", "entity_b", "notify", "note", "weight", "score", "tags", "levels", "blocked_on", "created_at",
    "updated_at", "settings", "credit",
)  # fmt: skip

Rows = list[str]
"""Rows as sorted `repr`s, so that NaN equals itself and -0.0 is not 0.0."""


@dataclass
class Migration:
    """A migration with its stores, an administrator's session to each database, and the pipeline's steps."""

    spec: Spec
    spark: SparkSession
    old: Connection
    new: Connection
    markers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def prepare(self) -> None:
        """Run prepare."""
        preparing.prepare(self.spec, self.spark)

    def spool(self) -> Spool:
        """Open the spool of the present epoch."""
        with Ledger.open(self.spec, "test") as ledger:
            return spool_of(self.spec, ledger.stream("test").epoch)

    def capture(self) -> None:
        """Bring everything that the source has committed into the spool."""
        note = f"end {next(self.markers)}"
        emit_marker(self.old, note)
        spool = self.spool()
        capture(self.spec, until=lambda: note in spool.events().column("note").to_pylist())

    def replay(self, *targets: str) -> Replayed:
        """Replay the spool, into some targets or all."""
        return replay(self.spec, self.spark, targets=targets or None)

    def catch_up(self, *targets: str) -> Replayed:
        """Capture and replay."""
        self.capture()
        return self.replay(*targets)

    def backfill(self, *targets: str) -> list[Loaded]:
        """Load all pending chunks, of some targets or all."""
        return backfill(self.spec, self.spark, targets or None)

    def abort(self) -> list[str]:
        """Undo prepare."""
        return finalize.abort(self.spec)

    def leftovers(self) -> list[str]:
        """Return what is left of ours in the old store."""
        return leftovers(self.spec)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Run capture for as long as the block lasts, as the service that it is; its failure is the test's."""
        stop = threading.Event()
        failed: list[BaseException] = []

        def run() -> None:
            try:
                capture(self.spec, stop=stop)
            except BaseException as error:
                failed.append(error)

        service = threading.Thread(target=run, name="capture")
        service.start()
        try:
            yield
        finally:
            stop.set()
            service.join()
        assert not failed, failed

    def verify(self, *targets: str) -> dict[str, Verdict]:
        """Verify targets (all unless named) beside a running capture; return the first table's verdict on each."""
        with self.capturing():
            verdicts = verify(self.spec, self.spark, targets=targets or None)
        return {verdict.target: verdict for verdict in reversed(verdicts)}

    def differences(self, verdict: Verdict) -> list[dict[str, Any]]:
        """Return the rows of the table of differences that a verdict speaks of."""
        rows = DeltaTable(str(self.spec.work / "differences")).to_pyarrow_table(filters=[("run", "=", verdict.run)]).to_pylist()
        return [{n: dict(v) if n in ("key", "source", "target") and v is not None else v for n, v in row.items()} for row in rows]

    def chunks(self, target: str) -> list[ChunkRow]:
        """Return the chunks of the first table's load into a target."""
        with Ledger.open(self.spec, "test") as ledger:
            return ledger.chunks(self.spec.tables[0].source, target)

    def lake(self, name: str = "associations") -> DataFrame:
        """Return the live rows of a table in the lake."""
        return live_rows(self.spark, self.spec.targets[LAKE].folder / name)

    def source_rows(self) -> Rows:
        """Return what the targets should hold, computed by the old store itself."""
        return rows(self.old.execute(SOURCE_IMAGE).fetchall())

    def target_rows(self, target: str) -> Rows:
        """Return what a target holds."""
        if target == STORE:
            return rows(self.new.execute(STORE_IMAGE).fetchall())
        return lake_rows(self.lake().select(*LAKE_COLUMNS))

    def assert_equal(self, *targets: str) -> None:
        """Assert that targets (all unless named) hold what the source does now."""
        expected = self.source_rows()
        for target in targets or self.spec.targets:
            found = self.target_rows(target)
            differing = [row[:200] for row in sorted(set(found) ^ set(expected))[:4]]
            equal = found == expected  # a failure that shows both lists whole shows nothing
            assert equal, f"{target}: {len(found)} rows, {len(expected)} expected: {differing}"


def rows(found: Sequence[tuple[Any, ...]]) -> Rows:
    """Return fetched rows in the form that tests compare."""
    return sorted(repr(tuple(_comparable(value) for value in row)) for row in found)


def _comparable(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value


def lake_rows(frame: DataFrame) -> Rows:
    """Return a frame's rows in the form that tests compare; Arrow keeps zones and microseconds."""
    return rows([tuple(row.values()) for row in frame.toArrow().to_pylist()])


MakeMigration = Callable[..., Migration]


@pytest.fixture
def make_migration(
    old_dsn: str, new_dsn: str, spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeMigration]:
    """Make migrations from the same old database, each with a name, spec and folder of its own."""
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    monkeypatch.setattr("changeover.jobs.load.copier.FEWEST_CHUNKS", CHUNKS)
    with ExitStack() as open_sessions:
        old = open_sessions.enter_context(connect(old_dsn, "test-old"))
        new = open_sessions.enter_context(connect(new_dsn, "test-new"))

        def make(tables: str, *statements: str, targets: Sequence[str] = (STORE, LAKE), kind: str = "slot") -> Migration:
            for statement in statements:
                old.execute(sql.SQL(statement))
            name = f"m{secrets.token_hex(5)}"
            folder = tmp_path / name
            folder.mkdir()
            path = folder / "spec.toml"
            path.write_text(spec_text(name, tables, folder, targets, kind), encoding="utf-8")
            return Migration(load(path), spark, old, new)

        yield make


Read = Callable[[Sequence[int]], DataFrame]


@contextmanager
def unrefused(connection: Connection, table: str) -> Iterator[None]:
    """Take a store's refusal away for the block, as somebody with the right to do so may."""
    name = sql.Identifier(table)
    triggers = [sql.Identifier(f"changeover_refusal{suffix}") for suffix, *_ in TRIGGERS]
    for trigger in triggers:
        connection.execute(sql.SQL("ALTER TABLE {} DISABLE TRIGGER {}").format(name, trigger))
    yield
    for trigger in triggers:
        connection.execute(sql.SQL("ALTER TABLE {} ENABLE ALWAYS TRIGGER {}").format(name, trigger))


def load_one_by_one(monkeypatch: pytest.MonkeyPatch, kind: type[Any], between: Callable[[], object]) -> None:
    """Make a kind of store load its chunks one after the other, with something done after each; all of it is the real loader."""
    load = kind.load

    def one_by_one(store: Store, table: TargetTable, chunks: Sequence[int], read: Read, mark: Mark) -> None:
        for chunk in chunks:
            load(store, table, [chunk], read, mark)
            between()

    monkeypatch.setattr(kind, "load", one_by_one)


def load_after(monkeypatch: pytest.MonkeyPatch, kind: type[Any], meanwhile: Callable[[], object]) -> None:
    """Make a kind of store read all images first and load them after something was done; all of it is the real loader."""
    load = kind.load

    def late(store: Store, table: TargetTable, chunks: Sequence[int], read: Read, mark: Mark) -> None:
        images = {chunk: read([chunk]).persist() for chunk in chunks}
        assert sum(image.count() for image in images.values())
        meanwhile()
        for chunk, image in images.items():
            load(store, table, [chunk], lambda _, image=image: image, mark)
            image.unpersist()

    monkeypatch.setattr(kind, "load", late)


def spec_text(name: str, tables: str, folder: Path, targets: Sequence[str], kind: str = "slot") -> str:
    """Return a spec's text; `kind` is the way of capture."""
    chosen = "".join(TARGETS[target].format(folder=folder) for target in targets)
    ledger = "" if STORE in targets else '[ledger]\ndsn = "env:NEW_DSN"\n'
    source = f'[source]\ndsn = "env:OLD_DSN"\ncapture = "{kind}"\n'
    return f'name = "{name}"\n{source}{chosen}{ledger}{tables}\n[work]\npath = "{folder}"\n'


@pytest.fixture
def migration(make_migration: MakeMigration) -> Migration:
    """Make the migration of follows into both targets, not yet prepared."""
    made = make_migration(FOLLOWS_TABLE, FOLLOWS)
    made.old.execute(NASTY_ROWS, {"rows": ROWS})
    made.old.execute("ANALYZE follows")
    return made
