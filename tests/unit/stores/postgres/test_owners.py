"""Owners of target keys: two live source rows meet in none unnoticed, and nothing that is right is taken for a meeting."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from changeover.errors import RowRefused
from changeover.position import Version, format_lsn, image_version
from changeover.session import Connection, connect
from changeover.stores.base.interface import Counts
from changeover.stores.postgres import batches, gate

TABLE = gate.GatedTable("public", "kept", ("id",), ("id", "note"), owned=True)

Change = tuple[str, int, str | None, str, Sequence[str]]
"""(target key, place, image or None, source key, source keys that the batch deletes)."""


@pytest.fixture
def session(any_dsn: str) -> Iterator[Connection]:
    with connect(any_dsn, "test") as connection:
        connection.execute("CREATE TABLE kept (id text PRIMARY KEY, note text)")
        gate.install(connection, TABLE, image_version(100))
        yield connection


def batch(session: Connection, *changes: Change, epoch: int = 0, reached: int | None = None) -> Counts:
    with session.transaction(), session.cursor() as cursor:
        batches.prepare_batch(cursor, TABLE, versions=True)
        cursor.executemany(
            "INSERT INTO pg_temp.changeover_batch VALUES (%s, %s, 0, %s, %s, %s, %s, %s)",
            [(epoch, format_lsn(at), image is None, key, image, source, list(gone)) for key, at, image, source, gone in changes],
        )
        return batches.apply_batch(cursor, TABLE, None if reached is None else Version(epoch, reached, -1))


def load(session: Connection, *images: tuple[str, str, str]) -> Counts:
    with session.transaction(), session.cursor() as cursor:
        batches.prepare_batch(cursor, TABLE, versions=False)
        cursor.executemany("INSERT INTO pg_temp.changeover_batch VALUES (%s, %s, %s)", images)
        return batches.load_batch(cursor, TABLE)


def mirror(session: Connection, key: str, at: int, image: str | None) -> None:
    session.execute(
        'SELECT changeover."gate_public.kept"(0, %s, -1, %s, ROW(%s, %s)::kept)', [format_lsn(at), image is None, key, image]
    )


def live(session: Connection) -> dict[str, str]:
    return dict(session.execute("SELECT id, note FROM kept").fetchall())


@pytest.mark.parametrize("reached", [None, 300])
def test_what_meets_alive_is_refused_whole_and_again(session: Connection, reached: int | None) -> None:
    load(session, ("a", "image", "A"), ("b", "image", "B"))
    for _ in range(2):
        with pytest.raises(RowRefused, match="source keys A and a"):
            batch(session, ("c", 200, "new", "C", ()), ("a", 201, "twin", "a", ()), reached=reached)
    assert live(session) == {"a": "image", "b": "image"}
    # with the delete of the other one in the batch the same is right
    assert batch(session, ("c", 200, "new", "C", ()), ("a", 210, "twin", "a", ("A",)), reached=reached).taken == 2
    assert live(session) == {"a": "twin", "b": "image", "c": "new"}
    with pytest.raises(RowRefused, match="source keys a and A"):
        batch(session, ("a", 400, "another", "A", ()))


def test_what_is_right_raises_no_alarm(session: Connection) -> None:
    load(session, ("a", "image", "A"))
    first: Change = ("a", 200, "one", "A", ())
    for _ in range(2):  # an update, and once more as after a kill
        batch(session, first)
    batch(session, ("a", 210, None, "A", ()))
    batch(session, ("a", 220, "two", "aA", ()))
    batch(session, first)  # which is older, and of a source key that gave the key up
    assert live(session) == {"a": "two"}
    # mirrored ahead of its event, after a delete that was mirrored too
    mirror(session, "a", 230, None)
    mirror(session, "a", 240, "mirrored")
    batch(session, ("a", 231, None, "aA", ()))
    batch(session, ("a", 241, "by event", "AA", ()))
    assert live(session) == {"a": "by event"}
    # a ghost of the loader's stands until the sweep, and is nobody's row
    batch(session, ("g", 250, None, "G", ()))
    session.execute("INSERT INTO kept VALUES ('g', 'ghost'); INSERT INTO changeover.\"owner_public.kept\" VALUES ('g', 'G')")
    batch(session, ("g", 260, "real", "gg", ()))
    assert live(session) == {"a": "by event", "g": "real"}
    # in a later epoch the application has written here itself
    batch(session, ("g", 270, "later", "GG", ()), epoch=1)
    assert live(session)["g"] == "later"


def test_images_that_meet_are_named_within_a_chunk_and_across_chunks(session: Connection) -> None:
    with pytest.raises(RowRefused, match="source keys A and a"):
        load(session, ("a", "one", "A"), ("a", "two", "a"))
    load(session, ("a", "one", "A"))
    with pytest.raises(RowRefused, match="source keys A and a"):
        load(session, ("a", "two", "a"))
    assert live(session) == {"a": "one"}


def test_an_epoch_begun_anew_has_no_owner_and_removal_leaves_nothing(session: Connection) -> None:
    load(session, ("a", "one", "A"))
    gate.begin_anew(session, TABLE, Version(1, 500, -1), "here")
    load(session, ("a", "one", "a"))
    assert live(session) == {"a": "one"}
    gate.remove(session, "public", "kept")
    assert not gate.has_owners(session, replace(TABLE, owned=False))
