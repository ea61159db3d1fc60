"""The reverse path on real servers: opened, watched, opened anew, taken away; and what bears the mark of our own writes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from ldclient.migrations.types import Stage
from psycopg import sql

from changeover.cli.main import main
from changeover.errors import CouldNotFinish, FenceCalledOff, SlotBlocked
from changeover.flags import flagfile
from changeover.flags.cutover import commands as cutover
from changeover.flags.fence import drain, fence
from changeover.jobs import restart
from changeover.jobs.capture.rogue import rogue
from changeover.jobs.capture.service import capture_new
from changeover.jobs.ledger.ledger import Ledger
from changeover.jobs.ledger.records import NEW, OLD_STORE, Stream
from changeover.jobs.preflight import obstacles
from changeover.jobs.reverse import path as reverse
from changeover.jobs.reverse import setup as reverse_setup
from changeover.jobs.source import partitions, replication, snapshot
from changeover.jobs.source.marker import emit_marker
from changeover.jobs.spool.table import remove_spools, spool_of
from changeover.jobs.status import status
from changeover.position import epoch_floor, format_lsn, image_version
from changeover.session import Connection, connect
from changeover.spec import Spec, load
from changeover.stores.postgres.batches import BATCH, apply_batch, prepare_batch
from changeover.stores.postgres.gate import gated, install_gate, sweep
from changeover.verifiers.explain import explain
from tests.support.fix_postgres import default_binaries, fresh_database, passing_server

SPEC = """
name = "{name}"
[source]
dsn = "env:OLD_DSN"
[target.store]
kind = "postgres"
dsn = "env:NEW_DSN"
[[table]]
source = "follows"
target = "links"
key = ["a"]
[table.columns]
a = "id"
upper = "upper(name)"
{reverse}
[flag]
key = "f"
target = "store"
[work]
path = "{work}"
"""


@dataclass
class Stores:
    """A migration as prepare leaves it, made by plain SQL, without Spark."""

    spec: Spec
    old: Connection
    new: Connection
    ledger: Ledger
    path: Path

    def state(self, reverse_section: str) -> None:
        """State reverse replication in the spec."""
        self.path.write_text(SPEC.format(name=self.spec.name, work=self.spec.work, reverse=reverse_section))
        self.spec = load(self.path)

    def captured(self) -> list[dict[str, Any]]:
        """Return the changes in the new store's spool, everything committed by now included."""
        emit_marker(self.new, note := f"end {random.random()}")
        spool = reverse.spool_of(self.spec)
        capture_new(self.spec, threading.Event(), until=lambda: note in spool.events().column("note").to_pylist())
        rows: list[dict[str, Any]] = spool.events().to_pylist(maps_as_pydicts="strict")
        return [row for row in rows if row["relation"]]

    def slots(self) -> list[str]:
        """Return the new store's slots."""
        rows = self.new.execute("SELECT slot_name FROM pg_replication_slots WHERE database = current_database()").fetchall()
        return [row[0] for row in rows]


@pytest.fixture
def stores(old_dsn: str, any_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stores]:
    monkeypatch.setenv("OLD_DSN", old_dsn)
    monkeypatch.setenv("NEW_DSN", any_dsn)
    name, path = f"t{random.getrandbits(40):x}", tmp_path / "spec.toml"
    path.write_text(SPEC.format(name=name, work=tmp_path / "work", reverse=""))
    spec = load(path)
    with connect(old_dsn, "test") as old, connect(any_dsn, "test") as new, Ledger.open(spec, "test") as ledger:
        old.execute("CREATE TABLE follows (id integer PRIMARY KEY, name text)")
        new.execute("CREATE TABLE links (a integer PRIMARY KEY, upper text)")
        ledger.create()
        system_id, timeline = snapshot.identify(old_dsn, "test")
        ledger.record_migration(spec, Stream(1, system_id, timeline, spec.slot, spec.slot, "", ""))
        install_gate(new, "public", "links", ["a"], image_version(1))
        spool_of(spec).create()
        yield Stores(spec, old, new, ledger, path)


