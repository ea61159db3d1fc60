"""Workers: nothing is lost at eight threads, what is bad loses only itself, and no order of workers harms a row."""

from __future__ import annotations

import random
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from ldclient.migrations.types import Origin
from psycopg import sql
from psycopg.conninfo import make_conninfo

from changeover.flags.mirror.books import Books
from changeover.flags.mirror.change import Change, returned
from changeover.flags.mirror.mirror import Mirror
from changeover.flags.mirror.offer import BATCH_ROWS, Bounds, Ended, Offer
from changeover.flags.mirror.worker import Way
from changeover.flags.mirror.written import Told
from changeover.flags.router.endpoint import PgEndpoint
from changeover.flags.router.router import RoutedStore
from changeover.position import Version
from tests.support.fix_families import PEOPLE, PETS, Families, MakeFamilies
from tests.support.fix_flags import PATIENCE, PATIENT, Stores, wait_until

FAR = 1 << 40
"""An LSN above the floor of any fresh database."""

PERSON, PET = 0, 1
MakeMirror = Callable[..., Mirror]


def person(number: int, name: str | None = None, *, deleted: bool = False) -> Told:
    return Told(PERSON, Change({"id": number, "name": name or f"person {number}"}, deleted))


def pet(number: int, owner: int, name: str = "Rex", *, deleted: bool = False) -> Told:
    return Told(PET, Change({"id": number, "owner": owner, "name": name}, deleted))


def at(lsn: int) -> Version:
    return Version(0, FAR + lsn, -1)


@pytest.fixture
def clerk(families: Families) -> Iterator[str]:
    """Make a role of an application's, which may not switch foreign keys off; yields its DSN of the new store."""
    new, role = families.stores.new, f"clerk_{secrets.token_hex(4)}"
    name = sql.Identifier(role)
    new.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'p'").format(name))
    for rights in ("USAGE ON SCHEMA public, changeover", "ALL ON ALL TABLES IN SCHEMA public, changeover"):
        new.execute(sql.SQL("GRANT {} TO {}").format(sql.SQL(rights), name))
    yield make_conninfo(families.stores.new_dsn, user=role, password="p")
    new.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(name))


@pytest.fixture
def make_mirror(families: Families) -> Iterator[MakeMirror]:
    """Make mirrors to the new store; all of them are closed."""
    made: list[Mirror] = []

    def make(dsn: str | None = None, **bounds: Any) -> Mirror:
        way = Way(PgEndpoint(dsn or families.stores.new_dsn), Origin.NEW, [PEOPLE, PETS], "changeover:follows:router")
        made.append(Mirror(way, Bounds(**{"deadline": PATIENCE, **bounds})))
        return made[-1]

    yield make
    for mirror in made:
        mirror.close(1)


def test_eight_threads_lose_nothing_and_both_stores_are_equal(families: Families) -> None:
    def write(thread: int) -> None:
        numbers = random.Random(thread)
        for count in range(100):
            number = numbers.randint(1, 40)

            def work(store: RoutedStore, number: int = number, name: str = f"{thread} {count}") -> None:
                put = "INSERT INTO people VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET name = excluded.name RETURNING *"
                store.mirror(returned(store.execute(put, [number, name])))
                if number % 7 == 0:
                    store.mirror(returned(store.execute("DELETE FROM people WHERE id = %s RETURNING *", [number])))

            families.router.run(work)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert families.router.drain(PATIENCE)
    counts = families.mirror()
    assert (counts["mirrored"], counts["dropped"], counts["failed"], counts["lost"], counts["depth"]) == (800, 0, 0, {}, 0)
    assert families.rows(Origin.OLD) == families.rows(Origin.NEW)
    assert families.rows(Origin.OLD)[0]


def test_a_key_ends_with_its_newest_version_whichever_worker_comes_first(families: Families, make_mirror: MakeMirror) -> None:
    """Units of one to three keys, overtaken and repeated: those of a first key keep their order, the gate sees to the others."""
    numbers, mirror = random.Random(7), make_mirror()
    units = [
        (at(lsn), [person(key, f"{key} at {lsn}", deleted=numbers.random() < 0.2) for key in numbers.sample(range(6), k)])
        for lsn, k in enumerate(numbers.choices((1, 2, 3), k=300), 1)
    ]
    newest: dict[int, Change] = {}
    for _, told in units:
        newest.update({one.change.row["id"]: one.change for one in told})
    shuffled = sorted([*units, *numbers.sample(units, 60)], key=lambda unit: unit[0].lsn + numbers.randint(-20, 20))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda unit: mirror.offer(unit[0], unit[1], str(unit[1][0].change.row["id"])), shuffled))
    assert mirror.drain(PATIENCE)
    left = [(key, change.row["name"]) for key, change in sorted(newest.items()) if not change.deleted]
    assert families.rows(Origin.NEW)[0] == left
    counts = mirror.counters()
    assert (counts["failed"], counts["applied"] + counts["refused_by_gate"]) == (0, sum(len(told) for _, told in shuffled))


