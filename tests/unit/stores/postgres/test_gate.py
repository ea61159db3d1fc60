"""The gate of a PostgreSQL store against the rule in Python, for any offers in any order, number and batches."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from changeover.errors import CouldNotFinish, LockNotGranted, RowRefused
from changeover.position import Version, epoch_floor, format_lsn, image_version
from changeover.session import Connection, connect
from changeover.stores.base.interface import Counts
from changeover.stores.postgres import batches, gate, refusal
from tests.model.gate import Cell, applies, image_applies, merged

V0 = image_version(100)
TABLE = gate.GatedTable("public", "kept", ("id", "kind"), ("id", "kind", "note"))
KEYS = range(3)

Offer = tuple[int, Cell]
Cells = dict[int, Cell]

versions = st.builds(Version, st.integers(0, 1), st.sampled_from([0, 99, 100, 101, 2**33, 2**64 - 1]), st.integers(-1, 3))


def note_of(version: Version) -> str:
    """One version, one image: what two offers of a version have in common."""
    return f"image of {version}"


@st.composite
def offers(draw: st.DrawFn) -> list[Offer]:
    """Draw offers: few keys and versions, so that they meet; a version is a delete or a put, always the same."""
    drawn = draw(st.lists(st.tuples(st.sampled_from(KEYS), versions), max_size=14))
    return [(key, Cell(v, None if (v.ordinal + key) % 3 == 0 else note_of(v))) for key, v in drawn]


@dataclass
class Kept:
    """A gated table and what a test does to it."""

    connection: Connection
    dsn: str

    def clear(self) -> None:
        self.connection.execute('TRUNCATE kept, changeover."versions_public.kept"; DELETE FROM changeover.gate')
        gate.install(self.connection, TABLE, V0)

    def raise_floor(self, floor: Version) -> None:
        gate.raise_floor(self.connection, TABLE, floor)

    def batch(self, changes: Sequence[Offer], reached: Version | None = None) -> Counts:
        """Offer a batch, one row a key, as replay does; with `reached` its position is the gate."""
        with self.connection.transaction(), self.connection.cursor() as cursor:
            batches.prepare_batch(cursor, TABLE, versions=True)
            cursor.executemany(
                "INSERT INTO pg_temp.changeover_batch VALUES (%s, %s, %s, %s, %s, 'k', %s)",
                [(v.epoch, format_lsn(v.lsn), v.ordinal, image is None, key, image) for key, (v, image) in changes],
            )
            return batches.apply_batch(cursor, TABLE, reached)

    def one(self, key: int, cell: Cell) -> bool:
        """Offer one row as an application does."""
        v, image = cell
        row = self.connection.execute(
            "SELECT changeover.\"gate_public.kept\"(%s, %s, %s, %s, ROW(%s, 'k', %s)::kept)",
            [v.epoch, format_lsn(v.lsn), v.ordinal, image is None, key, image],
        ).fetchone()
        assert row is not None
        return bool(row[0])

    def load(self, images: Sequence[tuple[int, str]]) -> Counts:
        """Load backfill images."""
        with self.connection.transaction(), self.connection.cursor() as cursor:
            batches.prepare_batch(cursor, TABLE, versions=False)
            cursor.executemany("INSERT INTO pg_temp.changeover_batch VALUES (%s, 'k', %s)", images)
            return batches.load_batch(cursor, TABLE)

    def live(self) -> dict[int, object]:
        """Return the images of the live cells."""
        return dict(self.connection.execute("SELECT id, note FROM kept").fetchall())

    def cells(self) -> Cells:
        """Return the cells: versions from their table, images from the table; a tombstone has none."""
        found = self.connection.execute(
            "SELECT coalesce(t.id, k.id), t._changeover_epoch, t._changeover_lsn - '0/0'::pg_lsn, t._changeover_ordinal,"
            " t._changeover_deleted, k.note, k.id IS NOT NULL"
            ' FROM kept k FULL JOIN changeover."versions_public.kept" t USING (id, kind)'
        ).fetchall()
        cells = {}
        for key, epoch, lsn, ordinal, deleted, note, there in found:
            version = V0 if epoch is None else Version(epoch, int(lsn), ordinal)
            assert there is not deleted, "a tombstone has no row, and a live cell has one"
            cells[key] = Cell(version, note if there else None)
        return cells


@pytest.fixture
def kept(new_dsn: str) -> Iterator[Kept]:
    with connect(new_dsn, "test") as connection:
        connection.execute("CREATE TABLE kept (id integer, kind text, note text, PRIMARY KEY (id, kind))")
        gate.install(connection, TABLE, V0)
        yield Kept(connection, new_dsn)


def by_rule(offered: Sequence[Offer], floor: Version, start: Cells | None = None) -> Cells:
    cells = dict(start or {})
    for key, offer in offered:
        cell = merged(cells.get(key), [offer], floor)
        if cell is not None:
            cells[key] = cell
    return cells


def batches_of(offered: Sequence[Offer], size: int) -> list[list[Offer]]:
    """Cut offers into batches, one row a key each: the last by version, as replay collapses them."""
    cut = [offered[i : i + size] for i in range(0, len(offered), size)]
    return [list({key: (key, cell) for key, cell in sorted(batch, key=lambda o: o[1].version)}.values()) for batch in cut]


many = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(offered=offers(), size=st.integers(1, 5), floor=st.sampled_from([V0, Version(0, 101, 0), epoch_floor(1)]))
def test_batches_leave_the_cells_of_the_rule(kept: Kept, offered: list[Offer], size: int, floor: Version) -> None:
    kept.clear()
    kept.raise_floor(floor)
    for batch in batches_of(offered, size):
        kept.batch(batch)
    assert kept.cells() == by_rule(offered, floor)


@many
@given(offered=offers(), floor=st.sampled_from([V0, Version(0, 101, 0)]))
def test_single_rows_are_taken_exactly_when_the_rule_says_so(kept: Kept, offered: list[Offer], floor: Version) -> None:
    kept.clear()
    kept.raise_floor(floor)
    cells: Cells = {}
    for key, offer in offered:
        cell = cells.get(key)
        assert kept.one(key, offer) is applies(offer.version, cell.version if cell else None, floor)
        cells = by_rule([(key, offer)], floor, cells)
    assert kept.cells() == cells


@many
@given(offered=offers(), order=st.randoms(use_true_random=False), size=st.integers(1, 4))
def test_order_repetition_and_mixture_of_ways_change_nothing(kept: Kept, offered: list[Offer], order: object, size: int) -> None:
    kept.clear()
    shuffled = [*offered, *offered[::2]]
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    for number, batch in enumerate(batches_of(shuffled, size)):
        if number % 2:
            kept.batch(batch)
        else:
            for key, cell in batch:
                kept.one(key, cell)
    assert kept.cells() == by_rule(offered, V0)


@many
@given(stream=offers(), direct=offers(), size=st.integers(1, 5))
def test_a_closed_tables_position_is_as_good_a_gate(kept: Kept, stream: list[Offer], direct: list[Offer], size: int) -> None:
    """Batches in the stream's order, a direct write after each, and each batch once more, as after a kill."""
    kept.clear()
    cells: Cells = {}
    floor = V0
    late = iter(direct)
    for batch in batches_of(sorted(stream, key=lambda offer: offer[1].version), size):
        reached = max(cell.version for _, cell in batch)
        assert kept.batch(batch, reached).offered == len(batch)
        cells, floor = by_rule(batch, floor, cells), max(floor, reached)
        for key, cell in [one] if (one := next(late, None)) else []:
            kept.one(key, cell)
            cells = by_rule([(key, cell)], floor, cells)
        assert kept.batch(batch, reached).taken == 0, "offered again, nothing is taken"
    assert kept.live() == {key: cell.image for key, cell in cells.items() if cell.image is not None}