GIVEN = '[table.reverse]\nname = "lower(upper)"'


def test_without_reverse_replication_the_mirror_is_left_and_everybody_is_told(stores: Stores) -> None:
    [note] = obstacles.notes(stores.spec)
    assert note == (
        "follows has no reverse replication from links: nothing gives its column name (state it in [table.reverse] as an expression"
        " over the row of links); until then nothing keeps the old store up to date after the fence"
    )
    assert reverse_setup.open_path(stores.spec, stores.ledger) is None
    assert stores.slots() == []
    state = reverse.state(stores.spec, stores.ledger)
    assert state is not None
    assert state.line.startswith("nothing keeps the old store up to date: follows has no reverse replication")
    stores.state(GIVEN)
    assert obstacles.notes(stores.spec) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("ALTER TABLE links DROP CONSTRAINT links_pkey", "public.links has no primary key and no replica identity"),
        ("CREATE TABLE more () INHERITS (links)", "public.links takes part in inheritance"),
        (
            "DROP TABLE links; CREATE TABLE links (a integer PRIMARY KEY, upper text) PARTITION BY RANGE (a);"
            " CREATE TABLE low PARTITION OF links FOR VALUES FROM (0) TO (9); ALTER TABLE low REPLICA IDENTITY NOTHING",
            "low, a partition of public.links, has the replica identity (none) and not (a)",
        ),
    ],
)
def test_a_table_whose_changes_can_not_be_told_has_no_reverse_replication(stores: Stores, change: str, reason: str) -> None:
    stores.state(GIVEN)
    stores.new.execute('DROP FUNCTION IF EXISTS changeover."gate_public.links"')
    stores.new.execute(change.encode())
    assert any(reason in one for one in obstacles.notes(stores.spec))
    assert reverse_setup.open_path(stores.spec, stores.ledger) is None


def test_the_path_is_opened_once_watched_and_taken_away(stores: Stores) -> None:
    stores.state(GIVEN)
    path = reverse_setup.open_path(stores.spec, stores.ledger)
    assert path is not None
    assert stores.slots() == [path.slot] == [f"changeover__new_{stores.spec.name}"]
    assert reverse_setup.open_path(stores.spec, stores.ledger) == path
    stores.new.execute("INSERT INTO links VALUES (1, 'X')")
    assert [event["row"] for event in stores.captured()] == [{"a": "1", "upper": "X"}]
    stores.ledger.advance("follows", OLD_STORE, path.l0 + 8, 3, 0, NEW)

    lose_slot(stores)
    again = reverse_setup.open_path(stores.spec, stores.ledger)
    assert again is not None
    assert again.l0 > path.l0, "another stream, from now on"
    stores.new.execute("INSERT INTO links VALUES (2, 'Y')")
    assert [event["row"]["a"] for event in stores.captured()] == ["1", "2"], "what was spooled is kept"
    [load_] = stores.ledger.loads(NEW)
    assert (load_.target, load_.applied, load_.events) == (OLD_STORE, again.l0, 3)

    assert reverse_setup.leftovers(stores.spec) != []
    removed = reverse_setup.remove(stores.spec, stores.ledger)
    assert len(removed) == 3
    assert reverse_setup.leftovers(stores.spec) == stores.slots() == []
    assert not reverse.spool_of(stores.spec).path.exists()
    assert reverse.recorded(stores.ledger) is None