def test_those_that_share_a_key_are_brought_in_their_order(make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    for lsn in range(1, 400):
        assert mirror.offer(at(lsn), [person(lsn % 9)], str(lsn % 9))
    assert mirror.drain(PATIENCE)
    assert (mirror.counters()["applied"], mirror.counters()["refused_by_gate"]) == (399, 0)


def test_a_parent_comes_before_its_child_in_one_unit_and_of_another_worker(
    families: Families, make_mirror: MakeMirror, clerk: str
) -> None:
    mirror = make_mirror(clerk)
    mirror.offer(at(1), [person(1), pet(10, 1)], "a")
    assert mirror.drain(PATIENCE)
    with families.stores.new.transaction():
        # the parent's worker waits here for its row, and the child's comes first
        families.stores.new.execute("INSERT INTO public.persons VALUES (2, 'in the way')")
        mirror.offer(at(2), [person(2)], "a")
        mirror.offer(at(3), [pet(20, 2)], "b")
        mirror.offer(at(4), [pet(11, 1)], "b")
        wait_until(lambda: 11 in [row[0] for row in families.rows(Origin.NEW)[1]])  # what is behind it goes on
        families.stores.new.execute("DELETE FROM public.persons WHERE id = 2")
    assert mirror.drain(PATIENCE)
    assert families.rows(Origin.NEW) == ([(1, "person 1"), (2, "person 2")], [(10, 1, "Rex"), (11, 1, "Rex"), (20, 2, "Rex")])
    assert mirror.counters()["failed"] == 0


def test_a_child_whose_parent_never_comes_is_lost_alone(families: Families, make_mirror: MakeMirror, clerk: str) -> None:
    mirror = make_mirror(clerk)
    mirror.offer(at(1), [pet(10, 1)], "a")
    mirror.offer(at(2), [person(2), pet(20, 2), pet(30, 3)], "a")
    assert mirror.drain(PATIENCE)
    assert families.rows(Origin.NEW) == ([(2, "person 2")], [(20, 2, "Rex")])
    assert (mirror.counters()["lost"], mirror.counters()["last_failure"][1]) == ({"0": 2}, "ForeignKeyViolation 23503")


def test_a_value_of_another_unique_index_is_waited_for(families: Families, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    mirror.offer(at(1), [person(1, "taken")], "a")
    assert mirror.drain(PATIENCE)
    with families.stores.new.transaction():
        families.stores.new.execute("SELECT FROM public.persons WHERE id = 1 FOR UPDATE")
        mirror.offer(at(2), [person(1, "given up")], "a")
        mirror.offer(at(3), [person(2, "taken")], "b")
        mirror.offer(at(4), [person(3)], "b")
        wait_until(lambda: 3 in [row[0] for row in families.rows(Origin.NEW)[0]])
    assert mirror.drain(PATIENCE)
    assert families.rows(Origin.NEW)[0] == [(1, "given up"), (2, "taken"), (3, "person 3")]
    assert mirror.counters()["failed"] == 0


def test_triggers_and_foreign_keys_actions_stay_off_where_the_role_may_say_so(families: Families, make_mirror: MakeMirror) -> None:
    """A parent that is deleted and inserted anew would take its children along."""
    mirror = make_mirror()
    mirror.offer(at(1), [person(1), pet(10, 1)], "a")
    mirror.offer(at(2), [person(1, deleted=True)], "a")
    mirror.offer(at(3), [person(1, "anew")], "a")
    assert mirror.drain(PATIENCE)
    assert families.rows(Origin.NEW) == ([(1, "anew")], [(10, 1, "Rex")])


def test_a_bad_row_of_a_batch_loses_only_itself(families: Families, make_mirror: MakeMirror) -> None:
    mirror = make_mirror(workers=1)
    with families.stores.new.transaction():
        families.stores.new.execute("LOCK TABLE public.persons IN ACCESS EXCLUSIVE MODE")
        mirror.offer(at(1), [person(1)])
        wait_until(lambda: waits(families.stores))
        for number in range(2, 40):  # while the first one waits these become a batch
            mirror.offer(at(number), [person(number), pet(number, number, "refused" if number == 20 else "Rex")])
    assert mirror.drain(PATIENCE)
    people, pets = families.rows(Origin.NEW)
    assert [row[0] for row in people] == list(range(1, 40))
    assert [row[0] for row in pets] == [number for number in range(2, 40) if number != 20]
    assert (mirror.counters()["lost"], mirror.counters()["last_failure"][1]) == ({"0": 1}, "CheckViolation 23514")


def test_bad_rows_of_a_bulk_lose_only_themselves(families: Families, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    bad = {17, 400, 401}
    mirror.offer(at(1), [person(1), *(pet(number, 1, "refused" if number in bad else "Rex") for number in range(1, 1001))])
    assert mirror.drain(PATIENCE)
    assert {row[0] for row in families.rows(Origin.NEW)[1]} == set(range(1, 1001)) - bad
    assert mirror.counters()["lost"] == {"0": 3}


def put(families: Families, number: int) -> None:
    with families.router.write() as store:
        store.mirror(returned(store.execute("INSERT INTO people VALUES (%s, %s) RETURNING *", [number, f"person {number}"])))


def test_a_value_that_the_driver_refuses_loses_only_its_row(families: Families, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    mirror.offer(at(1), [person(1), person(2, "a text with \x00"), person(3)], "a")
    mirror.offer(at(2), [person(4)], "a")
    assert mirror.drain(PATIENCE)
    assert [row[0] for row in families.rows(Origin.NEW)[0]] == [1, 3, 4]
    assert mirror.counters()["lost"] == {"0": 1}


def test_where_every_row_is_bad_it_ends(families: Families, make_mirror: MakeMirror) -> None:
    mirror = make_mirror()
    mirror.offer(at(1), [pet(number, 1, "refused") for number in range(1, 3001)], "a")
    mirror.offer(at(2), [person(1)], "a")
    assert mirror.drain(PATIENCE)
    assert families.rows(Origin.NEW) == ([(1, "person 1")], [])
    assert mirror.counters()["lost"] == {"0": 3000}


def waits(stores: Stores) -> bool:
    """Return whether a session of the mirror waits for a lock."""
    row = stores.old.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'", [stores.new.info.dbname]
    ).fetchone()
    return row is not None and row[0] > 0


def test_small_units_go_on_beside_a_bulk_of_ten_thousand_rows(families: Families) -> None:
    """The bulk can't end before they are there: it waits for a row that is held until then."""
    many = "INSERT INTO people SELECT i, 'bulk ' || i FROM generate_series(1, 10000) i RETURNING *"
    with families.stores.new.transaction():
        families.stores.new.execute("INSERT INTO persons VALUES (10000, 'in the way')")
        families.router.run(lambda store: store.mirror(returned(store.execute(many))))
        assert families.mirror()["depth"] == 10_000
        for number in range(10_001, 10_101):
            put(families, number)
        wait_until(lambda: families.mirror()["applied"] == 100)
        assert families.mirror()["depth"] == 10_000
        families.stores.new.execute("DELETE FROM persons WHERE id = 10000")
    assert families.router.drain(PATIENCE)
    assert families.rows(Origin.OLD) == families.rows(Origin.NEW)
    assert (families.mirror()["dropped"], families.mirror()["failed"]) == (0, 0)


def test_a_store_that_is_away_loses_what_met_it_and_takes_the_rest_when_it_is_back(
    make_families: MakeFamilies, stores: Stores
) -> None:
    families = make_families(limits=replace(PATIENT, mirror_deadline=1.0))
    name = sql.Identifier(stores.new.info.dbname)

    def write(first: int) -> None:
        for number in range(first, first + 20):
            put(families, number)

    write(0)
    assert families.router.drain(PATIENCE)
    stores.old.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS false").format(name))
    assert stores.end_router_sessions(Origin.NEW) > 0
    write(100)
    wait_until(lambda: families.mirror()["failed"] > 0)
    stores.old.execute(sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS true").format(name))
    assert families.router.drain(PATIENCE)
    write(200)
    assert families.router.drain(PATIENCE)
    counts = families.mirror()
    there = {row[0] for row in families.rows(Origin.NEW)[0]}
    assert counts["lost"] == {"0": counts["failed"]}
    assert len(there) == 60 - counts["failed"]
    assert set(range(20)) | set(range(200, 220)) <= there
    assert counts["last_failure"][1] == "ServerUnavailable"


def test_a_full_queue_makes_callers_wait_where_the_store_keeps_up(make_mirror: MakeMirror) -> None:
    mirror = make_mirror(rows=8, wait=PATIENCE)
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda lsn: mirror.offer(at(lsn), [person(lsn)], str(lsn)), range(1, 500)))
    assert all(taken)
    assert mirror.drain(PATIENCE)
    assert (mirror.counters()["applied"], mirror.counters()["dropped"]) == (499, 0)


def test_nobody_waits_for_a_store_that_does_not_keep_up() -> None:
    books = Books("a store", Bounds(rows=1, wait=0.01))
    handed: list[Offer] = []
    assert books.enter(Offer.of(at(1), [person(1)]), handed.append)
    assert not books.enter(Offer.of(at(2), [person(2)]), handed.append), "one waits in vain"
    books.bounds = Bounds(rows=1, wait=PATIENCE)
    late = threading.Thread(target=books.enter, args=(Offer.of(at(3), [person(3)]), handed.append), daemon=True)
    late.start()
    late.join(PATIENCE / 2)
    assert not late.is_alive(), "the others do not"
    books.done(handed, 0.0, kept_up=True)
    assert books.enter(Offer.of(at(4), [person(4)]), handed.append)
    assert (books.counters()["dropped"], books.counters()["lost"], books.counters()["depth"]) == (2, {"0": 2}, 1)


def test_what_is_under_way_is_bounded_in_bytes_and_bulks_apart() -> None:
    books, handed = Books("a store", Bounds(rows=BATCH_ROWS + 1, bytes=1000, wait=0.01)), list[Offer]()
    assert books.enter(Offer.of(at(1), [person(1, "x" * 1000)]), handed.append)
    assert not books.enter(Offer.of(at(2), [person(2)]), handed.append)
    bulk = [person(number) for number in range(BATCH_ROWS + 1)]
    assert books.enter(Offer.of(at(3), bulk), handed.append), "bulks are counted apart"
    assert not books.enter(Offer.of(at(4), bulk), handed.append)
    assert books.counters()["depth"] == 1 + len(bulk)


def test_a_row_that_cannot_be_mapped_loses_its_unit(families: Families, make_mirror: MakeMirror) -> None:
    """Its key is not known, so an earlier image of it in the unit must not arrive in its place."""
    mirror = make_mirror()
    mirror.offer(at(1), [person(1), Told(PERSON, Change({"name": "without a key"}))], "a")
    mirror.offer(at(2), [person(2)], "a")
    assert mirror.drain(PATIENCE)
    assert families.rows(Origin.NEW)[0] == [(2, "person 2")]
    assert (mirror.counters()["lost"], mirror.counters()["last_failure"][1]) == ({"0": 2}, "ValueError")


def test_who_listens_hears_once_how_each_unit_ended(families: Families, make_mirror: MakeMirror) -> None:
    heard: list[tuple[str, bool, bool]] = []

    def listener(name: str) -> Ended:
        return lambda seconds, failed=False: heard.append((name, seconds is not None, failed))

    mirror = make_mirror()
    mirror.offer(at(1), [person(1)], "a", listener("whole"))
    mirror.offer(at(2), [person(2), pet(20, 2, "refused")], "a", listener("in part"))
    mirror.offer(at(3), [Told(PERSON, Change({}))], "a", listener("unmapped"))
    assert mirror.drain(PATIENCE)
    mirror.close(1)
    mirror.offer(at(4), [person(4)], "a", listener("closed"))
    assert sorted(heard, reverse=True) == [
        ("whole", True, False),
        ("unmapped", True, True),
        ("in part", True, True),
        ("closed", False, False),
    ]


def test_the_callers_own_error_is_none_of_the_mirrors(families: Families) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        families.router.run(
            lambda store: store.mirror(returned(store.execute("INSERT INTO pets VALUES (1, 1, 'refused') RETURNING *")))
        )
    assert families.router.drain(PATIENCE)
    assert "mirror_new" not in families.router.counters()
