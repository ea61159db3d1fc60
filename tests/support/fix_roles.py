"""Fixtures for roles: one that moves tables and is no superuser, and the worst that each pinned setting can be for it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from changeover.session import Connection, connect
from changeover.settings import PINNED, assignment

WORST = {
    "TimeZone": "America/St_Johns", "DateStyle": "SQL, DMY", "IntervalStyle": "sql_standard", "extra_float_digits": "-15",
    "bytea_output": "escape", "client_encoding": "LATIN1", "array_nulls": "off", "xmlbinary": "hex", "xmloption": "document",
    "lc_monetary": "C.UTF-8", "lc_numeric": "C.UTF-8", "lc_time": "C.UTF-8", "timezone_abbreviations": "India",
    "quote_all_identifiers": "on", "standard_conforming_strings": "off", "backslash_quote": "on", "transform_null_equals": "on",
    "search_path": "evil, pg_catalog", "gin_fuzzy_search_limit": "1", "exit_on_error": "on",
    "default_table_access_method": "other", "client_min_messages": "debug1", "row_security": "on",
    "default_transaction_isolation": "serializable", "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on", "synchronous_commit": "off", "statement_timeout": "1ms", "lock_timeout": "1ms",
    "idle_in_transaction_session_timeout": "1ms", "idle_session_timeout": "1s", "transaction_timeout": "1s",
    "wal_sender_timeout": "1s",
}  # fmt: skip
"""The last two timeouts are set to nothing only when the server's version is known, so they leave time to begin."""

OTHER = {
    "TimeZone": "Asia/Kabul", "DateStyle": "German, MDY", "IntervalStyle": "iso_8601", "extra_float_digits": "0",
    "client_encoding": "SJIS", "backslash_quote": "off", "client_min_messages": "error",
    "default_transaction_isolation": "repeatable read", "synchronous_commit": "local",
}  # fmt: skip
"""Further values that are as bad, where a setting has some."""

EVIL = """
CREATE SCHEMA evil;
GRANT USAGE ON SCHEMA evil TO PUBLIC;
CREATE FUNCTION evil.never(integer, integer) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false';
CREATE FUNCTION evil.never(bigint, bigint) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false';
CREATE FUNCTION evil.never(text, text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false';
CREATE OPERATOR evil.= (LEFTARG = integer, RIGHTARG = integer, FUNCTION = evil.never);
CREATE OPERATOR evil.= (LEFTARG = bigint, RIGHTARG = bigint, FUNCTION = evil.never);
CREATE OPERATOR evil.= (LEFTARG = text, RIGHTARG = text, FUNCTION = evil.never);
CREATE FUNCTION evil.pg_current_wal_insert_lsn() RETURNS pg_lsn LANGUAGE sql AS $$SELECT '0/0'::pg_lsn$$;
CREATE ACCESS METHOD other TYPE TABLE HANDLER heap_tableam_handler
"""
"""A schema that shadows what pg_catalog has, where a search_path puts it first; and another name for heap."""


@dataclass(frozen=True)
class Mover:
    """A role that may replicate and connect, and nothing else by itself."""

    name: str

    def dsn(self, of: str) -> str:
        """Return its DSN for a database, from another role's."""
        return make_conninfo(of, user=self.name, password="mover")

    def owns(self, admin: Connection, *tables: str) -> None:
        """Let it make schemas in a database, and own tables there."""
        database, role = sql.Identifier(admin.info.dbname), sql.Identifier(self.name)
        admin.execute(sql.SQL("GRANT CREATE ON DATABASE {} TO {}; GRANT ALL ON SCHEMA public TO {}").format(database, role, role))
        for table in tables:
            admin.execute(sql.SQL("ALTER TABLE {} OWNER TO {}").format(sql.Identifier(*table.split(".")), role))

    def is_beset(self, admin: Connection, *, by_database: bool = False) -> None:
        """Set each pinned setting to its worst, for the role or for the session's database."""
        if admin.execute("SELECT to_regnamespace('evil') IS NULL").fetchone() == (True,):
            for statement in EVIL.split(";\n"):
                admin.execute(sql.SQL(statement))
        whom = sql.SQL("DATABASE {}").format(sql.Identifier(admin.info.dbname)) if by_database else self._role
        _alter(admin, whom, worst(admin))

    def is_beset_otherwise(self, admin: Connection) -> None:
        """Set the further bad values for the role in the session's database, where they win over the role's own."""
        _alter(admin, sql.SQL("{} IN DATABASE {}").format(self._role, sql.Identifier(admin.info.dbname)), OTHER)

    def is_beset_by(self, admin: Connection, name: str) -> None:
        """Set one setting alone to its worst, for the role."""
        self.is_free(admin)
        _alter(admin, self._role, {name: WORST[name]})

    def is_free(self, admin: Connection) -> None:
        """Take the role's settings away."""
        admin.execute(sql.SQL("ALTER {} RESET ALL").format(self._role))

    @property
    def _role(self) -> sql.Composed:
        return sql.SQL("ROLE {}").format(sql.Identifier(self.name))


def _alter(admin: Connection, whom: sql.Composed, values: Mapping[str, str]) -> None:
    for name, value in values.items():
        admin.execute(sql.SQL("ALTER {} SET {}").format(whom, assignment(name, value)))


def worst(admin: Connection) -> dict[str, str]:
    """Return the worst values of the settings that a server knows."""
    known = {one.name for one in PINNED if one.since <= admin.info.server_version}
    return {name: value for name, value in WORST.items() if name in known}


@contextmanager
def passing_mover(*dsns: str) -> Iterator[Mover]:
    """Create a role on a server and drop it with all that it owns in some of its databases."""
    made = Mover(f"mover_{uuid.uuid4().hex[:10]}")
    role = sql.Identifier(made.name)
    with connect(dsns[0], "changeover:tests:role") as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN REPLICATION PASSWORD 'mover'").format(role))
    try:
        yield made
    finally:
        for dsn in dsns:
            with connect(dsn, "changeover:tests:role") as admin:
                admin.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(role))
        with connect(dsns[0], "changeover:tests:role") as admin:
            admin.execute(sql.SQL("DROP ROLE {}").format(role))


@pytest.fixture
def mover(old_dsn: str, new_dsn: str) -> Iterator[Mover]:
    """Yield a role on the run's one server."""
    with passing_mover(old_dsn, new_dsn) as made:
        yield made