def test_a_publication_that_was_altered_and_put_back_breaks_the_path_off(stores: Stores) -> None:
    stores.state(GIVEN)
    path = reverse_setup.open_path(stores.spec, stores.ledger)
    assert path is not None
    assert reverse_setup.lacking(stores.spec, stores.ledger) is reverse_setup.gap_in(stores.spec, stores.ledger, stores.new) is None
    for statement in ("ALTER PUBLICATION {} DROP TABLE links", "ALTER PUBLICATION {} ADD TABLE ONLY links"):
        stores.new.execute(sql.SQL(statement).format(sql.Identifier(path.publication)))
    gap = "the new store's change stream has a gap (publication of public.links), and the next fence begins another one"
    assert reverse_setup.gap_in(stores.spec, stores.ledger, stores.new) == gap
    broken = reverse.recorded(stores.ledger)
    assert broken is not None
    assert broken.broken == gap
    again = reverse_setup.open_path(stores.spec, stores.ledger)
    assert again is not None
    assert again.l0 > path.l0
    stores.new.execute("ALTER TABLE links DROP CONSTRAINT links_pkey; ALTER TABLE links ADD PRIMARY KEY (a)")
    with pytest.raises(CouldNotFinish, match="gap"):
        capture_new(stores.spec, threading.Event())
    lost = reverse.recorded(stores.ledger)
    assert lost is not None
    assert "key of links" in (lost.broken or "")


