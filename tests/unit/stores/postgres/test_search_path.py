"""Functions of ours run in the application's sessions: whatever its search_path puts in front, they do what they did."""

from __future__ import annotations

from collections.abc import Iterator
from time import monotonic

import psycopg
import pytest
from psycopg import sql

from changeover.position import Version
from changeover.session import Connection, connect
from changeover.stores.postgres import gate, refusal, tenantfloor
from changeover.stores.postgres.gate import FENCED
from changeover.tenants import Tenants

HOSTILE = """
CREATE SCHEMA evil;
CREATE FUNCTION evil.current_setting(text, boolean DEFAULT false) RETURNS text LANGUAGE sql AS $$SELECT '99'$$;
CREATE FUNCTION evil.set_config(text, text, boolean) RETURNS text LANGUAGE sql AS $$SELECT 'no'$$;
CREATE FUNCTION evil.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$SELECT 'infinity'::timestamptz$$;
CREATE FUNCTION evil.hashtext(text) RETURNS integer LANGUAGE plpgsql AS $$BEGIN RAISE 'evil'; END$$;
CREATE FUNCTION evil.pg_advisory_xact_lock_shared(integer, integer) RETURNS void LANGUAGE plpgsql AS $$BEGIN RAISE 'evil'; END$$;
CREATE FUNCTION evil.pg_logical_emit_message(boolean, text, text) RETURNS pg_lsn LANGUAGE plpgsql AS $$BEGIN RAISE 'evil'; END$$;
CREATE FUNCTION evil.length(text) RETURNS integer LANGUAGE sql AS 'SELECT 0'
"""
SIDES = ("integer", "bigint", "text", "varchar", "pg_lsn", "timestamptz")
OPERATORS = ("=", "<>", "<", ">", ">=", "<=")
TYPES = ("text", "jsonb", "regclass", "timestamptz", "pg_lsn", "int8", "varchar", "bool")

PATH = "pg_temp, evil, pg_catalog, public"
INSIDE = Version(0, 100, -1)


@pytest.fixture
def hostile(any_dsn: str) -> Iterator[Connection]:
    """Yield a plain session in whose path other functions, operators, types and tables come first, and a table of two keys."""
    with connect(any_dsn, "test") as admin:
        admin.execute(sql.SQL(HOSTILE))
        for side in SIDES:
            kind = sql.SQL(side)
            admin.execute(
                sql.SQL("CREATE FUNCTION evil.never({0}, {0}) RETURNS boolean LANGUAGE sql AS 'SELECT false'").format(kind)
            )
            for operator in OPERATORS:
                admin.execute(
                    sql.SQL("CREATE OPERATOR evil.{0} (LEFTARG = {1}, RIGHTARG = {1}, FUNCTION = evil.never)").format(
                        sql.SQL(operator), kind
                    )
                )
        admin.execute("CREATE FUNCTION evil.never(jsonb, text) RETURNS boolean LANGUAGE sql AS 'SELECT false'")
        admin.execute("CREATE OPERATOR evil.? (LEFTARG = jsonb, RIGHTARG = text, FUNCTION = evil.never)")
        admin.execute("CREATE TABLE kept (whose varchar, id bigint, v text, PRIMARY KEY (whose, id))")
    with psycopg.connect(any_dsn, autocommit=True) as session:
        for name in ("kept", "gate"):
            session.execute(sql.SQL("CREATE TEMPORARY TABLE {} (nothing integer)").format(sql.Identifier(name)))
        for name in TYPES:
            session.execute(sql.SQL("CREATE DOMAIN pg_temp.{} AS pg_catalog.point").format(sql.Identifier(name)))
        session.execute(sql.SQL("SET search_path = {}").format(sql.SQL(PATH)))
        yield session


def offer(session: Connection, lsn: int, value: str | None, whose: str = "a", epoch: int = 0) -> bool:
    """Offer a row through the gate, or where there is no value its delete."""
    row = session.execute(
        sql.SQL("SELECT changeover.{}({}, {}::pg_catalog.pg_lsn, 0, {}, ROW({}, 7, {})::public.kept)").format(
            sql.Identifier("gate_public.kept"), sql.Literal(epoch), sql.Literal(f"0/{lsn:X}"), sql.Literal(value is None),
            sql.Literal(whose), sql.Literal(value),
        )
    ).fetchone()  # fmt: skip
    return bool(row and row[0])


def kept(session: Connection) -> list[tuple[str, ...]]:
    """Return what the table holds."""
    return session.execute("SELECT whose, v FROM public.kept ORDER BY 1").fetchall()


def test_the_gate_decides_as_it_did(hostile: Connection, any_dsn: str) -> None:
    with connect(any_dsn, "test") as admin:
        gate.install_gate(admin, "public", "kept", ["whose", "id"], INSIDE)
    assert not offer(hostile, 50, "below the floor")
    assert [offer(hostile, lsn, f"at {lsn}") for lsn in (300, 200, 300, 400)] == [True, False, False, True]
    assert kept(hostile) == [("a", "at 400")]
    assert not offer(hostile, 350, None)
    assert offer(hostile, 500, None)
    assert kept(hostile) == []
    hostile.execute("SET default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.errors.RaiseException, match="the gate needs READ COMMITTED"):
        offer(hostile, 600, "seen too early")


@pytest.mark.parametrize("tenants", [False, True])
def test_a_refusal_refuses_what_it_did(hostile: Connection, any_dsn: str, tenants: bool) -> None:
    whom = Tenants(frozenset(["a"]), others=False)
    one = refusal.TenantEpoch(3, whom) if tenants else refusal.TenantEpoch(3)
    with connect(any_dsn, "test") as admin:
        gate.install_gate(admin, "public", "kept", ["whose", "id"], INSIDE)
        for refused in (refusal.Refusal((), one, "whose"), refusal.Refusal((one,), None, "whose")):
            what = refused if tenants else refusal.Refusal(refused.standing, refused.begun)
            assert refusal.install(admin, "public", "kept", what, monotonic() + 600)
            with pytest.raises(psycopg.Error, match=r"no authority over public\.kept since epoch 3") as caught:
                hostile.execute("INSERT INTO public.kept VALUES ('a', 1, 'mine')")
            assert caught.value.sqlstate == FENCED
            with pytest.raises(psycopg.Error, match="no authority"):
                hostile.execute("TRUNCATE public.kept")
    with pytest.raises(psycopg.Error, match="no authority"):
        offer(hostile, 300, "of an older epoch", epoch=2)
    assert offer(hostile, 400, "of this epoch", epoch=3)
    if tenants:
        hostile.execute("INSERT INTO public.kept VALUES ('b', 1, 'whose it is')")
    assert kept(hostile) == [("a", "of this epoch"), *([("b", "whose it is")] if tenants else [])]


def test_a_tenant_s_floor_leaves_out_what_it_did(hostile: Connection, any_dsn: str) -> None:
    with connect(any_dsn, "test") as admin:
        gate.install_gate(admin, "public", "kept", ["whose", "id"], INSIDE)
        table = gate.gated(admin, "public", "kept", ["whose", "id"])
        floors = [refusal.TenantEpoch(2, Tenants(frozenset(["a"]), others=False))]
        tenantfloor.install(admin, table, "whose", floors, "test")
    assert [offer(hostile, 300, "v", whose, epoch) for whose, epoch in (("a", 1), ("b", 1), ("a", 2))] == [False, True, True]
