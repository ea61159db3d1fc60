"""Keys that are equal by their type and not by their text: the gate takes them for one key, under the newest notation.

Every type of key in which equal values may differ as texts is put through batch, function, catch-up, load and TRUNCATE on a
server, and the table is read back as texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from psycopg import sql

from changeover.position import Version, format_lsn, image_version
from changeover.session import Connection, connect
from changeover.stores.postgres import batches, gate, truncate

V0 = image_version(100)

LOOSE = {
    "numeric": ("1", "1.0", "1.00"),
    "jsonb": ('{"a": 1}', '{"a": 1.0}', '{"a": 1.00}'),
    "interval": ("1 day", "24:00:00", "0 days 24:00:00"),
    "double precision": ("0", "-0", "0"),
    "real": ("-0", "0", "-0"),
    "numeric[]": ("{1,2}", "{1.0,2}", "{1,2.00}"),
    "interval[]": ("{1 day}", "{24:00:00}", "{1 day}"),
}
"""Type of a key -> three notations of one value."""

FOLDING = "CREATE COLLATION folding (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
FOLDED = {
    "text COLLATE folding": ("Ab", "aB", "AB"),
    "varchar(9) COLLATE folding": ("straße", "STRAßE", "Straße"),
    "text[] COLLATE folding": ("{Ab,c}", "{aB,c}", "{ab,C}"),
}
"""The same for a server that has ICU, without which no collation is nondeterministic; the wheel's has none."""

STRICT = (
    "integer", "text", "varchar(4)", "uuid", "date", "numeric(12,4)", "char(4)", "timetz", "timestamptz", "bytea", "integer[]",
    "inet", "boolean",
)  # fmt: skip


@dataclass
class Kept:
    """A gated table, whose key has one column of any type and a plain one beside it."""

    connection: Connection
    table: gate.GatedTable

    def batch(self, *changes: tuple[str, int, str | None], reached: int | None = None) -> int:
        """Offer (key, place, image or None) as replay does, one row a text of a key; return how many were taken."""
        with self.connection.transaction(), self.connection.cursor() as cursor:
            batches.prepare_batch(cursor, self.table, versions=True)
            cursor.executemany(
                "INSERT INTO pg_temp.changeover_batch VALUES (0, %s, 0, %s, %s, 'k', %s)",
                [(format_lsn(at), image is None, key, image) for key, at, image in changes],
            )
            floor = None if reached is None else Version(0, reached, -1)
            return batches.apply_batch(cursor, self.table, floor).taken

    def one(self, key: str, at: int, image: str | None) -> bool:
        """Offer one row as an application does."""
        row = self.connection.execute(
            "SELECT changeover.\"gate_public.kept\"(0, %s, 0, %s, ROW(%s, 'k', %s)::kept)",
            [format_lsn(at), image is None, key, image],
        ).fetchone()
        return bool(row and row[0])

    def load(self, *images: tuple[str, str]) -> int:
        """Load images."""
        with self.connection.transaction(), self.connection.cursor() as cursor:
            batches.prepare_batch(cursor, self.table, versions=False)
            cursor.executemany("INSERT INTO pg_temp.changeover_batch VALUES (%s, 'k', %s)", images)
            return batches.load_batch(cursor, self.table).taken

    def rows(self) -> list[tuple[str, str]]:
        """Return the table as texts."""
        return [(row[0], row[1]) for row in self.connection.execute("SELECT id::text, note FROM kept ORDER BY note").fetchall()]

    def written(self, kind: str, *keys: str) -> list[str]:
        """Return keys as the server writes them."""
        asked = sql.SQL(", ").join(
            sql.SQL("({}::{})::text").format(sql.Literal(key), sql.SQL(kind.split(" COLLATE")[0])) for key in keys
        )
        row = self.connection.execute(sql.SQL("SELECT {}").format(asked)).fetchone()
        assert row is not None
        return [str(value) for value in row]


@pytest.fixture
def session(any_dsn: str) -> Iterator[Connection]:
    with connect(any_dsn, "test") as connection:
        yield connection


def notations(connection: Connection) -> dict[str, tuple[str, str, str]]:
    """Return the types that this server has with their notations."""
    if connection.execute("SELECT FROM pg_collation WHERE collname = 'und-x-icu'").fetchone() is None:
        return LOOSE
    connection.execute(sql.SQL(FOLDING))
    return {**LOOSE, **FOLDED}


@contextmanager
def kept(connection: Connection, kind: str) -> Iterator[Kept]:
    create = "CREATE TABLE kept (id {}, kind text, note text, PRIMARY KEY (id, kind))"
    connection.execute(sql.SQL(create).format(sql.SQL(kind)))
    gate.install_gate(connection, "public", "kept", ("id", "kind"), V0)
    yield Kept(connection, gate.gated(connection, "public", "kept", ("id", "kind")))
    gate.remove(connection, "public", "kept")
    connection.execute("DROP TABLE kept")


def test_a_key_has_one_cell_whatever_its_notation(session: Connection) -> None:
    for kind, keys in notations(session).items():
        with kept(session, kind) as table:
            a, b, c = table.written(kind, *keys)
            assert table.table.loose == ("id",), kind
            assert table.load((a, "image")) == 1
            # an update that gave the row another notation: the old key's delete and the new one's put
            moved = (a, 200, None), (b, 201, "moved")
            assert (table.batch(*moved), table.rows()) == (1, [(b, "moved")]), kind
            assert (table.batch(*moved), table.rows()) == (0, [(b, "moved")]), f"{kind}: offered again"
            # there and back in one batch, and over several
            table.batch((b, 210, None), (a, 211, "back"), (c, 209, "older"))
            assert table.rows() == [(a, "back")], kind
            table.batch((a, 220, None))
            assert table.rows() == [], kind
            assert (table.load((b, "late image")), table.rows()) == (0, []), f"{kind}: a ghost under another notation"
            table.batch((c, 230, "reinserted"))
            assert table.rows() == [(c, "reinserted")], kind
            # one row, as the router mirrors it, newer and older
            assert (table.one(a, 240, "mirrored"), table.rows()) == (True, [(a, "mirrored")]), kind
            assert (table.one(b, 239, "late"), table.rows()) == (False, [(a, "mirrored")]), kind
            assert (table.one(b, 241, None), table.rows()) == (True, []), kind
            # a large batch, whose position is the gate
            table.batch((c, 250, None), (b, 251, "caught up"), reached=300)
            assert table.rows() == [(b, "caught up")], kind
            table.batch((b, 310, None), (a, 311, "again"), reached=400)
            assert table.rows() == [(a, "again")], kind
            truncate.truncate(session, table.table, Version(0, 500, 0), "here")
            assert table.rows() == [], kind


def test_other_keys_pay_nothing_for_it(session: Connection) -> None:
    for kind in STRICT:
        with kept(session, kind) as table:
            assert table.table.loose == (), kind


def test_a_generated_key_takes_a_row_by_its_own_value_and_a_key_alone_takes_its_notation(session: Connection) -> None:
    session.execute("CREATE TABLE ids (id bigint GENERATED ALWAYS AS IDENTITY, at numeric, PRIMARY KEY (id, at))")
    gate.install_gate(session, "public", "ids", ("id", "at"), V0)
    for at, key in ((200, "1"), (201, "1.0")):
        session.execute('SELECT changeover."gate_public.ids"(0, %s, 0, false, ROW(7, %s)::ids)', [format_lsn(at), key])
    assert session.execute("SELECT id, at::text FROM ids").fetchall() == [(7, "1.0")]
