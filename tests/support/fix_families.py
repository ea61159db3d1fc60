"""Fixtures for an application that mirrors two tables: parents and their children, in two stores, behind a router at dualwrite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from ldclient import LDClient
from ldclient.migrations.types import Origin, Stage

from changeover.flags.mirror.change import MirroredTable
from changeover.flags.router.desired import FlagStage
from changeover.flags.router.endpoint import PgEndpoint
from changeover.flags.router.follower import LedgerAuthority
from changeover.flags.router.router import Router
from changeover.flags.router.runtime import Limits
from changeover.position import image_version
from changeover.stores.postgres.gate import install_gate
from tests.support.fix_flags import FLAG, MIGRATION, PATIENT, Stores

TABLES = """
CREATE TABLE public.{people} (id bigint PRIMARY KEY, name text NOT NULL UNIQUE);
CREATE TABLE public.{pets} (id bigint PRIMARY KEY, owner bigint NOT NULL REFERENCES public.{people} ON DELETE CASCADE,
    name text NOT NULL CHECK (name <> 'refused'));
CREATE TABLE public.notes (note text)
"""
PEOPLE = MirroredTable("public.people", "public.persons", dict, dict)
PETS = MirroredTable("public.pets", "public.animals", dict, dict)


@dataclass(frozen=True)
class Families:
    """The two stores with their tables, and a router over them."""

    stores: Stores
    router: Router

    def rows(self, origin: Origin) -> tuple[list[Any], list[Any]]:
        """Return every parent and every child of a store."""
        connection = self.stores.old if origin is Origin.OLD else self.stores.new
        return tuple(  # type: ignore[return-value]
            connection.execute(f"SELECT * FROM {table.name(origin)} ORDER BY id".encode()).fetchall() for table in (PEOPLE, PETS)
        )

    def mirror(self) -> dict[str, Any]:
        """Return the counts of the mirror to the new store."""
        counts: dict[str, Any] = self.router.counters()["mirror_new"]
        return counts


MakeFamilies = Callable[..., Families]


@pytest.fixture
def make_families(stores: Stores, flag_client: LDClient, set_stage: Callable[[Router, Stage], None]) -> Iterator[MakeFamilies]:
    """Make the tables once, and routers over them; all of them are closed."""
    stores.old.execute(TABLES.format(people="people", pets="pets").encode())
    stores.new.execute(TABLES.format(people="persons", pets="animals").encode())
    row = stores.old.execute("SELECT (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::bigint").fetchone()
    assert row is not None
    for table in (PEOPLE, PETS):
        install_gate(stores.new, "public", table.new.removeprefix("public."), ("id",), image_version(row[0]))
    made: list[Router] = []

    def make(*, old: PgEndpoint | None = None, new: PgEndpoint | None = None, limits: Limits = PATIENT) -> Families:
        router = Router(
            old=old or PgEndpoint(stores.old_dsn), new=new or PgEndpoint(stores.new_dsn), mirrored=[PEOPLE, PETS],
            stage=FlagStage(flag_client, FLAG), authority=LedgerAuthority(stores.new_dsn, MIGRATION), name=MIGRATION, limits=limits,
        )  # fmt: skip
        made.append(router)
        set_stage(router, Stage.DUALWRITE)
        return Families(stores, router)

    yield make
    for router in made:
        router.close()


@pytest.fixture
def families(make_families: MakeFamilies) -> Families:
    """Make the tables and a router over them."""
    return make_families()