def test_an_open_transaction_holds_up_the_path_and_is_named(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    stores.state(GIVEN)
    monkeypatch.setattr(snapshot.create_slot, "__kwdefaults__", {"temporary": False, "seconds": 0.5})
    with connect(stores.spec.targets["store"].dsn_value, "slow", autocommit=False) as slow:
        slow.execute("INSERT INTO links VALUES (5, 'slow')")
        with pytest.raises(SlotBlocked, match="process"):
            reverse_setup.open_path(stores.spec, stores.ledger)
    assert stores.slots() == []
    assert reverse_setup.open_path(stores.spec, stores.ledger) is not None, "what a failed one left is no hindrance"


def test_our_writes_are_marked_and_others_to_a_store_without_authority_are_rogue(stores: Stores) -> None:
    stores.state(GIVEN)
    stores.new.execute("INSERT INTO links VALUES (9, 'before it is watched')")
    reverse_setup.open_path(stores.spec, stores.ledger)
    table = gated(stores.new, "public", "links", ["a"])
    mirror = sql.SQL("SELECT {}(0, '0/9', -1, %s, ROW(%s, 'MIRROR')::links)").format(table.function)
    stores.new.execute(mirror, [False, 1])
    stores.new.execute(mirror, [True, 9])
    with stores.new.transaction(), stores.new.cursor() as cursor:
        prepare_batch(cursor, table, versions=True)
        cursor.execute(sql.SQL("INSERT INTO {} VALUES (0, '0/99', 0, false, 2, 'REPLAY')").format(BATCH))
        apply_batch(cursor, table)
    stores.new.execute("INSERT INTO links VALUES (77, 'ghost')")
    stores.new.execute(sql.SQL("INSERT INTO {} VALUES (77, 0, '0/1', 0, true)").format(table.row_versions))
    sweep(stores.new, table)
    assert [(event["op"], event["note"]) for event in stores.captured()] == [
        ("I", "mirror"), ("D", "mirror"), ("I", "changes"), ("I", None), ("D", "sweep"),
    ]  # fmt: skip
    [found] = rogue(stores.spec, stores.ledger)
    assert (found.store, found.table, found.changes) == ("new", "public.links", 1)
    told = {"positions": {"source_lsn": 2**60, "target": "FFFF/0"}}
    stores.ledger.record_verdict("follows", "store", "different", None, told)
    assert rogue(stores.spec, stores.ledger) == [found]
    stores.ledger.record_verdict("follows", "store", "equal", None, told)
    assert rogue(stores.spec, stores.ledger) == []


def test_a_rolled_back_write_and_one_beside_the_tables_are_no_rogue(stores: Stores) -> None:
    stores.state(GIVEN)
    reverse_setup.open_path(stores.spec, stores.ledger)
    stores.new.execute("CREATE TABLE elsewhere (x integer)")
    stores.new.execute("INSERT INTO elsewhere VALUES (1)")
    with stores.new.transaction(force_rollback=True):
        stores.new.execute("INSERT INTO links VALUES (1, 'X')")
    with pytest.raises(psycopg.Error), stores.new.transaction():
        stores.new.execute("INSERT INTO links VALUES (2, 'X'), (2, 'X')")
    install_gate(stores.new, "public", "links", ["a"], epoch_floor(0))
    assert stores.captured() == []
    assert rogue(stores.spec, stores.ledger) == []


# -- a partitioned new table

PARTED = """
DROP TABLE links;
CREATE TABLE links (a integer PRIMARY KEY, upper text) PARTITION BY RANGE (a);
CREATE TABLE links_low PARTITION OF links FOR VALUES FROM (0) TO (100);
CREATE TABLE links_high PARTITION OF links FOR VALUES FROM (100) TO (200);
CREATE TABLE aside (a integer PRIMARY KEY, upper text);
INSERT INTO aside VALUES (300, 'ASIDE')
"""


@pytest.fixture
def parted(stores: Stores) -> Stores:
    """Return stores whose new table is partitioned, with a path that is open, and authority with the new store."""
    stores.new.execute('DROP FUNCTION changeover."gate_public.links"')
    stores.new.execute(PARTED)
    install_gate(stores.new, "public", "links", ["a"], image_version(1))
    live(stores)
    return stores


def told(stores: Stores) -> list[tuple[Any, ...]]:
    return [(event["relation"], event["op"], (event["row"] or event["key"] or {}).get("a")) for event in stores.captured()]


def test_changes_of_a_new_tables_partitions_are_the_tables(parted: Stores) -> None:
    name = "public.links"
    assert obstacles.notes(parted.spec) == []
    parted.new.execute("INSERT INTO links VALUES (150, 'HIGH'); UPDATE links SET a = 151 WHERE a = 1")
    parted.new.execute(
        "CREATE TABLE links_new PARTITION OF links FOR VALUES FROM (200) TO (300); INSERT INTO links VALUES (250, 'N')"
    )
    moved = [("D", "1"), ("I", "151")]
    assert told(parted) == [(name, "I", "1"), (name, "I", "150"), *[(name, *one) for one in moved], (name, "I", "250")]
    parted.new.execute("TRUNCATE links")
    assert told(parted)[-1] == (name, "T", None)
    assert reverse_setup.lacking(parted.spec, parted.ledger) is None
    parts = partitions.recorded(parted.ledger, name, NEW)
    assert parts is not None
    assert [part.name for part in parts] == ["public.links_high", "public.links_low", "public.links_new"]
    parted.new.execute("TRUNCATE links_low")
    assert told(parted)[-1] == (name, "R", None), "the rows of one partition alone, which none can tell"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("ALTER TABLE links DETACH PARTITION links_low", "its partition public.links_low was detached or dropped"),
        (
            "ALTER TABLE links ATTACH PARTITION aside FOR VALUES FROM (300) TO (400)",
            "the partition public.aside was attached to it",
        ),
    ],
)
def test_a_partition_that_comes_or_goes_without_an_event_breaks_the_path_off(parted: Stores, change: str, reason: str) -> None:
    assert len(told(parted)) == 1
    parted.new.execute(change.encode())
    if "DETACH" in change:
        with pytest.raises(CouldNotFinish, match="its change stream has a gap"):
            capture_new(parted.spec, threading.Event())
    done = cutover.rollback(parted.spec)
    assert done.lacking is not None
    assert done.lacking.startswith(f"the new store's change stream has a gap (partitions of public.links: {reason}")


