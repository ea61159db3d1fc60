"""What a unit wrote: the transaction's own counts against what it told, for any number of tables."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from ldclient.migrations.types import Origin

from changeover.errors import ChangesUntold, Refused
from changeover.flags.mirror.change import Change, returned
from changeover.flags.mirror.written import StoreTables, Written
from changeover.flags.router.endpoint import PgEndpoint
from changeover.flags.router.router import RoutedStore, Router
from tests.support.fix_families import PEOPLE, PETS, Families, MakeFamilies
from tests.support.fix_flags import PATIENCE, Stores

PERSON = "INSERT INTO public.people VALUES (%s, %s) RETURNING *"
PET = "INSERT INTO public.pets VALUES (%s, %s, %s) RETURNING *"
NOTHING: tuple[list[Any], list[Any]] = ([], [])


def test_one_unit_tells_of_several_tables(families: Families) -> None:
    def work(store: RoutedStore) -> None:
        store.mirror(returned(store.execute(PERSON, [1, "Ada"])))
        store.mirror(returned(store.execute(PET, [10, 1, "Rex"])))
        store.mirror([Change({"id": 1, "name": "Ada"}, table="public.people")])
        store.execute("INSERT INTO public.notes VALUES ('of no mirrored table')")

    families.router.run(work)
    assert families.router.drain(PATIENCE)
    assert families.rows(Origin.OLD) == families.rows(Origin.NEW) == ([(1, "Ada")], [(10, 1, "Rex")])
    assert (families.mirror()["mirrored"], families.mirror()["applied"], families.mirror()["failed"]) == (1, 2, 0)


def silent(store: RoutedStore) -> None:
    store.execute(PERSON, [1, "Ada"])


def second(store: RoutedStore) -> None:
    store.execute(PERSON, [1, "Ada"])
    store.mirror(returned(store.execute(PERSON, [2, "Bob"])))


def many(store: RoutedStore) -> None:
    store.cursor.executemany(PERSON, [(1, "Ada"), (2, "Bob"), (3, "Eve")])
    store.mirror(returned(store.cursor))


def deleted(store: RoutedStore) -> None:
    store.execute("INSERT INTO public.notes VALUES ('x')")
    store.connection.execute("DELETE FROM public.people WHERE id = 7")


def replaced(store: RoutedStore) -> None:
    store.execute("DELETE FROM public.people WHERE id = 7; INSERT INTO public.people VALUES (8, 'Kim')")


def cascaded(store: RoutedStore) -> None:
    store.mirror(returned(store.execute("DELETE FROM public.people WHERE id = 7 RETURNING *")))


def copied(store: RoutedStore) -> None:
    with store.cursor.copy("COPY public.people FROM STDIN") as copy:
        copy.write_row((1, "Ada"))


def in_a_block(router: Router, work: Callable[[RoutedStore], None]) -> None:
    with router.write() as store:
        work(store)


@pytest.mark.parametrize(
    ("work", "table", "changed", "told"),
    [
        (silent, "people", 1, 0), (second, "people", 2, 1), (many, "people", 3, 0), (deleted, "people", 1, 0),
        (replaced, "people", 2, 0), (cascaded, "pets", 2, 0), (copied, "people", 1, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("block", [False, True])
def test_a_change_that_is_not_told_is_refused_before_the_commit(
    families: Families, work: Callable[[RoutedStore], None], table: str, changed: int, told: int, block: bool
) -> None:
    families.stores.old.execute("INSERT INTO people VALUES (7, 'Lea'); INSERT INTO pets VALUES (70, 7, 'Rex'), (71, 7, 'Mia')")
    before = families.rows(Origin.OLD)
    with pytest.raises(ChangesUntold, match=rf"changed {changed} rows of public\.{table} and told the mirror of {told}"):
        (in_a_block if block else Router.run)(families.router, work)
    assert families.rows(Origin.OLD) == before
    assert families.rows(Origin.NEW) == NOTHING


def test_a_row_that_a_trigger_changes_is_to_be_told_too(families: Families) -> None:
    families.stores.old.execute(
        "CREATE FUNCTION also() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO public.pets VALUES (new.id, new.id, 'Rex'); RETURN NULL; END $$;"
        "CREATE TRIGGER also AFTER INSERT ON public.people FOR EACH ROW EXECUTE FUNCTION also()"
    )
    with pytest.raises(ChangesUntold, match=r"1 rows of public\.pets and told the mirror of 0"):
        families.router.run(lambda store: store.mirror(returned(store.execute(PERSON, [1, "Ada"]))))


def test_a_savepoint_that_was_rolled_back_is_not_counted_against_the_unit(families: Families) -> None:
    families.stores.old.execute("INSERT INTO people VALUES (1, 'Ada')")

    def get_or_create(store: RoutedStore) -> None:
        try:
            with store.connection.transaction():
                store.mirror(returned(store.execute(PERSON, [1, "Ada"])))
        except psycopg.errors.UniqueViolation:
            pass
        store.mirror(returned(store.execute("UPDATE public.people SET name = 'Ada L.' WHERE id = 1 RETURNING *")))

    families.router.run(get_or_create)
    assert families.router.drain(PATIENCE)
    assert families.rows(Origin.NEW) == ([(1, "Ada L.")], [])


class OnePool:
    """An application's pool of one session, which writes by other ways, too."""

    def __init__(self, dsn: str) -> None:
        self.session = psycopg.connect(dsn)

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """Lend it, and commit afterwards."""
        yield self.session
        self.session.commit()