def test_a_new_epoch_begins_on_a_table_that_refuses_since_authority_went_back(kept: Kept) -> None:
    assert refusal.install(kept.connection, "public", "kept", refusal.Refusal(begun=refusal.TenantEpoch(2)), time.monotonic() + 120)
    refusal.replace(kept.connection, "public", "kept", refusal.Refusal((refusal.TenantEpoch(2),)))
    gate.begin_anew(kept.connection, TABLE, Version(3, 50, -1), "the server")
    assert kept.load([(1, "image")]).taken == 1
    kept.batch([(2, Cell(Version(3, 60, 0), None))])
    assert gate.sweep(kept.connection, TABLE) == 0
    with pytest.raises(psycopg.Error, match="no authority"):
        kept.connection.execute("INSERT INTO kept VALUES (3, 'k', 'stale')")
    assert kept.live() == {1: "image"}


def test_a_sweep_that_is_repeated_takes_no_row_that_a_batch_brought_back(kept: Kept) -> None:
    kept.batch([(1, Cell(Version(0, 200, 0), None))])
    kept.batch([(1, Cell(Version(0, 300, 0), "back"))], Version(0, 301, -1))
    assert gate.sweep(kept.connection, TABLE) == 0, "its tombstone is gone: the floor answers for it"
    assert kept.live() == {1: "back"}