def test_a_partition_that_goes_at_the_last_moment_calls_reverse_replication_off(
    parted: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(told(parted)) == 1
    parted.ledger.advance("follows", OLD_STORE, 2**60, 1, 0, NEW)  # as far as anybody can see, everything came back
    near = drain.draw_near

    def detached_behind_it(*arguments: Any) -> str | None:
        found = near(*arguments)
        parted.new.execute("ALTER TABLE links DETACH PARTITION links_low")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(fence, "draw_near", detached_behind_it)
        with pytest.raises(FenceCalledOff, match=r"waiting for a whole stream: .* gap \(partitions of public.links: "):
            cutover.rollback(parted.spec)
    parted.new.execute("INSERT INTO links VALUES (150, 'writers go on')")
    assert parted.ledger.authority().store == "new"
    assert cutover.rollback(parted.spec).lacking is not None


# -- a path that can't go on


def hand_over(stores: Stores, epoch: int, store: str) -> int:
    """Put on record that authority has moved now, as a fence does; return the position in the new store's log."""
    row = stores.new.execute("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint").fetchone()
    assert row is not None
    stores.ledger.connection.execute(
        "INSERT INTO changeover.authority (migration, epoch, store, from_lsn, new_lsn) VALUES (%s, %s, %s, '0/1', %s)",
        [stores.spec.name, epoch, store, format_lsn(row[0])],
    )
    return int(row[0])


def lose_slot(stores: Stores) -> None:
    assert snapshot.drop_slot(stores.new, replication.slot_of(stores.spec))


LOST = "the new store's change stream has a gap (replication slot), and the next fence begins another one"


def live(stores: Stores) -> None:
    """Have the path open, authority with the new store, and something written to it."""
    stores.state(GIVEN)
    assert reverse_setup.open_path(stores.spec, stores.ledger) is not None
    hand_over(stores, 1, "new")
    flagfile.write_stage(stores.spec.work / "flags.json", "f", Stage.LIVE)
    stores.new.execute("INSERT INTO links VALUES (1, 'X')")


def test_a_lost_slot_breaks_the_path_off_and_everybody_is_told(stores: Stores) -> None:
    live(stores)
    assert [event["op"] for event in stores.captured()] == ["I"]
    assert [event["version"][:2] for event in explain(stores.spec, ["1"]).parts["events of the new store"]] == ["1:"]
    assert reverse.whole(stores.ledger) is None
    lose_slot(stores)
    with pytest.raises(CouldNotFinish, match="its change stream has a gap, so nothing keeps the old store up to date"):
        capture_new(stores.spec, threading.Event())
    assert reverse.whole(stores.ledger) == LOST
    assert capture_new(stores.spec, threading.Event()) is None, "there is nothing to follow any more"
    assert f"  reverse   nothing keeps the old store up to date: {LOST}" in list(status(stores.spec).lines())
    done = CliRunner().invoke(main, ["flags", "rollback", stores.spec.path])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("live → shadow (epoch 2, writers were held up ")
    assert done.stdout.endswith(
        f"; every write since the new store has authority lost, since nothing brought the old store up to date ({LOST})\n"
    )
    again = reverse_setup.open_path(stores.spec, stores.ledger)
    assert again is not None
    assert again.broken is None
    assert stores.slots() == [again.slot]


@pytest.mark.parametrize("lost_after", [0.0, 2.0])
def test_a_rollback_sees_by_itself_that_the_slot_is_lost(stores: Stores, lost_after: float) -> None:
    live(stores)
    losing = threading.Timer(lost_after, lose_slot, [stores])
    losing.start()
    if not lost_after:
        losing.join()
    began = time.monotonic()
    done = cutover.rollback(stores.spec)  # capture is down: nobody else would notice, and nothing comes back
    assert lost_after <= time.monotonic() - began < 45
    assert (done.epoch, done.lacking) == (2, LOST)
    assert stores.ledger.authority().store == "old"
    stores.old.execute("INSERT INTO follows VALUES (1, 'writers go on')")
    with pytest.raises(psycopg.Error, match="no authority"):
        stores.new.execute("INSERT INTO links VALUES (2, 'Y')")


def test_rogue_writes_are_told_while_a_new_epoch_is_begun(stores: Stores) -> None:
    stores.state(GIVEN)
    reverse_setup.open_path(stores.spec, stores.ledger)
    stores.new.execute("INSERT INTO links VALUES (1, 'X')")
    assert len(stores.captured()) == 1
    before = rogue(stores.spec, stores.ledger)
    assert [(found.store, found.changes) for found in before] == [("new", 1)]
    [event] = explain(stores.spec, ["01"]).parts["events of the new store"]
    assert (event["op"], event["row"], event["standing"][:6]) == ("I", {"a": "1", "upper": "X"}, "rogue:")
    assert restart._begin(stores.ledger) == 1
    assert rogue(stores.spec, stores.ledger) == before
    page = list(status(stores.spec).lines())
    assert f"  rogue     {before[0]}" in page
    assert any(line.startswith("  prepare   epoch 1 is begun: run `changeover prepare SPEC` to its end (20") for line in page)
    remove_spools(stores.spec.work)
    assert rogue(stores.spec, stores.ledger) == before, "what is left of the two spools is still looked at"
    told = explain(stores.spec, ["1"]).parts
    assert (told["source row"], told["store row"]) == ("none", {"a": 1, "upper": "X"})
    assert told["spooled events"] == "none is told while `prepare --anew` is on its way to epoch 1: run it again to its end"
    reverse_setup.remove(stores.spec, stores.ledger)
    assert rogue(stores.spec, stores.ledger) == [], "as far as a new epoch is made, nothing of the old one counts"


@contextmanager
def restored(stores: Stores, dsn: str) -> Iterator[Stores]:
    """Put the new store, and the ledger that stands in it, into another server's database, as a dump and its restore do."""
    with connect(dsn, "test") as new, Ledger.open(stores.spec, "test") as ledger:
        new.execute("CREATE TABLE links (a integer PRIMARY KEY, upper text)")
        ledger.create()
        install_gate(new, "public", "links", ["a"], image_version(1))
        for name in ("migration", "stream", "load", "authority"):
            table = sql.Identifier("changeover", name)
            with (
                stores.new.cursor().copy(sql.SQL("COPY {} TO STDOUT").format(table)) as dumped,
                new.cursor().copy(sql.SQL("COPY {} FROM STDIN").format(table)) as loading,
            ):
                for data in dumped:
                    loading.write(data)
        yield replace(stores, new=new, ledger=ledger)


def test_a_path_on_a_restored_server_begins_afresh(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    stores.state(GIVEN)
    assert reverse_setup.open_path(stores.spec, stores.ledger) is not None
    reached = before_the_restore(stores)
    with passing_server(default_binaries()) as server, fresh_database(server, "new") as dsn:
        monkeypatch.setenv("NEW_DSN", dsn)
        with restored(stores, dsn) as there:
            after_the_restore(there, reached)


def before_the_restore(stores: Stores) -> int:
    """Have authority move to the new store and back, and much be written that the restored server has never seen."""
    stores.new.execute("SELECT pg_logical_emit_message(false, 'noise', repeat('x', 1000)) FROM generate_series(1, 20000)")
    hand_over(stores, 1, "new")
    stores.new.execute("INSERT INTO links VALUES (1, 'X')")
    assert len(stores.captured()) == 1
    hand_over(stores, 2, "old")
    reached = reverse.spool_of(stores.spec).end()
    stores.ledger.advance("follows", OLD_STORE, reached, 1, 0, NEW)
    return reached


def after_the_restore(stores: Stores, reached: int) -> None:
    running = reverse.spool_of(stores.spec)
    assert running.end() == reached  # as replay looks at it, in a process of its own
    path = reverse_setup.open_path(stores.spec, stores.ledger)
    assert path is not None
    assert path.l0 < reached, "the restored server's positions are below those that were seen"
    assert [load_.applied for load_ in stores.ledger.loads(NEW)] == [path.l0], "else all below would never be offered"
    running.reopen()
    assert running.end() == 0
    stores.new.execute("INSERT INTO links VALUES (2, 'rogue')")
    hand_over(stores, 3, "new")
    stores.new.execute("INSERT INTO links VALUES (3, 'Y')")
    assert [event["row"]["a"] for event in stores.captured()] == ["2", "3"], "nothing of the server that is gone"
    assert reverse.carried(path, stores.ledger.authorities()) == {3}, "the first epoch's positions are of another log"
    assert reverse.whole(stores.ledger) is None
    assert [(found.store, found.changes) for found in rogue(stores.spec, stores.ledger)] == [("new", 1)]
