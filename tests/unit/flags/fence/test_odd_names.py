"""Names that mean something in our functions: the gate of one row, the refusal and a tenant's floor take a table by any name."""

from __future__ import annotations

import time

import psycopg
import pytest
from psycopg import sql

from changeover.flags.cutover.discovery import present
from changeover.flags.mirror.change import Change
from changeover.flags.mirror.gatecall import GateCall
from changeover.names import joined
from changeover.position import Version, image_version
from changeover.session import Connection, connect
from changeover.stores.postgres import gate, refusal, tenantfloor
from changeover.stores.postgres.refusal import Refusal, TenantEpoch
from changeover.tenants import Tenants

PLACE = ("a.b%s", 'odd %d "t" $body$')
TENANT = "a$body$b%s"
NAMES = (TENANT, "won", "p_epoch", "b", "t", "g", "excluded", "_epoch", "since", "{0}", "%")


def rows(connection: Connection) -> list[tuple[object, ...]]:
    return connection.execute(sql.SQL("SELECT * FROM {} ORDER BY 1").format(sql.Identifier(*PLACE))).fetchall()


def test_a_table_of_any_name_is_gated_refused_and_floored(new_dsn: str) -> None:
    columns = sql.SQL(", ").join(sql.SQL("{} text").format(sql.Identifier(name)) for name in NAMES)
    with connect(new_dsn, "test") as new:
        new.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(PLACE[0])))
        key = sql.SQL(", ").join(map(sql.Identifier, NAMES[:2]))
        new.execute(sql.SQL("CREATE TABLE {} ({}, PRIMARY KEY ({}))").format(sql.Identifier(*PLACE), columns, key))
        gate.install_gate(new, *PLACE, NAMES[:2], image_version(1))
        call = GateCall.of(new, joined(*PLACE))

        def offer(value: str, version: Version, tenant: str = "x") -> bool:
            row = {name: value for name in NAMES} | {TENANT: tenant, "won": "k"}
            found = new.execute(call.statement, call.parameters(version, Change(row, False))).fetchone()
            return found is not None and bool(found[0])

        assert offer("first", Version(0, 9, 0))
        assert offer("second", Version(0, 10, 0))
        assert not offer("older", Version(0, 9, 5))
        assert rows(new) == [("x", "k", *["second"] * 9)]
        assert present(new, *PLACE, TENANT, 5) == ["x"]
        table = gate.gated(new, *PLACE, NAMES[:2])
        x = TenantEpoch(2, Tenants(frozenset({"x"}), others=False))
        tenantfloor.install(new, table, TENANT, [x], "test")
        assert not offer("below the tenant's floor", Version(1, 20, 0))
        assert offer("another's", Version(1, 20, 0), tenant="y")
        assert refusal.install(new, *PLACE, Refusal(standing=(x,), column=TENANT), time.monotonic() + 30)
        with pytest.raises(psycopg.Error) as refused:
            new.execute(sql.SQL("DELETE FROM {} WHERE {} = 'x'").format(sql.Identifier(*PLACE), sql.Identifier(TENANT)))
        assert refused.value.sqlstate == gate.FENCED
        assert refusal.remove(new, *PLACE)
        assert gate.remove(new, *PLACE) == [f"gate of {joined(*PLACE)}"]
