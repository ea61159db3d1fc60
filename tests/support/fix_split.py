"""A migration whose tenants are at two stores, as prepare and fences leave it, made by plain SQL and without Spark.

Both stores, the ledger, the path back and both spools are real; what the streams held is appended to the spools as capture does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from changeover.jobs.ledger.epochs import OLD
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import CLOSED, Stream
from changeover.jobs.reverse import path as reverse
from changeover.jobs.source import snapshot
from changeover.jobs.spool.events import Event
from changeover.jobs.spool.table import Spool, spool_of
from changeover.position import format_lsn, image_version
from changeover.session import Connection, connect
from changeover.spec import Spec, load
from changeover.stores.postgres.gate import install_gate

SPLIT_SPEC = """
name = "{name}"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "follows"
target = "links"
key = ["a", "b"]
[table.columns]
a = "who"
b = "whom"
[flag]
key = "f"
target = "store"
context = "who"
[work]
path = "{work}"
"""


@dataclass
class Split:
    """The migration, with an administrator's session to each database."""

    spec: Spec
    old: Connection
    new: Connection
    ledger: Ledger

    def move(self, store: str, from_lsn: int, new_lsn: int, *tenants: str) -> None:
        """Record a move of authority, of all rows unless tenants are named."""
        epoch = 1 + max((one.epoch for one in self.ledger.authorities()), default=0)
        self.ledger.connection.execute(
            "INSERT INTO changeover.authority (migration, epoch, store, from_lsn, pause_seconds, new_lsn, tenants)"
            " VALUES (%s, %s, %s, %s, 0.1, %s, %s)",
            [self.spec.name, epoch, store, format_lsn(from_lsn), format_lsn(new_lsn), list(tenants) or None],
        )

    def spool(self, store: str) -> Spool:
        """Return the spool of a store's stream."""
        return spool_of(self.spec) if store == OLD else reverse.spool_of(self.spec)

    def write(
        self, store: str, lsn: int, op: str, row: Mapping[str, str] | None, *, key: Mapping[str, str] | None = None,
        note: str | None = None,
    ) -> None:  # fmt: skip
        """Have a store's stream hold one change, of a transaction of its own."""
        images = [None if image is None else (tuple(image), tuple(image.values())) for image in (row, key)]
        relation = "public.follows" if store == OLD else "public.links"
        self.spool(store).append([Event(relation, lsn, 0, op, images[0], images[1], (), lsn, lsn, note)], lsn + 1)


def loads(spec: Spec) -> Sequence[tuple[str, str]]:
    """Return each load of a spec."""
    return [(table.source, target) for table in spec.tables for target in spec.targets]


@pytest.fixture
def split(old_dsn: str, new_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Split]:
    """Yield a migration that is loaded and closed; the old store has all authority."""
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", new_dsn)
    name, path = f"t{random.getrandbits(40):x}", tmp_path / "spec.toml"
    path.write_text(SPLIT_SPEC.format(name=name, work=tmp_path / "work"))
    spec = load(path)
    with connect(old_dsn, "test") as old, connect(new_dsn, "test") as new, Ledger.open(spec, "test") as ledger:
        old.execute("CREATE TABLE follows (who integer, whom integer, note text, PRIMARY KEY (who, whom))")
        new.execute("CREATE TABLE links (a integer, b integer, note text, PRIMARY KEY (a, b))")
        ledger.create()
        system_id, timeline = snapshot.identify(old_dsn, "test")
        ledger.record_migration(spec, Stream(1, system_id, timeline, spec.slot, spec.slot, "", ""))
        ledger.record_table("follows", 0, ())
        for source, target in loads(spec):
            ledger.record_load(source, target, 1, False)
            ledger.set_state(source, target, CLOSED, 0)
        install_gate(new, "public", "links", ["a", "b"], image_version(1))
        spool_of(spec).create()
        yield Split(spec, old, new, ledger)
