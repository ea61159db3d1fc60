"""A tenant's floor: the epoch below which a gated table takes nothing for its rows any more.

The table's own floor is one for all rows, so it can't rise while some of them go on under an
earlier epoch. So each tenant has a floor: a trigger on our own table of row versions leaves out
what is of an epoch before the tenant's present one. What has no row version after that is not
written. The trigger is made in front of a fence's pause, because it waits for gated statements; a
floor that rises is another function, which waits for nobody.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import psycopg
from psycopg import sql

from changeover.errors import LockNotGranted
from changeover.session import Connection
from changeover.stores.base.interface import EPOCH
from changeover.stores.postgres.gate import GatedTable, body_of, ours
from changeover.stores.postgres.refusal import LOCK_TIMEOUT, TenantEpoch, belongs, tenant_of

TRIES = 100


def put(connection: Connection, table: GatedTable, column: str, floors: Sequence[TenantEpoch]) -> None:
    """Take nothing any more of an epoch before that of its tenant.

    Args:
        connection: A session with the store.
        table: The gated table.
        column: The key column that holds the tenant.
        floors: Each tenant, and the epoch that is its floor.
    """
    connection.execute(_function(ours("floor", table.schema, table.name), column, floors))


def install(connection: Connection, table: GatedTable, column: str, floors: Sequence[TenantEpoch], server: str) -> None:
    """Put the floors and have the table ask for them from now on; safe to repeat.

    Args:
        connection: A session with the store.
        table: The gated table.
        column: The key column that holds the tenant.
        floors: Each tenant, and the epoch that is its floor.
        server: The server's name, for the message.

    Raises:
        LockNotGranted: Others hold the table's versions too long.
    """
    put(connection, table, column, floors)
    installed = "SELECT FROM pg_trigger WHERE tgrelid = %s::regclass AND tgname = 'changeover_floor'"
    if connection.execute(installed, [table.row_versions.as_string(connection)]).fetchone() is not None:
        return
    trigger = sql.SQL("CREATE TRIGGER changeover_floor BEFORE INSERT ON {} FOR EACH ROW EXECUTE FUNCTION {}()")
    for _ in range(TRIES):
        try:
            with connection.transaction():
                connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(sql.Literal(LOCK_TIMEOUT)))
                connection.execute(trigger.format(table.row_versions, ours("floor", table.schema, table.name)))
            return
        except psycopg.errors.LockNotAvailable:
            time.sleep(0.05)
    raise LockNotGranted(server, f"floor of {table.target}", "gated writes that do not end")


def _function(function: sql.Identifier, column: str, floors: Sequence[TenantEpoch]) -> sql.Composed:
    tenant = tenant_of("NEW", column)
    arms = [sql.SQL("WHEN {} THEN {}").format(belongs(tenant, one.tenants), sql.Literal(one.epoch)) for one in floors]
    body = sql.SQL("BEGIN IF NEW.{} OPERATOR(pg_catalog.<) (CASE {} ELSE 0 END) THEN RETURN NULL; END IF; RETURN NEW; END").format(
        sql.Identifier(EPOCH), sql.SQL(" ").join(arms)
    )
    return sql.SQL("CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql AS {}").format(function, body_of(body))
