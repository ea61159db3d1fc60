"""Ids after the fence: the store that gains authority never draws one that the other ever drew, there and back."""

from __future__ import annotations

import pytest
from ldclient.migrations.types import Origin

from changeover.flags.fence.fence import fence
from changeover.session import Connection
from changeover.stores.tables.sequences import MARGIN
from tests.support.fix_accounts import following
from tests.support.fix_migration import STORE, MakeMigration, Migration

OLD = """
CREATE SEQUENCE tickets;
CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    ticket bigint NOT NULL DEFAULT nextval('tickets'), note text)
"""
NEW = """
CREATE TABLE purchases (number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, ticket bigserial NOT NULL, note text)
"""
SPEC = """
[[table]]
source = "public.orders"
target = "purchases"
key = ["number"]
[table.columns]
number = "id"
[flag]
key = "orders"
target = "store"
"""
USED = 3 * MARGIN


@pytest.fixture
def orders(make_migration: MakeMigration) -> Migration:
    """Return a migration of orders, loaded; the old store drew far more ids than it has rows."""
    made = make_migration(SPEC, OLD, targets=(STORE,))
    made.new.execute(NEW)
    made.old.execute("INSERT INTO orders (note) SELECT 'n' || i FROM generate_series(1, %s) i", [USED])
    made.old.execute("DELETE FROM orders WHERE id > 50")
    made.prepare()
    made.backfill()
    return made


def insert(connection: Connection, table: str, key: str) -> tuple[int, int]:
    row = connection.execute(f"INSERT INTO {table} (note) VALUES ('own') RETURNING {key}, ticket".encode()).fetchone()
    assert row is not None
    return row[0], row[1]


def analysed(connection: Connection, table: str) -> int:
    connection.execute("SELECT pg_stat_clear_snapshot()")
    row = connection.execute("SELECT analyze_count FROM pg_stat_user_tables WHERE relname = %s", [table]).fetchone()
    assert row is not None
    return int(row[0])


def test_no_id_is_drawn_twice_there_and_back(orders: Migration) -> None:
    with following(orders):
        last = insert(orders.old, "orders", "id")
        assert last == (USED + 1, USED + 1)
        orders.old.execute("DELETE FROM orders WHERE id = %s", [last[0]])
        before = analysed(orders.new, "purchases")
        fence(orders.spec, Origin.NEW)
        assert analysed(orders.new, "purchases") == before + 1
        first = insert(orders.new, "purchases", "number")
        assert min(first) > USED + 1
        orders.new.execute("INSERT INTO purchases (note) SELECT 'more' FROM generate_series(1, %s)", [USED])
        orders.new.execute("DELETE FROM purchases WHERE number > 50")
        before = analysed(orders.old, "orders")
        fence(orders.spec, Origin.OLD)
        assert analysed(orders.old, "orders") == before + 1
        assert min(insert(orders.old, "orders", "id")) > min(first) + USED