def test_a_lock_that_is_held_leaves_the_versions_to_decide(kept: Kept) -> None:
    with connect(kept.dsn, "test") as other, other.transaction(), other.cursor() as cursor:
        batches.lock_shared(cursor, TABLE)
        kept.batch([(1, Cell(Version(0, 200, 0), "a"))], Version(0, 300, -1))
    assert kept.cells() == {1: Cell(Version(0, 200, 0), "a")}
    assert kept.one(2, Cell(Version(0, 250, 0), "b")), "the floor was not raised"


@many
@given(offered=offers(), keys=st.sets(st.sampled_from(KEYS)), late=offers())
def test_an_image_enters_only_where_no_cell_is(kept: Kept, offered: list[Offer], keys: set[int], late: list[Offer]) -> None:
    kept.clear()
    for batch in batches_of(offered, 3):
        kept.batch(batch)
    before = by_rule(offered, V0)
    counts = kept.load([(key, "image") for key in sorted(keys)])
    taken = {key for key in keys if image_applies(before[key].version if key in before else None, V0, V0)}
    refused = {key for key in keys if key in before and before[key].image is None}
    assert counts == Counts(len(keys), len(taken), len(refused))
    cells = {**before, **{key: Cell(V0, "image") for key in taken}}
    assert kept.cells() == cells
    for batch in batches_of(late, 3):
        kept.batch(batch)
    assert kept.cells() == by_rule(late, V0, cells)


@pytest.mark.parametrize("floor", [Version(0, 100, 0), Version(0, 101, -1), epoch_floor(1)])
def test_no_image_enters_once_the_floor_was_raised(kept: Kept, floor: Version) -> None:
    kept.raise_floor(floor)
    assert kept.load([(1, "image")]) == Counts(1, 0)
    assert kept.cells() == {}


def test_the_floor_is_never_lowered(kept: Kept) -> None:
    high, low = Version(0, 200, 0), Version(0, 150, 0)
    kept.raise_floor(high)
    kept.raise_floor(low)
    gate.install(kept.connection, TABLE, V0)
    assert kept.one(1, Cell(Version(0, 200, 0), "note")) is False
    assert kept.one(1, Cell(Version(0, 200, 1), "note")) is True


def test_values_of_null_are_images_and_not_tombstones(kept: Kept) -> None:
    v = Version(0, 200, 0)
    kept.connection.execute(
        "SELECT changeover.\"gate_public.kept\"(%s, %s, %s, false, ROW(1, 'k', NULL)::kept)",
        [v.epoch, format_lsn(v.lsn), v.ordinal],
    )
    assert kept.load([(1, "image"), (2, "image")]) == Counts(2, 1, 0)
    assert kept.connection.execute("SELECT id, note FROM kept ORDER BY id").fetchall() == [(1, None), (2, "image")]


def test_two_images_of_one_key_stop_the_load_and_are_named(kept: Kept) -> None:
    with pytest.raises(RowRefused, match=r"target key \(1,k\)"):
        kept.load([(1, "one"), (1, "other")])
    kept.load([(1, "one")])
    with pytest.raises(RowRefused, match=r"target key \(1,k\)"):
        kept.load([(1, "of another chunk")])
    assert kept.cells() == {1: Cell(V0, "one")}


@pytest.mark.parametrize("level", [psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE])
def test_any_other_isolation_level_is_refused(kept: Kept, level: psycopg.IsolationLevel) -> None:
    with connect(kept.dsn, "test", autocommit=False) as session:
        session.isolation_level = level
        with pytest.raises(psycopg.errors.RaiseException, match="the gate needs READ COMMITTED"):
            session.execute("SELECT changeover.\"gate_public.kept\"(0, '0/C8', 0, false, ROW(1, 'k', 'note')::kept)")
        session.rollback()
        for write in (batches.apply_batch, batches.load_batch):
            with session.cursor() as cursor:
                batches.prepare_batch(cursor, TABLE, versions=write is batches.apply_batch)
                with pytest.raises(CouldNotFinish, match="READ COMMITTED"):
                    write(cursor, TABLE)
            session.rollback()