def test_what_the_session_did_before_is_not_counted_for_the_unit(make_families: MakeFamilies, stores: Stores) -> None:
    """The server's counts of a session hold what was not sent yet, of other transactions, too."""
    pool = OnePool(stores.old_dsn)
    families = make_families(old=PgEndpoint(stores.old_dsn, pool=pool))
    for number in range(1, 4):
        with pool.connection() as session:
            session.execute(PERSON, [number, f"by the way {number}"])
        with families.router.write() as store:
            store.mirror(returned(store.execute(PERSON, [number + 10, f"in a unit {number}"])))
    with pytest.raises(ChangesUntold, match="changed 1 rows"):
        families.router.run(lambda store: store.execute(PERSON, [99, "forgotten"]))
    assert len(families.rows(Origin.OLD)[0]) == 6
    families.router.close()
    pool.session.close()


def test_the_row_that_a_race_of_on_conflict_leaves_in_the_counts_runs_the_unit_anew(families: Families) -> None:
    """Both insert, each before it sees the other; one takes its row back, and the server counts an insert and a delete."""
    families.stores.old.execute(
        "CREATE FUNCTION slowly(name text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS"
        " $$ BEGIN PERFORM pg_sleep(0.3); RETURN name; END $$; ALTER TABLE public.people DROP CONSTRAINT people_pkey CASCADE;"
        "CREATE INDEX slow ON public.people (slowly(name)); ALTER TABLE public.people ADD PRIMARY KEY (id)"  # written in this order
    )
    put = "INSERT INTO public.people VALUES (1, %s) ON CONFLICT (id) DO UPDATE SET name = excluded.name RETURNING *"
    attempts, start = [], threading.Barrier(2)

    def work(name: str) -> None:
        def put_one(store: RoutedStore) -> None:
            if name not in attempts:
                start.wait(PATIENCE)
            attempts.append(name)
            store.mirror(returned(store.execute(put, [name])))

        families.router.run(put_one)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert families.router.drain(PATIENCE)
    assert families.rows(Origin.OLD) == families.rows(Origin.NEW)
    assert (families.router.counters()["writes"], len(attempts)) == (2, 3)


def test_partitions_count_for_their_table(families: Families) -> None:
    families.stores.old.execute(
        "DROP TABLE public.pets; CREATE TABLE public.pets (id bigint PRIMARY KEY, owner bigint, name text) PARTITION BY RANGE (id);"
        "CREATE TABLE public.few PARTITION OF public.pets FOR VALUES FROM (0) TO (100)"
    )
    with families.router.write() as store:
        store.mirror(returned(store.execute(PERSON, [1, "Ada"])))
        store.mirror(returned(store.execute(PET, [10, 1, "by the root"])))
        store.mirror(returned(store.execute("INSERT INTO public.few VALUES (11, 1, 'by the leaf') RETURNING *")))

    def half(store: RoutedStore) -> None:
        store.mirror(returned(store.execute(PET, [12, 1, "told"])))
        store.execute("INSERT INTO public.few VALUES (13, 1, 'not told')")

    with pytest.raises(ChangesUntold, match=r"2 rows of public\.pets and told the mirror of 1"):
        families.router.run(half)
    assert families.router.drain(PATIENCE)
    assert families.rows(Origin.NEW)[1] == [(10, 1, "by the root"), (11, 1, "by the leaf")]


def test_of_which_table_a_row_is_has_to_be_known(families: Families) -> None:
    families.stores.old.execute("CREATE VIEW public.seen AS SELECT * FROM public.people")
    note, view = "INSERT INTO public.notes VALUES ('x') RETURNING *", "INSERT INTO public.seen VALUES (1, 'Ada') RETURNING *"
    cases: tuple[tuple[Callable[[RoutedStore], list[Change]], str], ...] = (
        (lambda store: returned(store.execute(note)), "a table that is not mirrored"),
        (lambda store: returned(store.execute(view)), "of a view: returned"),
        (lambda store: [Change({"id": 1})], "a row without its table"),
        (lambda store: [Change({"id": 1}, table="public.notes")], r"public\.notes, which is not mirrored"),
    )
    for told, problem in cases:
        with pytest.raises(TypeError, match=problem):
            in_a_block(families.router, lambda store: store.mirror(told(store)))  # noqa: B023
    families.router.run(lambda store: store.mirror(returned(store.execute(view), table="public.people")))
    assert families.router.drain(PATIENCE)
    assert families.rows(Origin.OLD) == families.rows(Origin.NEW) == ([(1, "Ada")], [])


def test_an_error_that_was_caught_is_named_and_nothing_is_counted(families: Families) -> None:
    def swallow(store: RoutedStore) -> None:
        with suppress(psycopg.Error):
            store.execute("SELECT 1 / 0")

    with pytest.raises(psycopg.errors.InFailedSqlTransaction, match="its error was caught, so nothing can be committed"):
        families.router.run(swallow)


def test_each_table_has_its_own_column_of_tenants(families: Families) -> None:
    old = families.stores.old
    tables = StoreTables(Origin.OLD, [replace(PEOPLE, old_tenant="id"), replace(PETS, old_tenant="owner")])

    def unit(*statements: tuple[str, list[Any]]) -> Written:
        with old.transaction(), old.cursor() as cursor:
            counts = tables.begin(cursor)
            told = [change for one in statements for change in returned(cursor.execute(one[0].encode(), one[1]))]
            return counts.end(cursor, told, None, "1")

    written = unit((PERSON, [1, "Ada"]), (PET, [10, 1, "Rex"]))
    assert [(one.place, one.change.row["id"]) for one in written.told] == [(0, 1), (1, 10)]
    old.execute("INSERT INTO people VALUES (2, 'Bob')")
    with pytest.raises(Refused, match="a row whose owner is not the tenant that it was called for"):
        unit((PET, [20, 2, "Mia"]))
    assert families.rows(Origin.OLD)[1] == [(10, 1, "Rex")]