def test_a_table_of_keys_alone(kept: Kept) -> None:
    kept.connection.execute("CREATE TABLE public.pairs (a integer, b integer, PRIMARY KEY (a, b))")
    gate.install_gate(kept.connection, "public", "pairs", ("a", "b"), V0)
    offer = sql.SQL('SELECT changeover."gate_public.pairs"(0, {}, 0, {}, ROW(1, 2)::public.pairs)')
    taken = [
        kept.connection.execute(offer.format(sql.Literal(format_lsn(lsn)), sql.Literal(deleted))).fetchone()
        for lsn, deleted in ((200, False), (201, False), (202, True), (150, False))
    ]
    assert taken == [(True,), (True,), (True,), (False,)]
    assert kept.connection.execute("SELECT FROM public.pairs").fetchall() == []


def test_a_table_that_is_begun_anew_knows_nothing_of_earlier_epochs(kept: Kept) -> None:
    anew = image_version(50, 2)  # of another server, whose positions are lower
    kept.load([(0, "image")])
    stop = threading.Event()
    taken = {0: 0, 2: 0}

    def offering(epoch: int) -> None:
        """Offer as an application does, without rest, and count what is taken."""
        with connect(kept.dsn, "test-offers") as session:
            writer = Kept(session, kept.dsn)
            for lsn in itertools.count(200):
                version = Version(epoch, lsn, 0)
                taken[epoch] += writer.one(lsn % len(KEYS), Cell(version, None if lsn % 5 == 0 else note_of(version)))
                if stop.is_set():
                    return

    def wait_for(epoch: int, more: int) -> None:
        wanted, deadline = taken[epoch] + more, time.monotonic() + 120
        while taken[epoch] < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(offering, 0)]
        wait_for(0, 5)
        writers.append(pool.submit(offering, 2))
        wait_for(2, 1)
        gate.begin_anew(kept.connection, TABLE, anew, "test")
        wait_for(2, 5)
        stop.set()
        for writer in writers:
            writer.result()
    assert {cell.version.epoch for cell in kept.cells().values()} == {2}
    assert not kept.one(1, Cell(Version(1, 2**40, 0), "of an earlier epoch"))
    kept.connection.execute('DELETE FROM kept; DELETE FROM changeover."versions_public.kept"')
    assert kept.load([(0, "image"), (1, "image")]) == Counts(2, 2)
    assert kept.one(1, Cell(Version(2, 51, 0), "the first event"))
    with pytest.raises(CouldNotFinish, match="an epoch begins above all that ever were"):
        gate.begin_anew(kept.connection, TABLE, image_version(2**50, 1), "test")
    assert len(kept.cells()) == 2, "and nothing was emptied"


def test_a_reader_that_does_not_end_is_not_waited_for_without_end(kept: Kept) -> None:
    kept.load([(0, "image")])
    with connect(kept.dsn, "test-reader", autocommit=False) as reader:
        reader.execute("SELECT FROM kept")
        with pytest.raises(LockNotGranted, match=r"no lock to empty public\.kept within the limit"):
            gate.begin_anew(kept.connection, TABLE, image_version(100, 1), "test", tries=1)
        reader.rollback()
    assert list(kept.cells()) == [0]


def test_removing_the_gate_leaves_the_table(kept: Kept) -> None:
    kept.load([(1, "image")])
    assert gate.remove(kept.connection, "public", "kept") == ["gate of public.kept"]
    assert gate.remove(kept.connection, "public", "kept") == []
    left = kept.connection.execute("SELECT relname FROM pg_class WHERE relnamespace = to_regnamespace('changeover')").fetchall()
    assert left == []
    assert kept.connection.execute("SELECT note FROM kept").fetchall() == [("image",)]


def test_several_sessions_install_the_gate_at_the_same_time(kept: Kept) -> None:
    def install() -> None:
        with connect(kept.dsn, "test-install") as session:
            for _ in range(25):
                gate.install(session, TABLE, V0)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(install) for _ in range(4)]:
            done.result()
